"""LIF, kernel and spikingjelly's code, against spikingjelly's LIFNode and the equations; the mask's meaning."""

import copy
import math
import pickle

import pytest
import torch
from helpers import NEURONS, current, largest_difference
from spikingjelly.activation_based import functional, monitor, neuron, surrogate

from spikegpt_lora.neurons.lif import LIF

pytestmark = pytest.mark.usefixtures("backend")


def spikingjelly_node(settings):
    settings = dict(settings)
    alpha = settings.pop("surrogate_alpha", 2.0)
    return neuron.LIFNode(surrogate_function=surrogate.ATan(alpha), step_mode="m", **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", NEURONS, ids=str)
def test_spikes_and_gradient_equal_spikingjelly(settings, dtype):
    x, y = (current(3, 17, 5, dtype=dtype).requires_grad_() for _ in range(2))
    ours = LIF(**settings)(x)
    theirs = spikingjelly_node(settings)(y.transpose(0, 1)).transpose(0, 1)
    weight = current(3, 17, 5, dtype=dtype)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    assert 0.05 < ours.mean() < 0.95
    assert torch.equal(ours, theirs)
    assert largest_difference(x.grad, y.grad) < 1e-6


def by_hand(x, tau=2.0, v_threshold=1.0, v_reset=0.0, decay_input=True, detach_reset=False, surrogate_alpha=2.0):
    """The three equations of neurons/lif.py, step by step; the surrogate as a straight-through sum."""
    rest = v_reset or 0.0
    v, spikes = torch.full_like(x[:, 0], rest), []
    for x_t in x.unbind(1):
        h = v + (x_t - (v - rest)) / tau if decay_input else v - (v - rest) / tau + x_t
        smooth = torch.atan(math.pi / 2 * surrogate_alpha * (h - v_threshold)) / math.pi
        s = (h >= v_threshold).to(x.dtype) + smooth - smooth.detach()
        spikes.append(s)
        s = s.detach() if detach_reset else s
        v = h - s * v_threshold if v_reset is None else h * (1 - s) + s * v_reset
    return torch.stack(spikes, 1), v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", NEURONS, ids=str)
def test_spikes_membrane_and_gradients_equal_the_equations(settings, dtype):
    x, y = (current(2, 9, 4, dtype=dtype).requires_grad_() for _ in range(2))
    spikes, membrane = LIF(**settings).step(x)
    expected, expected_membrane = by_hand(y, **settings)
    weight = current(2, 9, 4, dtype=dtype)
    ((spikes * weight).sum() + membrane.square().sum()).backward()
    ((expected * weight).sum() + expected_membrane.square().sum()).backward()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert torch.equal(spikes, expected.round())
    assert largest_difference(membrane, expected_membrane) < tolerance
    assert largest_difference(x.grad, y.grad) < tolerance


@pytest.mark.parametrize("settings", NEURONS, ids=str)
def test_masked_steps_do_not_exist(settings):
    lif, x = LIF(**settings), current(4, 11, 3)
    mask = torch.rand(4, 11, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[2] = False
    spikes, membrane = lif.step(x, None, mask)
    assert torch.equal(spikes[~mask], torch.zeros_like(spikes[~mask]))
    for row in (0, 1, 3):
        alone, membrane_alone = lif.step(x[row][mask[row]][None])
        assert torch.equal(spikes[row][mask[row]], alone[0])
        assert torch.equal(membrane[row], membrane_alone[0])
    assert torch.equal(membrane[2], torch.full((3,), settings.get("v_reset", 0.0) or 0.0, dtype=torch.float64))


def test_masked_steps_get_no_gradient():
    x = current(2, 6, 3).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 0, 1, 1, 1, 1]]).bool()
    spikes, membrane = LIF().step(x, None, mask)
    (spikes.sum() + membrane.sum()).backward()
    assert torch.equal(x.grad[~mask], torch.zeros_like(x.grad[~mask]))
    assert (x.grad[mask] != 0).any()


@pytest.mark.parametrize("cut", [1, 4, 10])
def test_chunks_with_the_membrane_carried_equal_the_whole(cut):
    lif, x = LIF(), current(2, 11, 3)
    whole, end = lif.step(x)
    first, membrane = lif.step(x[:, :cut])
    second, membrane = lif.step(x[:, cut:], membrane)
    assert torch.equal(torch.cat([first, second], 1), whole)
    assert torch.equal(membrane, end)


def test_the_gradient_of_the_membrane_reaches_earlier_chunks():
    lif, x = LIF(detach_reset=True), current(1, 6, 2, scale=0.3).requires_grad_()
    _, membrane = lif.step(x[:, :3])
    spikes, _ = lif.step(x[:, 3:], membrane)
    (in_chunks,) = torch.autograd.grad(spikes.sum(), x)
    (whole,) = torch.autograd.grad(lif(x)[:, 3:].sum(), x)
    assert (whole[:, :3] != 0).any()
    assert largest_difference(in_chunks, whole) < 1e-12


def test_a_membrane_exactly_at_the_threshold_fires():
    x = torch.full((1, 1, 1), 2.0)  # charge x / tau = 1.0
    assert LIF()(x).item() == 1.0
    assert LIF()(torch.nextafter(x, torch.zeros(1))).item() == 0.0


