"""What is computed of weights is kept while they stay as they are, and no longer."""

import copy
import pickle

import pytest
import torch
from torch import nn

from spikegpt_lora.ops.folded import Folded, nothing_kept
from spikegpt_lora.ops.spike_linear import SpikeLinear


class Doubled(nn.Module):
    """Twice its weight, and how often that was computed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))
        self.folded, self.times = Folded(), 0

    def compute(self):
        self.times += 1
        return 2 * self.weight

    def forward(self):
        return self.folded(self.compute, self.weight)


def replaced(module):
    module.load_state_dict({"weight": torch.full((4,), 9.0)}, assign=True)


CHANGES = [
    lambda module: module.weight.add_(1),
    lambda module: module.weight[2:].zero_(),
    lambda module: module.load_state_dict({"weight": torch.full((4,), 9.0)}),
    lambda module: module.to(torch.float64),
    lambda module: module.half().float(),
    replaced,
]


@torch.no_grad()
def test_unchanged_weights_are_read_once():
    module = Doubled()
    assert module() is module() and module.times == 1


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_is_seen(change):
    module = Doubled()
    module()
    change(module)
    for _ in range(2):
        assert torch.equal(module(), 2 * module.weight) and module().dtype == module.weight.dtype
    assert module.times == 2


def test_where_a_gradient_goes_through_nothing_is_kept():
    module = Doubled()
    with torch.no_grad():
        module()
    module().sum().backward()
    assert torch.equal(module.weight.grad, torch.full((4,), 2.0)) and module.folded._kept is None
    module.weight.requires_grad_(False)
    assert module() is module()


@pytest.mark.parametrize("fused", [False, True])
def test_steps_of_an_optimizer_are_seen_that_torch_does_not_count(fused):
    module = Doubled()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1.0, fused=fused)
    for _ in range(3):
        module().sum().backward()
        for when in (lambda: None, optimizer.step, optimizer.zero_grad):
            when()
            with torch.no_grad():
                assert torch.equal(module(), 2 * module.weight)


def test_what_inference_mode_computed_can_be_trained_with():
    module = Doubled()
    with torch.inference_mode():
        module()
    module.weight.requires_grad_(False)
    x = torch.ones(4, requires_grad=True)
    (module() * x).sum().backward()
    assert torch.equal(x.grad, 2 * module.weight)


@pytest.mark.parametrize("of", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@torch.no_grad()
def test_a_copy_has_nothing_of_it(of):
    module = Doubled()
    module()
    copied = of(module)
    assert copied.folded._kept is None and torch.equal(copied(), module())
    copied.weight.zero_()
    assert torch.equal(copied(), torch.zeros(4)) and torch.equal(module(), 2 * module.weight)


@torch.no_grad()
def test_a_linear_layer_that_moves_lets_go_of_it():
    linear, scale = SpikeLinear(3, 2), torch.ones(3)
    linear(torch.ones(1, 3), scale=scale)
    assert linear.folded._kept is not None
    assert linear.double().folded._kept is None


def test_within_nothing_kept_nothing_is_kept_and_what_was_is_gone():
    folded, weight, calls = Folded(), torch.ones(3), []

    def compute():
        calls.append(1)
        return weight * 2

    folded(compute, weight)
    with nothing_kept():
        assert torch.equal(folded(compute, weight), weight * 2) and folded._kept is None
    folded(compute, weight)
    folded(compute, weight)
    assert len(calls) == 3
