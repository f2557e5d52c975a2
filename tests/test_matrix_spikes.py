"""Models whose every matrix reads integer spikes: what is read, the equations, gradients, what must change nothing."""

import json
import math

import pytest
import torch
from helpers import DESIGNS, INTEGER, SIZES, adapted, largest_difference, lively, padded_batch
from peft import LoraConfig
from torch import nn

from spikegpt_lora import (
    SpikeGPTConfig,
    SpikeGPTForCausalLM,
    SpikeGPTForSequenceClassification,
    SpikeLoraConfig,
    record_spikes,
)
from spikegpt_lora.neurons.multilevel import IntegerSpikes
from spikegpt_lora.neurons.residual import IntegerAmplitude, IntegerNorm
from spikegpt_lora.ops.spike_linear import SpikeLinear
from spikegpt_lora.ops.wkv import powers_of_two


@pytest.fixture(params=INTEGER)
def design(request):
    return request.param


def inputs_of_matrices(model, **batch):
    """By name, what every call of an nn.Linear was given, and how many calls there were."""
    read, hooks = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            note = lambda module, args, output, name=name: read.setdefault(name, []).append(args[0])  # noqa: E731
            hooks.append(module.register_forward_hook(note))
    model(**batch)
    for hook in hooks:
        hook.remove()
    return read


def by_equations(model, ids):
    """Logits for one sentence, from the equations of model.py, neurons/multilevel.py and neurons/residual.py: one token
    and one vector at a time, every product with a vector of integers."""
    weights = {name.removeprefix("spikegpt."): tensor for name, tensor in model.state_dict().items()}
    L, C, rows = model.config.n_layer, model.config.n_embd, model.config.token_shift == "rows"
    past, kept, membranes, logits = [[] for _ in range(L)], {}, {}, []

    def normed(n, name):
        x = n + weights[f"{name}.offset"]
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[
            f"{name}.bias"
        ]

    def spikes(x, name, lowest=None):
        s, most = weights[f"{name}.log_scale"].exp(), weights[f"{name}.most"]
        return s, torch.maximum(torch.minimum((x / s + 0.5).floor(), most), -most if lowest is None else 0 * most)

    def product(matrix, integers, scale):
        assert torch.equal(integers, integers.round())
        return (weights[f"{matrix}.weight"] * scale) @ integers

    def of_residual(matrix, n, name):
        gain, centre = weights[f"{name}.weight"], weights[f"{name}.centre"]
        x, held = n + weights[f"{name}.offset"], weights[f"{matrix}.weight"] * gain
        deviation = (x.var(unbiased=False) + 1e-5).sqrt()
        constant = held @ (weights[f"{name}.offset"] + centre) - x.mean() * held.sum(1)
        return (product(matrix, n - centre, gain) + constant) / deviation + weights[f"{matrix}.weight"] @ weights[
            f"{name}.bias"
        ]

    def mixed(new, name, share):
        old, kept[name] = kept.get(name, torch.zeros_like(new)), new
        share = weights[share].flatten()
        return share * new + (1 - share) * old

    def read(n, half, names, norm):
        if rows:
            return [mixed(of_residual(f"{half}.{m}", n, norm), f"{half}.{m}", f"{half}.time_mix_{m[0]}") for m in names]
        x, before = normed(n, norm), kept.get(half, torch.zeros(C, dtype=torch.float64))
        kept[half], results = x, []
        for m in names:
            share = weights[f"{half}.time_mix_{m[0]}"].flatten()
            s, q = spikes(share * x + (1 - share) * before, f"{half}.spike_{m}")
            results.append(product(f"{half}.{m}", q, s))
        return results

    def fire(name, current):
        membrane = membranes.get(name, torch.zeros_like(current))
        membrane = membrane + (current - membrane) / 2
        fired = (membrane >= 1).double()
        membranes[name] = membrane * (1 - fired)
        return fired

    for token in ids.tolist():
        n = (weights["blocks.0.amplitude0.amplitude"] + 0.5).floor() * (weights["emb.weight"][token] >= 0)
        for i in range(L):
            att, ffn = f"blocks.{i}.att", f"blocks.{i}.ffn"
            k, v, r = read(n, att, ("key", "value", "receptance"), f"blocks.{i}.ln1")
            decay, first = weights[f"{att}.time_decay"], weights[f"{att}.time_first"]
            if model.config.wkv_powers_of_two:
                decay, first, k = powers_of_two(decay, first, k)
            exponents = [-(len(past[i]) - 1 - n) * decay.exp() + old for n, (old, _) in enumerate(past[i])] + [
                first + k
            ]
            share = torch.stack(exponents).softmax(0)
            y = (share * torch.stack([*(old for _, old in past[i]), v])).sum(0)
            past[i].append((k, v))
            s, q = spikes(torch.sigmoid(r) * y, f"{att}.spike_output")
            n = n + fire(f"{i}.lif1", product(f"{att}.output", q, s))
            k, r = read(n, ffn, ("key", "receptance"), f"blocks.{i}.ln2")
            s, q = spikes(k, f"{ffn}.spike_value", lowest=0)
            n = n + fire(f"{i}.lif2", torch.sigmoid(r) * product(f"{ffn}.value", q * q, s * s))
        logits.append(of_residual("head", n, "ln_out"))
    return torch.stack(logits)


