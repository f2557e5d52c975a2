"""Token shift: what is mixed with what, kernel and reference, and both against each other."""

import pytest
import torch
from helpers import need_extension

from spikegpt_lora.ops.token_shift import token_shift

pytestmark = pytest.mark.usefixtures("backend")

ZERO, HALF, ONE = torch.zeros(1), torch.full((1,), 0.5), torch.ones(1)


def test_share_1_is_the_token_share_0_the_one_before_it():
    x = torch.arange(1.0, 5.0).view(1, 4, 1)
    itself, before, between, last = token_shift(x, None, None, ONE, ZERO, HALF)
    assert itself.flatten().tolist() == [1, 2, 3, 4]
    assert before.flatten().tolist() == [0, 1, 2, 3]
    assert between.flatten().tolist() == [0.5, 1.5, 2.5, 3.5]
    assert last.item() == 4


def test_masked_tokens_do_not_exist():
    x = torch.arange(1.0, 6.0).view(1, 5, 1)
    x[0, 2] = torch.nan
    mask = torch.tensor([[False, True, False, True, False]])
    itself, before, last = token_shift(x, torch.tensor([[9.0]]), mask, ONE, ZERO)
    assert itself.flatten().tolist() == [0, 2, 0, 4, 0]
    assert before.flatten().tolist() == [0, 9, 0, 2, 0]
    assert last.item() == 4


def test_a_sequence_without_tokens_keeps_what_it_had():
    *_, last = token_shift(torch.ones(1, 3, 1), torch.tensor([[9.0]]), torch.zeros(1, 3).bool(), ONE, ONE)
    assert last.item() == 9


def arguments(dtype, shape, shares, with_last, with_mask, device="cpu"):
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    B, T, C = shape
    tensors = [draw(*shape).to(dtype), draw(B, C).to(dtype) if with_last else None]
    tensors += [torch.rand(B, T, generator=generator) < 0.7 if with_mask else None]
    tensors += [draw(1, 1, C).to(torch.promote_types(dtype, torch.float32)) for _ in range(shares)]
    return [None if x is None else x.to(device) for x in tensors]


def a_norm(inputs):
    """A LayerNorm with weights of its own for x, the first of `inputs`."""
    norm = torch.nn.LayerNorm(inputs[0].shape[-1]).to(inputs[0])
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2.0, norm.weight.numel()))
        norm.bias.copy_(torch.linspace(-1.0, 0.5, norm.bias.numel()))
    return norm


