"""wkv, kernel and reference, against the defining sums; state, mask, gradients and extreme values."""

import pytest
import torch
from helpers import largest_difference, wkv_inputs

from spikegpt_lora.ops.wkv import NOTHING_YET, wkv, wkv_reference

pytestmark = pytest.mark.usefixtures("backend")


def by_definition(time_decay, time_first, k, v):
    """The two sums of the module docstring, term by term, in float64."""
    y = torch.zeros_like(v)
    w = -torch.exp(time_decay)
    for t in range(k.shape[1]):
        weights = [torch.exp((t - 1 - i) * w + k[:, i]) for i in range(t)] + [torch.exp(time_first + k[:, t])]
        y[:, t] = sum(weight * v[:, i] for i, weight in enumerate(weights)) / sum(weights)
    return y


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 3), (3, 33, 17)], ids=str)
def test_values_equal_the_definition(shape):
    arguments = wkv_inputs(*shape)
    assert largest_difference(wkv(*arguments)[0], by_definition(*arguments)) < 1e-12


def test_the_state_holds_numerator_and_denominator_scaled_by_the_exponent():
    time_decay, time_first, k, v = wkv_inputs()
    numerator, denominator, p = wkv(time_decay, time_first, k, v)[1].unbind(1)
    age = torch.arange(k.shape[1]).flip(0)[:, None]  # (T, 1)
    weights = torch.exp(k - age * torch.exp(time_decay))
    assert largest_difference(denominator * p.exp(), weights.sum(1)) < 1e-12
    assert largest_difference(numerator * p.exp(), (weights * v).sum(1)) < 1e-12


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_chunks_with_the_state_carried_equal_the_whole(cut):
    time_decay, time_first, k, v = wkv_inputs()
    y, state = wkv(time_decay, time_first, k, v)
    first, carried = wkv(time_decay, time_first, k[:, :cut], v[:, :cut])
    second, carried = wkv(time_decay, time_first, k[:, cut:], v[:, cut:], carried)
    assert largest_difference(torch.cat([first, second], 1), y) < 1e-14
    assert largest_difference(carried, state) < 1e-14


def test_masked_tokens_do_not_exist():
    time_decay, time_first, k, v = wkv_inputs(B=4, T=11)
    mask = torch.rand(4, 11, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[2] = False
    y, state = wkv(time_decay, time_first, k, v, mask=mask)
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))
    for row in (0, 1, 3):
        alone, state_alone = wkv(time_decay, time_first, k[row][mask[row]][None], v[row][mask[row]][None])
        assert largest_difference(y[row][mask[row]], alone[0]) < 1e-14
        assert largest_difference(state[row], state_alone[0]) < 1e-14


def test_a_sequence_without_tokens_keeps_its_state():
    time_decay, time_first, k, v = wkv_inputs()
    _, state = wkv(time_decay, time_first, k, v)
    assert torch.equal(wkv(time_decay, time_first, k, v, state, torch.zeros(2, 7).bool())[1], state)


def test_masked_tokens_get_no_gradient_and_may_hold_anything():
    time_decay, time_first, k, v = wkv_inputs(B=1, T=4)
    mask = torch.tensor([[True, False, True, False]])
    k, v = (x.masked_fill(~mask[..., None], float("nan")).requires_grad_() for x in (k, v))
    y, state = wkv(time_decay, time_first, k, v, mask=mask)
    (y.sum() + state[:, :2].sum()).backward()
    for gradient in (k.grad, v.grad):
        assert torch.isfinite(gradient).all() and torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask]))


@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]]).bool()], ids=["whole", "mask"])
def test_gradcheck_of_every_input_and_output(mask):
    time_decay, time_first, k, v = wkv_inputs(T=5)
    _, state = wkv(*wkv_inputs(T=3))
    arguments = [x.detach().requires_grad_() for x in (time_decay, time_first, k, v, state)]
    assert torch.autograd.gradcheck(lambda *a: wkv(*a, mask=mask), arguments)
    assert torch.autograd.gradcheck(lambda *a: wkv(*a, mask=mask), arguments[:4])


MASKS = {  # of five tokens
    "whole": None,
    "holes": torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]]).bool(),
    "no token": torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).bool(),
}


def offset_inputs(offsets, dtype):
    """Leaves time_decay, time_first, k, v and a state of three earlier tokens; k is lifted by one offset a token."""
    time_decay, time_first, k, v = wkv_inputs(T=8)
    k = k + torch.tensor([*offsets, *offsets[:3]], dtype=torch.float64)[:, None]
    _, state = wkv_reference(time_decay, time_first, k[:, 5:], v[:, 5:])
    return [x.detach().to(dtype).requires_grad_() for x in (time_decay, time_first, k[:, :5], v[:, :5], state)]


EXTREME_OFFSETS = [[90.0] * 5, [-90.0] * 5, [90.0, -90.0] * 2 + [90.0], [-90.0, 90.0] * 2 + [-90.0], [-1000.0] * 5]


def results_and_gradients(run, arguments):
    """y, the state, and the gradient of every argument for one random gradient of both."""
    outputs = run(*arguments)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, arguments, weights)]