def test_logits_follow_the_equations(lm, ids):
    for norm in (module for module in lm.modules() if isinstance(module, IntegerNorm)):
        norm.centre.copy_(torch.arange(12) % 4)
    assert largest_difference(lm(ids[:1]).logits[0], by_equations(lm, ids[0])) < 1e-10


@pytest.mark.parametrize("adapter", [None, SpikeLoraConfig(task_type="SEQ_CLS", spikelora_gate="integer")])
def test_every_matrix_reads_integers(classifier, adapter):
    classifier = classifier if adapter is None else adapted(classifier, adapter, "lora_")
    read = inputs_of_matrices(classifier, **padded_batch([9, 4, 6]))
    weights = {name.removesuffix(".weight") for name, p in classifier.named_parameters() if p.ndim == 2}
    called = set(read) | {"base_model.model.score.original_module"}
    assert {name for name in weights if "emb" not in name} <= called and len(read) >= 22
    for name, calls in read.items():
        assert all(torch.equal(x, x.round()) for x in calls), name
    sizes = [max(x.abs().max().item() for x in calls) for calls in read.values()]
    assert max(sizes) <= 49 and min(sizes) >= 1


def test_a_graded_gate_is_seen_to_pass_real_numbers(classifier):
    read = inputs_of_matrices(adapted(classifier, SpikeLoraConfig(task_type="SEQ_CLS"), "lora_"), **padded_batch([9]))
    real = {name for name, calls in read.items() if not all(torch.equal(x, x.round()) for x in calls)}
    assert real and all(".lora_B." in name for name in real)


def test_a_norm_that_is_read_gives_the_product_of_the_norm():
    norm, n = lively(IntegerNorm(12)), torch.randint(0, 9, (2, 5, 12)).double()
    norm.centre.copy_(torch.arange(12) % 3)
    linears = [lively(SpikeLinear(12, rows), seed=rows) for rows in (7, 12)]
    expected = [nn.functional.linear(norm(n), linear.weight) for linear in linears]
    assert largest_difference(norm.read(n, *linears), expected) < 1e-12


def test_a_centre_changes_what_is_read_and_nothing_else(lm, ids):
    expected = lm(ids).logits
    for norm in (module for module in lm.modules() if isinstance(module, IntegerNorm)):
        norm.centre.fill_(2)
    assert largest_difference(lm(ids).logits, expected) < 1e-10


def test_silent_neurons_make_the_published_equations(ids):
    """What is integer about H is what its neurons round: the same weights without them are a float model's."""
    lm = lively(SpikeGPTForCausalLM(SpikeGPTConfig(**SIZES, **DESIGNS["integer-channels"])))
    for module in lm.modules():
        if isinstance(module, IntegerSpikes | IntegerAmplitude):
            module.silent = True
    published = lively(SpikeGPTForCausalLM(SpikeGPTConfig(**SIZES)))
    of_both = published.state_dict().keys() & lm.state_dict().keys()
    published.load_state_dict({name: lm.state_dict()[name] for name in of_both}, strict=False)
    amplitude, offset = lm.spikegpt.blocks[0].amplitude0.amplitude, lm.spikegpt.ln_out.offset.detach()
    for norm in (module for module in lm.modules() if isinstance(module, IntegerNorm)):
        norm.offset.data.copy_(offset)
    published.spikegpt.blocks[0].ln0 = Scaled(amplitude, offset)
    assert largest_difference(lm(ids).logits, published(ids).logits) < 1e-9


class Scaled(nn.Module):
    def __init__(self, amplitude, offset):
        super().__init__()
        self.amplitude, self.offset = amplitude, offset

    def forward(self, bits):
        return self.amplitude * bits + self.offset