def test_nothing_survives_a_call():
    lif, x = LIF(), current(2, 5, 3)
    first = lif(x)
    assert torch.equal(lif(x), first)
    assert not hasattr(lif, "v") and not hasattr(lif, "v_seq")
    assert list(lif.memories()) == [0.0]
    functional.reset_net(lif)
    functional.detach_net(lif)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_keeps_a_float32_membrane(dtype):
    spikes, membrane = LIF().step(current(2, 5, 3, dtype=torch.float32).to(dtype))
    assert spikes.dtype == dtype and membrane.dtype == torch.float32


def test_spikingjellys_output_monitor_sees_the_spikes():
    lif, x = LIF(), current(2, 5, 3, dtype=torch.float32)
    net = torch.nn.Sequential(torch.nn.Identity(), lif)
    with monitor.OutputMonitor(net, neuron.LIFNode) as seen:
        spikes, _ = lif.step(x)
    assert len(seen.records) == 1 and torch.equal(seen.records[0], spikes)


@pytest.mark.parametrize("attribute", ["v", "v_seq"])
def test_a_monitor_of_membranes_that_nobody_stores_is_an_error_that_says_what_to_set(attribute):
    lif = LIF()
    net = torch.nn.Sequential(torch.nn.Identity(), lif)
    with monitor.AttributeMonitor(attribute, False, net, neuron.LIFNode):
        with pytest.raises(AttributeError, match=f"LIF holds no {attribute}: set store_v_seq = True"):
            net(current(2, 5, 3))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("settings", NEURONS, ids=str)
def test_stored_membranes_explain_the_spikes_and_the_membrane_handed_on(settings, masked):
    lif, x, before = LIF(**settings), current(3, 9, 4, dtype=torch.float32), current(3, 4, dtype=torch.float32)
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(2)) < 0.6 if masked else None
    expected, after = lif.step(x, before, mask)
    lif.store_v_seq = True
    spikes, membrane = lif.step(x.requires_grad_(), before, mask)
    assert torch.equal(spikes, expected) and torch.equal(membrane, after) and membrane.requires_grad
    assert torch.equal(lif.v, after) and not lif.v_seq.requires_grad
    rest, earlier = lif.v_reset or 0.0, torch.cat([before[:, None], lif.v_seq[:, :-1]], 1)
    real = torch.ones(3, 9).bool() if mask is None else mask
    leak = earlier - rest
    h = earlier + (x - leak) / lif.tau if lif.decay_input else earlier - leak / lif.tau + x
    assert torch.equal(spikes, (h >= lif.v_threshold).float() * real[..., None])
    assert torch.equal(lif.v_seq[~real], earlier[~real])


def test_stored_membranes_are_spikingjellys():
    lif, node, x = LIF(), spikingjelly_node({}), current(3, 9, 4, dtype=torch.float32)
    records = []
    for neurons, current_in in ((lif, x), (node, x.transpose(0, 1))):
        neurons.store_v_seq = True
        with (
            monitor.AttributeMonitor("v_seq", False, neurons) as sequence,
            monitor.AttributeMonitor("v", False, neurons) as last,
        ):
            neurons(current_in)
        records.append((sequence.records[0], last.records[0]))
    assert torch.equal(records[0][0], records[1][0].transpose(0, 1)) and torch.equal(records[0][1], records[1][1])


@pytest.mark.parametrize("forget", [functional.reset_net, lambda lif: setattr(lif, "store_v_seq", False)])
def test_stored_membranes_are_never_read_and_are_forgotten_on_reset_or_where_no_longer_wanted(forget):
    lif, x = LIF(), current(2, 5, 3)
    lif.store_v_seq = True
    assert torch.equal(lif(x), lif(x)) and lif.v.shape == (2, 3)
    forget(lif)
    assert not hasattr(lif, "v") and not hasattr(lif, "v_seq")


def test_a_neuron_that_stores_is_copied_saved_and_compiled():
    lif, x = LIF(), current(2, 5, 3)
    lif.store_v_seq = True
    compiled = torch.compile(lif, backend="aot_eager")(x.requires_grad_())
    stored = lif.v_seq
    for other in (copy.deepcopy(lif), pickle.loads(pickle.dumps(lif))):
        assert torch.equal(other.v_seq, stored) and torch.equal(other(x), compiled)
    assert lif.state_dict() == {}


@pytest.mark.parametrize(
    "x, membrane, mask, message",
    [
        (torch.zeros(2, 3), None, None, r"\(B, T, C\)"),
        (torch.zeros(2, 0, 3), None, None, "T >= 1"),
        (torch.zeros(2, 4, 3), torch.zeros(3), None, r"membrane must be \(2, 3\), got \(3,\)"),
        (torch.zeros(2, 4, 3), None, torch.ones(2, 3).bool(), r"mask must be bool \(2, 4\)"),
        (torch.zeros(2, 4, 3), None, torch.ones(2, 4), "float32"),
    ],
)
def test_wrong_arguments_are_named(x, membrane, mask, message):
    with pytest.raises(ValueError, match=message):
        LIF().step(x, membrane, mask)


def test_another_surrogate_function_is_respected():
    lif, x = LIF(), current(1, 4, 3).requires_grad_()
    lif.surrogate_function = surrogate.Sigmoid(4.0)
    node = neuron.LIFNode(tau=2.0, surrogate_function=surrogate.Sigmoid(4.0), step_mode="m")
    (ours,) = torch.autograd.grad(lif(x).sum(), x)
    (theirs,) = torch.autograd.grad(node(x.transpose(0, 1)).sum(), x)
    assert largest_difference(ours, theirs) < 1e-12


def test_a_reset_value_may_be_a_whole_number():
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(LIF(v_reset=0)(x), LIF(v_reset=0.0)(x))
