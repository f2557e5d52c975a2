"""Models whose matrices read integers: the kernels against plain torch, stretches against the whole, and evaluation."""

import copy

import pytest
import torch
from helpers import SIZES, lively, need_extension

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM
from spikegpt_lora.forward import hooked
from spikegpt_lora.neurons.residual import IntegerNorm
from spikegpt_lora.ops.backend import default_backend

SHIFTS = ["rows", "channels"]
shifts = pytest.mark.parametrize("shift", SHIFTS)


def a_model(shift, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    config = SpikeGPTConfig(**SIZES, matrix_spikes="integer", token_shift=shift, dropout=0.0, **settings)
    model = lively(SpikeGPTForCausalLM(config)).to(dtype)
    for seed, norm in enumerate(module for module in model.modules() if isinstance(module, IntegerNorm)):
        generator = torch.Generator().manual_seed(seed)
        norm.centre.copy_(torch.randint(-1, 3, norm.centre.shape, generator=generator))
    return model


def some_ids(B=3, T=9, seed=1):
    return torch.randint(0, SIZES["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


def results(model, mask):
    out = model(some_ids(), attention_mask=mask, use_cache=True)
    weights = torch.linspace(-1, 1, out.logits.numel(), dtype=out.logits.dtype).view(out.logits.shape)
    loss = (out.logits * weights).sum() + sum(part.square().sum() for part in out.state.to_tuple() if part is not None)
    names, leaves = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [out.logits.detach(), *out.state.to_tuple()[:5]], dict(zip(names, found))


@shifts
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernels_are_plain_torch_in_values_state_and_every_gradient(shift, masked):
    need_extension()
    model = a_model(shift).train()
    mask = (torch.rand(3, 9, generator=torch.Generator().manual_seed(2)) < 0.7).long() if masked else None
    found = []
    for backend in ("extension", "reference"):
        with default_backend(backend):
            found.append(results(model, mask))
    (ours, our_gradients), (theirs, their_gradients) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert any(gradient is None for gradient in our_gradients.values()) is False
    torch.testing.assert_close(our_gradients, their_gradients, rtol=1e-7, atol=1e-8)


@shifts
def test_a_text_in_stretches_is_the_text(shift, backend):
    model, ids = a_model(shift), some_ids()
    whole = model(ids, use_cache=True)
    first = model(ids[:, :4], use_cache=True)
    with torch.no_grad():
        second = model(ids[:, 4:5], state=first.state, use_cache=True)
    third = model(ids[:, 5:], state=second.state, use_cache=True)
    logits = torch.cat([part.logits for part in (first, second, third)], dim=1)
    torch.testing.assert_close(logits, whole.logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(third.state.to_tuple()[:5], whole.state.to_tuple()[:5], rtol=1e-9, atol=1e-9)


def streamed(model, watch=False):
    """Logits and the last state of a text token by token, with or without somebody who looks on each block."""
    ids, seen = some_ids(2, 12), []
    blocks = model.spikegpt.blocks if watch else []
    with torch.no_grad(), hooked([b.ln1.register_forward_hook(lambda *given: seen.append(given)) for b in blocks]):
        out, logits = model(ids[:, :3], use_cache=True), []
        for t in range(3, 12):
            out = model(ids[:, t : t + 1], state=out.state, use_cache=True)
            logits.append(out.logits)
    return torch.cat(logits, dim=1), out.state.to_tuple()[:5]


@shifts
def test_a_token_by_one_operator_is_the_modules_own(shift, monkeypatch):
    need_extension()
    model = a_model(shift, torch.float32)
    calls, step = [], torch.ops.spikegpt_lora.integer_block_step
    monkeypatch.setattr(torch.ops.spikegpt_lora, "integer_block_step", lambda *x: calls.append(1) or step(*x))
    ours = streamed(model)
    assert len(calls) == 9 * SIZES["n_layer"]
    theirs = streamed(model, watch=True)
    assert len(calls) == 9 * SIZES["n_layer"]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("settings", [{"wkv_powers_of_two": True}, {"spike_levels": 1}], ids=str)
@shifts
def test_whatever_the_settings_a_streamed_token_is_plain_torchs(shift, settings):
    need_extension()
    model, found = a_model(shift, torch.float32, **settings), []
    for backend in ("extension", "reference"):
        with default_backend(backend):
            found.append(streamed(model))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


CHANGES = {
    "a matrix": lambda model: model.spikegpt.blocks[0].att.key.weight.add_(0.3),
    "a gain": lambda model: model.spikegpt.blocks[1].ln2.weight.mul_(2),
    "a centre": lambda model: model.spikegpt.blocks[0].ln1.centre.add_(1),
    "a scale": lambda model: model.spikegpt.blocks[0].att.spike_output.log_scale.add_(0.5),
    "the head": lambda model: model.head.weight.mul_(3),
    "a file": lambda model: model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}),
    "moved": lambda model: model.half().float(),
}


@pytest.mark.parametrize("change", CHANGES)
@shifts
@torch.no_grad()
def test_a_change_of_weights_is_seen_in_evaluation(shift, change):
    need_extension()
    model = a_model(shift, torch.float32)
    streamed(model)
    CHANGES[change](model)
    fresh = copy.deepcopy(model)
    with default_backend("reference"):
        expected = streamed(fresh)
    torch.testing.assert_close(streamed(model), expected, rtol=1e-3, atol=1e-3)


@shifts
def test_it_compiles_without_a_graph_break(shift):
    need_extension()
    model, ids = a_model(shift).train(), some_ids()
    compiled, found = torch.compile(model, fullgraph=True, backend="aot_eager"), []
    for run in (model, compiled):
        model.zero_grad()
        loss = run(ids, labels=ids).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found)


@shifts
def test_under_autocast_it_is_near_and_the_stream_stays_integer(shift):
    need_extension()
    model, ids = a_model(shift, torch.float32), some_ids()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids, output_hidden_states=True, use_cache=True)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    stream = out.hidden_states[1]
    assert torch.equal(stream, stream.round()) and stream.dtype == torch.float32
    assert all(part.dtype == torch.float32 for part in out.state.to_tuple()[1:3])
