"""The spiking gate of an adapter: its equations in both times, its gradients, and what of it can be learned."""

import math

import pytest
import torch
from helpers import largest_difference
from spikingjelly.activation_based import functional, surrogate
from torch.nn import functional as F

from spikegpt_lora.adapters import SpikeGate, sequence

SETTINGS = {"tau": 3.0, "v_threshold": 0.3, "surrogate_alpha": 1.5}
RESETS = [{"v_reset": 0.0}, {"v_reset": -0.2}, {"v_reset": None}, {"v_reset": 0.0, "detach_reset": False}]


def activations(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)


def in_token_time(gate, a, mask=None, before=None):
    """Spikes, and the membrane after them."""
    told = sequence.Sequence([gate], mask=mask, before={} if before is None else {gate: before})
    with sequence.bound(told):
        return gate(a), told.after[gate]


def test_the_gradient_is_the_atan_surrogate():
    a = torch.linspace(-2, 2, 21, dtype=torch.float64).view(1, 3, 7).requires_grad_()
    SpikeGate(7, **SETTINGS)(a).sum().backward()
    u = a.detach() / 3.0 - 0.3
    expected = (1.5 / 2) / (1 + (math.pi / 2 * 1.5 * u) ** 2) / 3.0
    assert largest_difference(a.grad, expected) < 1e-12


def test_in_pointwise_time_tokens_do_not_touch_each_other():
    gate, a = SpikeGate(4, v_threshold=0.1), torch.randn(2, 9, 4)
    assert torch.equal(gate(a)[:, 3:5], gate(a[:, 3:5]))


@pytest.mark.parametrize("reset", RESETS)
def test_in_token_time_it_is_spikingjellys_neuron_along_the_sequence(backend, reset):
    a = activations(3, 11, 5)
    gate = SpikeGate(5, time="token", **SETTINGS, **reset)
    spikes, membrane = in_token_time(gate, a)
    expected, after, _ = functional.lif_multi_step(
        a.transpose(0, 1), torch.full((3, 5), reset["v_reset"] or 0.0, dtype=torch.float64), 3.0, True, 0.3,
        reset["v_reset"], surrogate.ATan(1.5), reset.get("detach_reset", True), False,
    )  # fmt: skip
    assert torch.equal(spikes, expected.transpose(0, 1)) and 0.05 < spikes.mean() < 0.9
    assert largest_difference(membrane, after) < 1e-12
    weights = torch.randn(3, 11, 5, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((s * weights).sum(), a, retain_graph=True)[0] for s in (spikes, expected.transpose(0, 1))
    ]
    assert largest_difference(*gradients) < 1e-12


@pytest.mark.parametrize("learn", ["none", "both"])
@pytest.mark.parametrize("v_reset", [0.0, None])
def test_masked_steps_do_not_exist(backend, learn, v_reset):
    a, gate = activations(2, 6, 3), SpikeGate(3, time="token", learn=learn, v_reset=v_reset, **SETTINGS)
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 1]]).bool()
    spikes, membrane = in_token_time(gate, a, mask)
    for row in range(2):
        alone, after = in_token_time(gate, a[row : row + 1, mask[row]])
        assert torch.equal(spikes[row, mask[row]], alone[0]) and largest_difference(membrane[row], after[0]) < 1e-12
    assert not spikes[~mask].any()


@pytest.mark.parametrize("learn", ["none", "both"])
def test_stretches_give_what_the_whole_gives(backend, learn):
    a, gate = activations(2, 9, 4), SpikeGate(4, time="token", learn=learn, **SETTINGS)
    whole, after = in_token_time(gate, a)
    first, between = in_token_time(gate, a[:, :4])
    second, last = in_token_time(gate, a[:, 4:], before=between)
    assert torch.equal(torch.cat([first, second], dim=1), whole) and largest_difference(last, after) < 1e-12


