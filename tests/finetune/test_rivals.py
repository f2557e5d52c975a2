"""The rivals of the spiking gate: their equations, their gradients, and that what is counted of them is true."""

from functools import partial

import pytest
import torch
from helpers import adapted, fresh_classifier, padded_batch
from peft import LoraConfig
from torch import nn

from spikegpt_lora import SpikeLoraConfig
from spikegpt_lora.adapters import SpikeGate
from spikegpt_lora.finetune.rivals import ThresholdGate, TopKGate, kept, swap_gates
from spikegpt_lora.observe.adapters import observe_adapters

BATCH = padded_batch([7, 4, 9], seed=1)


def spiking(drawn="lora_"):
    return adapted(fresh_classifier(pad_token_id=0), SpikeLoraConfig(task_type="SEQ_CLS", r=5), drawn=drawn)


def activations():
    return torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64, requires_grad=True)


def gradient(passed, a):
    weight = torch.linspace(-1, 2, a.numel(), dtype=a.dtype).view_as(a)
    return torch.autograd.grad((passed * weight).sum(), a)[0], weight


def test_threshold_passes_what_the_gate_passes_with_the_gradient_of_the_product_alone():
    spiking_gate, a = SpikeGate(5, v_threshold=0.25), activations()
    rival = ThresholdGate(spiking_gate)
    open_units = (a >= 0.5).double()
    assert torch.equal(rival.passed(a), open_units * a) and torch.equal(rival.passed(a), spiking_gate.passed(a))
    found, weight = gradient(rival.passed(a), a)
    assert torch.equal(found, open_units * weight)
    assert not torch.equal(found, gradient(spiking_gate.passed(a), a)[0])  # which has the surrogate's part


def test_top_k_passes_the_k_largest_of_each_token_and_their_gradient():
    a = activations()
    rival = TopKGate(SpikeGate(5), budget=0.6)
    largest = (a >= a.sort(dim=-1).values[..., -2:-1]).double()
    assert rival.k == 2 and torch.equal(rival.passed(a), largest * a)
    found, weight = gradient(rival.passed(a), a)
    assert torch.equal(found, largest * weight)


@pytest.mark.parametrize("units, budget, left", [(8, 0.7, 2), (64, 0.7, 19), (4, 0.0, 4), (1, 0.9, 1), (2, 0.99, 1)])
def test_what_a_budget_leaves_is_rounded_and_never_nothing(units, budget, left):
    assert kept(units, budget) == left


def test_a_swapped_model_answers_by_its_rivals_and_their_silence_is_counted():
    model = spiking()
    with observe_adapters(model) as seen:
        as_spiking = model(**BATCH).logits
    before = seen.activity()
    swap_gates(model, ThresholdGate)
    with observe_adapters(model) as seen:
        assert torch.allclose(model(**BATCH).logits, as_spiking, rtol=0, atol=1e-12)
    assert seen.activity().sparsity == before.sparsity and 0.05 < before.sparsity < 0.95
    swap_gates(model, partial(TopKGate, budget=0.6))
    with observe_adapters(model) as seen:
        assert not torch.allclose(model(**BATCH).logits, as_spiking)
    after = seen.activity()
    assert after.sparsity == pytest.approx(0.6, abs=1e-12)
    assert all(module["sparsity"] == pytest.approx(0.6) for module in after.modules.values())


def test_every_weight_of_an_adapter_is_trained_through_a_rival():
    model = spiking().train()
    for rival in (ThresholdGate, partial(TopKGate, budget=0.6)):
        swap_gates(model, rival)
        model.zero_grad()
        model(**BATCH).logits.square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lora_" in name)


def test_a_top_k_gate_is_not_saved_as_a_spiking_one(tmp_path):
    model = spiking()
    swap_gates(model, partial(TopKGate, budget=0.6))
    with pytest.raises(RuntimeError, match="a top-k gate cannot be saved"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), adapted(fresh_classifier(), LoraConfig(task_type="SEQ_CLS", target_modules=["key"]))]
)
def test_a_model_without_gates_is_refused(model):
    with pytest.raises(ValueError, match="must have spiking adapters"):
        swap_gates(model, ThresholdGate)