@pytest.mark.parametrize("settings", [{}, {"signed": False}, {"signed": False, "squared": True}], ids=str)
def test_the_gradient_of_a_scale_is_lsqs(settings):
    """Esser et al. 2020, eq. 3: of the value s q, (q - u) inside the range and the outermost level outside; here of
    log s, so times s, and through the square where it is one."""
    neuron, linear = IntegerSpikes(1, 3, scale=0.7, **settings).double(), SpikeLinear(1, 1).double()
    nn.init.ones_(linear.weight)
    for x in (-5.0, -1.0, -0.2, 0.3, 0.9, 1.3, 2.2, 6.0):
        given = torch.tensor([[x]], dtype=torch.float64)
        (found,) = torch.autograd.grad(linear(neuron(given), scale=neuron.scale).sum(), neuron.log_scale)
        s, u = 0.7, x / 0.7
        k = min(max(math.floor(u + 0.5), -3 if settings == {} else 0), 3)
        moved = k - u if (-3.5 if settings == {} else -0.5) <= u < 3.5 else k
        assert found.item() == pytest.approx(2 * s * s * k * moved if "squared" in settings else s * moved)


def test_a_neuron_fires_its_kth_spike_at_k_minus_a_half():
    neuron, at = IntegerSpikes(1, 2).double(), torch.tensor([-1.5, -0.5, 0.5, 1.5, 9.0], dtype=torch.float64)[:, None]
    assert neuron(at).flatten().tolist() == [-1, 0, 1, 2, 2]
    assert neuron(at - 1e-15).flatten().tolist() == [-2, -1, 0, 1, 2]


@pytest.mark.parametrize("settings", [{"most": 0}, {"most": 128}, {"most": 3, "squared": True}], ids=str)
def test_settings_that_a_neuron_cannot_have_are_refused(settings):
    with pytest.raises(ValueError, match="in 1 ... 127|signed=False"):
        IntegerSpikes(4, **settings)


def test_powers_of_two_are_powers_of_two_and_pass_every_gradient():
    given = [torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) * 2 for i in range(3)]
    given = [x.requires_grad_() for x in given]
    decay, first, k = powers_of_two(*given)
    rates = torch.exp(-torch.exp(decay)).detach()
    for weights in (first.exp(), k.exp(), torch.where(rates > 0.5, 1 - rates, rates)):
        exponents = weights.detach().log2()
        assert largest_difference(exponents, exponents.round()) < 1e-9
    assert largest_difference(k, given[2]) <= math.log(2) / 2 + 1e-12
    assert all((g == 1).all() for g in torch.autograd.grad(decay.sum() + first.sum() + k.sum(), given))


def test_a_published_model_saves_no_word_of_spikes(tmp_path):
    SpikeGPTForCausalLM(SpikeGPTConfig(**SIZES)).save_pretrained(tmp_path / "published")
    SpikeGPTForCausalLM(SpikeGPTConfig(**SIZES, matrix_spikes="integer")).save_pretrained(tmp_path / "spiking")
    said = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("published", "spiking")]
    names = {"matrix_spikes", "spike_levels", "token_shift", "wkv_powers_of_two"}
    assert not names & said[0].keys() and names <= said[1].keys()


def test_levels_and_centres_are_saved_with_the_model(lm, ids, tmp_path):
    for module in lm.modules():
        if isinstance(module, IntegerSpikes):
            module.most[:3] = 12
        if isinstance(module, IntegerNorm):
            module.centre[:5] = 3
    lm.float().save_pretrained(tmp_path)
    again = SpikeGPTForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, lm(ids).logits)
    assert all(torch.equal(a, b) for a, b in zip(lm.state_dict().values(), again.state_dict().values(), strict=True))


def test_every_parameter_is_trained(classifier):
    classifier.train()
    classifier(**padded_batch([9, 4, 6]), labels=torch.tensor([0, 1, 0])).loss.backward()
    still = [name for name, p in classifier.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


@pytest.mark.parametrize("config", [LoraConfig, SpikeLoraConfig])
def test_scales_are_frozen_under_adapters(classifier, config):
    model = adapted(classifier, config(task_type="SEQ_CLS", target_modules=r".*\.(key|value|receptance)"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name or "score" in name for name in trained)


def test_traces_hold_the_integers_of_every_population(classifier):
    trace = record_spikes(classifier, padded_batch([9, 4, 6]))
    levels = {name: set(trace.spikes[name].flatten().tolist()) for name in trace.spikes if ".spike_" in name}
    assert {name.split(".")[-1] for name in levels} >= {"spike_output", "spike_value"}
    assert all(max(found) > 1 for found in levels.values())


def test_bfloat16_reads_integers_too():
    model = SpikeGPTForSequenceClassification(SpikeGPTConfig(**SIZES, matrix_spikes="integer", token_shift="rows"))
    with torch.autocast("cpu", torch.bfloat16):
        read = inputs_of_matrices(lively(model).float(), **padded_batch([9, 4]))
    assert all(torch.equal(x, x.round()) for calls in read.values() for x in calls)