@pytest.mark.parametrize("time", ["pointwise", "token"])
@pytest.mark.parametrize("v_reset", [0.0, -0.2, None])
def test_a_gate_that_learns_starts_as_one_that_does_not(time, v_reset):
    a, settings = activations(2, 9, 4), SETTINGS | {"time": time, "v_reset": v_reset}
    results = []
    for learn in ("none", "both"):
        gate = SpikeGate(4, learn=learn, per_rank=True, **settings).double()
        spikes = in_token_time(gate, a)[0] if time == "token" else gate(a)
        results.append((spikes, torch.autograd.grad((spikes * a.detach()).sum(), a)[0]))
    assert torch.equal(results[0][0], results[1][0]) and largest_difference(results[0][1], results[1][1]) < 1e-6


@pytest.mark.parametrize("per_rank, size", [(False, 1), (True, 4)])
def test_learned_settings_stay_positive_and_have_the_surrogates_gradient(per_rank, size):
    gate, a = SpikeGate(4, learn="both", per_rank=per_rank, **SETTINGS).double(), activations(2, 9, 4)
    gate(a).sum().backward()
    assert gate.raw_threshold.shape == gate.raw_tau.shape == (size,)
    slope = (1.5 / 2) / (1 + (math.pi / 2 * 1.5 * (a.detach() / 3.0 - 0.3)) ** 2)
    total = (-slope).sum((0, 1)) if per_rank else (-slope).sum()[None]
    assert largest_difference(gate.raw_threshold.grad, total * torch.sigmoid(gate.raw_threshold.detach())) < 1e-6
    assert (gate.raw_tau.grad != 0).all()
    with torch.no_grad():
        gate.raw_threshold.fill_(-50.0)
        gate.raw_tau.fill_(-50.0)
    assert (gate.threshold_now() >= 0).all() and (gate.tau_now() >= 1).all() and gate(a).isfinite().all()


def test_membranes_are_those_after_each_token():
    a, mask = activations(2, 6, 3), torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0]]).bool()
    gate = SpikeGate(3, time="token", **SETTINGS)
    with sequence.bound(sequence.Sequence([gate], mask=mask)) as told:
        gate(a)
        assert largest_difference(gate.membranes(a)[:, -1], told.after[gate]) < 1e-12
    pointwise = SpikeGate(3, **SETTINGS)
    h = a.detach() / 3.0
    assert largest_difference(pointwise.membranes(a), h * (h < 0.3)) < 1e-12


def test_the_threshold_is_saved_wherever_a_controller_left_it():
    gate, other = SpikeGate(3, v_threshold=0.1), SpikeGate(3, v_threshold=0.5)
    gate.v_threshold = 1 / 3
    other.load_state_dict(gate.state_dict())
    assert other.v_threshold == 1 / 3


@pytest.mark.parametrize("saved", [math.nan, math.inf, -0.1, [0.1, 0.2]])
def test_a_saved_threshold_that_no_configuration_could_have_is_refused(saved):
    gate = SpikeGate(3, "mine", v_threshold=0.1)
    with pytest.raises(ValueError, match="gate of adapter 'mine' must be one finite number >= 0, got"):
        gate.load_state_dict({"_extra_state": torch.tensor(saved)})
    with pytest.raises(ValueError, match="got 0.1"):
        gate.set_extra_state("0.1")
    assert gate.v_threshold == 0.1


@pytest.mark.parametrize("saved, holds", [(0.2, True), ([0.2], True), ([0.2, 0.0], False), ([0.2, 1.0], True)])
def test_an_integer_gate_takes_from_a_file_whether_b_holds_a_spikes_worth_and_older_ones_do(saved, holds):
    gate = SpikeGate(3, kind="integer")
    gate.load_state_dict({"_extra_state": torch.tensor(saved)})
    assert (round(gate.v_threshold, 6), gate.worth_in_b) == (0.2, holds)
    other = SpikeGate(3, kind="integer")
    other.load_state_dict(gate.state_dict())
    assert other.worth_in_b == holds


