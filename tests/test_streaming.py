"""Few rows that go on from a state: a block as one operator is its modules, and they run where somebody looks on."""

import pytest
import torch
from helpers import NEURONS, SIZES, adapted, lively, need_extension
from peft import LoraConfig

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM
from spikegpt_lora.convert.generation import WEIGHTS, pack_weights
from spikegpt_lora.neurons.lif import LIF
from spikegpt_lora.ops.backend import default_backend


def speaker(dtype=torch.float32, **neuron):
    """A lively language model, the same on every call."""
    torch.manual_seed(0)
    config = SpikeGPTConfig(**SIZES, **{f"lif_{name}": value for name, value in neuron.items()})
    return lively(SpikeGPTForCausalLM(config)).to(dtype)


@torch.no_grad()
def step(model, ids, tokens=1):
    """What so many tokens give after five others, of every sequence: logits and state."""
    state = model(ids[:, :5], use_cache=True).state
    output = model(ids[:, 5 : 5 + tokens], state=state, use_cache=True)
    return output.logits, *output.state.to_tuple()


@pytest.fixture
def operators(monkeypatch):
    """The blocks that were one operator, as it happens."""
    need_extension()
    calls, run = [], torch.ops.spikegpt_lora.block_step
    monkeypatch.setattr(torch.ops.spikegpt_lora, "block_step", lambda *args: calls.append(1) or run(*args))
    return calls


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("weights", WEIGHTS)  # of plain ones the modules ask torch, which adds up in another order
@pytest.mark.parametrize("tokens", [1, 2])
def test_a_block_in_one_operator_is_its_modules_to_the_bit(ids, operators, weights, neuron, tokens):
    model = pack_weights(speaker(**neuron), weights)
    at_once = step(model, ids, tokens)
    assert len(operators) == 3
    for block in model.spikegpt.blocks:
        block.att.register_forward_hook(lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(at_once, step(model, ids, tokens), strict=True))
    assert len(operators) == 3


@pytest.mark.parametrize("changes", [{"token_shift": "rows"}, {"wkv_powers_of_two": True}], ids=["rows", "powers"])
def test_a_model_that_the_operator_does_not_know_runs_its_modules(ids, operators, changes):
    torch.manual_seed(0)
    model = lively(SpikeGPTForCausalLM(SpikeGPTConfig(**SIZES, **changes))).float()
    whole = model(ids[:, :6], use_cache=True).logits[:, -1:]
    torch.testing.assert_close(step(model, ids)[0], whole.detach(), rtol=1e-4, atol=1e-4)
    assert not operators


def test_it_gives_what_plain_torch_gives(ids, operators):
    ours = step(speaker(), ids)
    with default_backend("reference"):
        theirs = step(speaker(), ids)
    assert len(operators) == 3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


OBSERVERS = {
    "a hook on a matrix": lambda block: block.att.key.register_forward_hook(lambda *_: None),
    "a hook on a half": lambda block: block.ffn.register_forward_pre_hook(lambda *_: None),
    "a hook on a norm": lambda block: block.ln1.register_forward_hook(lambda *_: None),
    "a hook on a neuron": lambda block: block.lif2.register_forward_hook(lambda *_: None),
    "a stored membrane": lambda block: setattr(block.lif1, "store_v_seq", True),
    "another neuron": lambda block: setattr(block, "lif1", LIF(tau=3.0)),
    "a norm without bias": lambda block: setattr(block, "ln1", torch.nn.LayerNorm(12, bias=False)),
    "a norm of another eps": lambda block: setattr(block.ln2, "eps", 1e-3),
    "another matrix": lambda block: setattr(block.att, "key", torch.nn.Linear(12, 12)),
    "a forward of its own": lambda block: setattr(block.dropout, "forward", lambda x: x),
}


@pytest.mark.parametrize("observe", OBSERVERS.values(), ids=OBSERVERS)
def test_a_block_runs_its_modules_where_one_is_observed_or_another(ids, operators, observe):
    model = speaker()
    observe(model.spikegpt.blocks[1])
    assert step(model, ids)[0].isfinite().all() and len(operators) == 2


def test_a_stored_membrane_is_that_of_the_token(ids):
    model = speaker()
    lif = model.spikegpt.blocks[1].lif2
    lif.store_v_seq = True
    state = step(model, ids)[5]
    assert torch.equal(lif.v_seq[:, -1], state[:, 1])


def test_a_gradient_is_not_lost(ids, operators):
    model = speaker()
    state = model(ids[:, :5], use_cache=True).state
    model(ids[:, 5:6], state=state, use_cache=True).logits.sum().backward()
    assert not operators and model.spikegpt.blocks[0].att.key.weight.grad.abs().sum() > 0


def test_an_adapter_answers(ids, operators):
    model = adapted(
        speaker(torch.float64), LoraConfig(task_type="CAUSAL_LM", target_modules=["key"]), dtype=torch.float32
    )
    with_adapter = step(model, ids)
    with model.disable_adapter():
        assert not torch.allclose(step(model, ids)[0], with_adapter[0]) and not operators


def test_weights_that_change_are_read_anew(ids):
    model = speaker()
    before = step(model, ids)[0]
    with torch.no_grad():
        model.spikegpt.blocks[0].att.time_decay.add_(1)
        model.spikegpt.blocks[1].ffn.key.weight.mul_(0.5)
    assert not torch.equal(step(model, ids)[0], before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_another_precision_runs_the_modules(ids, operators, dtype):
    assert step(speaker(dtype), ids)[0].dtype == dtype and not operators


def test_masked_tokens_run_the_modules(ids, operators):
    model = speaker()
    with torch.no_grad():
        state = model(ids[:, :5], use_cache=True).state
        model(ids[:, 5:6], attention_mask=torch.tensor([[1], [0], [1], [1]]), state=state)
    assert not operators


def test_the_operator_refuses_what_is_not_complete():
    need_extension()
    x = torch.zeros(1, 1, 3)
    with pytest.raises(
        ValueError, match="block_step takes 5 states, 6 vectors, 5 shares, 7 matrices and 7 scales, got 1,"
    ):
        torch.ops.spikegpt_lora.block_step(x, [x], [], [], [], [], 1e-5, 2.0, 1.0, 0.0, True, 2.0, False)