def results(backend, inputs, norm=None):
    inputs = [x if x is None or x.dtype == torch.bool else x.detach().requires_grad_() for x in inputs]
    outputs = token_shift(*inputs, norm=norm, backend=backend)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    leaves = [x for x in inputs if x is not None and x.requires_grad] + ([] if norm is None else [*norm.parameters()])
    return [*outputs], [*torch.autograd.grad(outputs, leaves, weights)]


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("with_last", [False, True])
@pytest.mark.parametrize("shares", [2, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 70), (3, 33, 17), (2, 9, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_kernel_equals_the_reference_bit_for_bit_and_in_every_gradient(dtype, shape, shares, with_last, with_mask):
    need_extension()
    inputs = arguments(dtype, shape, shares, with_last, with_mask)
    (ours, our_gradients), (theirs, their_gradients) = (results(b, inputs) for b in ("extension", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    torch.testing.assert_close(our_gradients, their_gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("with_last", [False, True])
@pytest.mark.parametrize("shares", [2, 3])
@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 1, 70), (3, 33, 17), (2, 9, 130), (2, 3, 1000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_with_layer_norm_the_kernel_equals_the_reference_in_values_and_every_gradient(
    dtype, shape, shares, with_last, with_mask
):
    need_extension()
    inputs = arguments(dtype, shape, shares, with_last, with_mask)
    ours, theirs = (results(b, inputs, a_norm(inputs)) for b in ("extension", "reference"))
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-4}
    torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_with_layer_norm_the_kernel_is_near_the_reference_in_half_precision(dtype):
    need_extension()
    inputs = arguments(dtype, (3, 33, 17), 2, True, True)
    ours, theirs = (results(b, inputs, a_norm(inputs)) for b in ("extension", "reference"))
    torch.testing.assert_close(ours[0], theirs[0], rtol=3e-2, atol=3e-2, check_dtype=False)
    torch.testing.assert_close(ours[1], theirs[1], rtol=5e-2, atol=0.5, check_dtype=False)


def test_under_autocast_the_mixes_are_what_the_layers_multiply_and_the_state_stays_as_it_is():
    need_extension()
    inputs = arguments(torch.float32, (3, 33, 17), 3, True, True)
    with torch.autocast("cpu", torch.bfloat16):
        (ours, our_gradients) = results("extension", inputs, a_norm(inputs))
    assert [x.dtype for x in ours] == 3 * [torch.bfloat16] + [torch.float32]
    theirs, _ = results("reference", inputs, a_norm(inputs))
    torch.testing.assert_close(ours, [x.to(y.dtype) for x, y in zip(theirs, ours)], rtol=1e-2, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in our_gradients)


def test_a_norm_with_a_hook_is_called_and_one_that_is_none_too():
    need_extension()
    inputs, seen = arguments(torch.float64, (2, 5, 6), 2, True, True), []
    expected, _ = results("extension", inputs, a_norm(inputs))
    hooked = a_norm(inputs)
    hooked.register_forward_hook(lambda module, given, output: seen.append(output))
    torch.testing.assert_close(results("extension", inputs, hooked)[0], expected, rtol=1e-9, atol=1e-9)
    assert len(seen) == 1
    doubled = token_shift(*inputs, norm=torch.nn.Identity(), backend="extension")
    assert all(torch.equal(a, b) for a, b in zip(doubled, token_shift(*inputs, backend="extension")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_is_near_the_reference_in_half_precision(dtype):
    need_extension()
    inputs = arguments(dtype, (3, 33, 17), 3, True, True)
    (ours, our_gradients), (theirs, their_gradients) = (results(b, inputs) for b in ("extension", "reference"))
    tolerance = {"rtol": 3e-2, "atol": 3e-2, "check_dtype": False}  # the reference's share decides its dtype
    torch.testing.assert_close(ours, theirs, **tolerance)
    torch.testing.assert_close(our_gradients, their_gradients, rtol=3e-2, atol=0.3, check_dtype=False)


@pytest.mark.gpu
@pytest.mark.parametrize("shares", [2, 3])
def test_the_cuda_kernel_equals_the_cpus(shares):
    need_extension("cuda")
    (ours, our_gradients), (theirs, their_gradients) = (
        results("extension", arguments(torch.float32, (3, 33, 17), shares, True, True, device))
        for device in ("cuda", "cpu")
    )
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))
    torch.testing.assert_close([g.cpu() for g in our_gradients], their_gradients, rtol=1e-4, atol=1e-5)


def test_gradcheck_with_layer_norm(backend):
    inputs = arguments(torch.float64, (2, 4, 3), 2, True, True)
    norm = a_norm(inputs)
    leaves = [inputs[0].requires_grad_(), inputs[1].requires_grad_(), *(s.requires_grad_() for s in inputs[3:])]
    assert torch.autograd.gradcheck(lambda x, last, a, b: token_shift(x, last, inputs[2], a, b, norm=norm), leaves)


def test_gradcheck_of_every_input():
    inputs = arguments(torch.float64, (2, 4, 3), 3, True, True)
    leaves = [inputs[0].requires_grad_(), inputs[1].requires_grad_(), *(s.requires_grad_() for s in inputs[3:])]
    assert torch.autograd.gradcheck(lambda x, last, *shares: token_shift(x, last, inputs[2], *shares), leaves)