def test_a_gate_in_token_time_says_that_it_needs_its_models_forward():
    with pytest.raises(RuntimeError, match="only inside its model's forward"):
        SpikeGate(3, time="token")(torch.zeros(1, 2, 3))


@pytest.mark.parametrize("shape", [(6, 3), (2, 5, 3), (1, 6, 3)])
def test_activations_that_are_no_tokens_are_refused_in_token_time(shape):
    gate = SpikeGate(3, time="token")
    with pytest.raises(ValueError, match=r"got activations .* for tokens \(2, 6\): leave this module out"):
        in_token_time(gate, torch.zeros(shape), torch.ones(2, 6).bool())


def test_the_raw_parameter_of_a_small_value_is_exact():
    for value in (1e-3, 0.1, 1.0, 30.0):
        gate = SpikeGate(1, v_threshold=value, learn="threshold")
        assert gate.threshold_now().item() == pytest.approx(value, rel=1e-5)
        assert F.softplus(gate.raw_threshold).shape == (1,)


def test_an_integer_gate_fires_first_where_the_others_do_and_counts_on():
    a = torch.linspace(-2, 12, 400, dtype=torch.float64)[:, None]
    counts = SpikeGate(1, kind="integer", v_threshold=0.65)(a).flatten()
    spikes = SpikeGate(1, kind="binary", v_threshold=0.65)(a).flatten()
    assert torch.equal(counts > 0, spikes > 0)
    assert [a[counts >= k].min().item() for k in (1, 2, 3)] == pytest.approx([1.3, 3.9, 6.5], abs=0.04)


def test_an_integer_gates_gradient_is_the_spikes_own_times_the_count_and_one_spikes_share():
    gate = SpikeGate(1, kind="integer", v_threshold=0.65)
    a = torch.tensor([[0.5], [1.5], [4.0], [12.0]], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(gate(a).sum(), a)
    binary = SpikeGate(1, kind="binary", v_threshold=0.65)
    (surrogate,) = torch.autograd.grad(binary(a).sum(), a)
    counts, passes = torch.tensor([[1.0], [1], [2], [3]]), torch.tensor([[0.0], [1], [1], [0]])
    assert torch.allclose(found, surrogate * counts + passes / 2.6)


@pytest.mark.parametrize("kind, worth", [("graded", 1.0), ("binary", 1.0), ("integer", 2 * 3.0 * (0.7 - 0.2))])
def test_b_is_multiplied_by_what_an_integer_spike_stands_for(kind, worth):
    b = torch.randn(5, 3, dtype=torch.float64)
    gate = SpikeGate(3, kind=kind, v_threshold=0.7, tau=3.0, v_reset=0.2)
    assert torch.allclose(gate.outwards(b), worth * b, rtol=1e-12)
    gate.worth_in_b = True
    assert torch.equal(gate.outwards(b), b)


@pytest.mark.parametrize("v_threshold", [0.05, 0.65, 2.0])
def test_what_an_integer_gate_adds_differs_from_the_activation_by_half_a_spikes_worth_at_most(v_threshold):
    gate, b = SpikeGate(1, kind="integer", v_threshold=v_threshold), torch.ones(1, 1, dtype=torch.float64)
    a = torch.linspace(0, 14 * v_threshold, 100, dtype=torch.float64)[:, None]
    assert ((gate(a) @ gate.outwards(b).t() - a).abs() <= 2 * v_threshold + 1e-9).all()


def test_learned_thresholds_of_an_integer_gate_get_a_gradient_through_b_too():
    gate = SpikeGate(2, kind="integer", v_threshold=0.5, learn="threshold", per_rank=True)
    b = torch.ones(1, 2, dtype=torch.float64)
    (found,) = torch.autograd.grad((gate.outwards(b) * torch.tensor([1.0, 3.0])).sum(), gate.raw_threshold)
    share = 1 - torch.exp(-torch.tensor(0.5))  # softplus'(raw) where softplus(raw) is 0.5
    assert torch.allclose(found, (4 * torch.tensor([1.0, 3.0]) * share))