@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("offsets", EXTREME_OFFSETS, ids=str)
def test_float32_gives_float64s_values_states_and_gradients_where_k_is_extreme(offsets, mask, with_state):
    results = []
    for dtype in (torch.float32, torch.float64):
        arguments = offset_inputs(offsets, dtype)[: 5 if with_state else 4]
        results.append([x.double() for x in results_and_gradients(lambda *a: wkv(*a, mask=mask), arguments)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("offsets", [*EXTREME_OFFSETS, [-1000.0, 1000.0] * 2 + [0.0]], ids=str)
def test_gradcheck_where_k_is_extreme(offsets, mask):
    arguments = offset_inputs(offsets, torch.float64)
    assert torch.autograd.gradcheck(lambda *a: wkv(*a, mask=mask), arguments)
    assert torch.autograd.gradcheck(lambda *a: wkv(*a, mask=mask), arguments[:4])


def test_a_masked_token_after_a_very_small_k_leaves_the_gradient_finite():
    k = torch.tensor([[[-89.0], [0.0]]], requires_grad=True)
    y, state = wkv(torch.zeros(1), torch.zeros(1), k, torch.ones(1, 2, 1), mask=torch.tensor([[True, False]]))
    (y.sum() + state[:, :2].sum()).backward()
    assert torch.equal(k.grad, torch.zeros(1, 2, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_exponent_of_an_empty_state_is_one_number_in_every_dtype(dtype):
    state = wkv(*(x.to(dtype) for x in wkv_inputs()), mask=torch.zeros(2, 7).bool())[1]
    assert torch.equal(state.double(), torch.tensor([0.0, 0.0, NOTHING_YET]).double()[:, None].expand(2, 3, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_empty_state_saved_by_an_earlier_version_means_no_token_yet(dtype):
    arguments = [x.to(dtype) for x in wkv_inputs()]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1, 0]]).bool()
    saved = torch.tensor([0.0, 0.0, -1e38], dtype=dtype)[:, None].repeat(2, 1, 3)
    assert all(map(torch.equal, wkv(*arguments, saved, mask), wkv(*arguments, None, mask)))


@pytest.mark.parametrize("time_decay", [-14.0, 0.0, 3.4])  # w from 1e-6 to 30
@pytest.mark.parametrize("k_scale", [0.0, 1.0, 80.0, 1e4])
def test_extreme_values_stay_finite_and_between_the_values(k_scale, time_decay):
    _, time_first, k, v = wkv_inputs(T=65, dtype=torch.float32, k_scale=k_scale)
    arguments = [x.requires_grad_() for x in (torch.full((3,), time_decay), time_first, k, v)]
    y, state = wkv(*arguments)
    y.sum().backward()
    assert torch.isfinite(state).all() and all(torch.isfinite(x.grad).all() for x in arguments)
    assert (y <= v.amax(1, keepdim=True) + 1e-4).all() and (y >= v.amin(1, keepdim=True) - 1e-4).all()


def test_float32_is_near_float64_over_a_long_sequence():
    arguments = wkv_inputs(T=2000, dtype=torch.float64)
    y64, y32 = wkv(*arguments)[0], wkv(*(x.float() for x in arguments))[0]
    assert largest_difference(y32.double(), y64) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_keeps_a_float32_state(dtype):
    y, state = wkv(*wkv_inputs(dtype=torch.float32)[:2], *(x.to(dtype) for x in wkv_inputs()[2:]))
    assert y.dtype == dtype and state.dtype == torch.float32


def test_the_reference_can_be_asked_for():
    arguments = wkv_inputs()
    assert torch.equal(wkv(*arguments, backend="reference")[0], wkv_reference(*arguments)[0])


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="auto, extension, reference, got 'cupy'"):
        wkv(*wkv_inputs(), backend="cupy")


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("k", (2, 3), r"k must be \(B, T, C\)"),
        ("k", (2, 0, 3), "T >= 1"),
        ("v", (2, 7, 4), r"v must be \(2, 7, 3\).*got \(2, 7, 4\)"),
        ("time_first", (4,), r"time_first must be \(3,\)"),
        ("state", (2, 3), r"state must be \(2, 3, 3\)"),
        ("mask", (2, 6), r"mask must be \(2, 7\)"),
        ("mask", (2, 7), "mask must be [Bb]ool"),
    ],
)
def test_wrong_shapes_are_named(name, shape, message):
    arguments = dict(zip(("time_decay", "time_first", "k", "v"), wkv_inputs())) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        wkv(**arguments)


def test_strided_inputs_are_read_as_they_are():
    time_decay, time_first, k, v = wkv_inputs(2, 6, 4)
    y, state = wkv(time_decay, time_first, k, v)
    wide = torch.stack([k, v], -1)
    assert torch.equal(wkv(time_decay, time_first, wide[..., 0], wide[..., 1])[0], y)
    carried = torch.stack([state, state], 1)[:, 1]
    again = wkv(time_decay, time_first, k, v, carried)[0]
    assert torch.equal(again, wkv(time_decay, time_first, k, v, state)[0])
