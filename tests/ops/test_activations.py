"""sigmoid(r) * y and relu(k)^2: kernel against plain torch."""

import pytest
import torch
from helpers import need_extension

from spikegpt_lora.ops.activations import sigmoid_gate, squared_relu

TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def draw(*shape, dtype=torch.float64):
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (2, 5, 67)], ids=str)
def test_the_kernels_equal_plain_torch_in_values_and_gradients(shape, dtype):
    need_extension()
    r, y = draw(*shape, dtype=dtype).requires_grad_(), draw(*shape, dtype=dtype).flip(tuple(range(len(shape))))
    y = y.detach().requires_grad_()
    for function, inputs in ((sigmoid_gate, (r, y)), (squared_relu, (r,))):
        ours, theirs = (function(*inputs, backend=backend) for backend in ("extension", "reference"))
        assert ours.dtype == theirs.dtype
        tolerance = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
        torch.testing.assert_close(ours, theirs, **tolerance)
        weight = torch.ones_like(ours) / 3
        gradients = [torch.autograd.grad(result, inputs, weight) for result in (ours, theirs)]
        torch.testing.assert_close(*gradients, **tolerance)


@pytest.mark.parametrize("value", [0.0, -0.0, 90.0, -90.0, 1e30, -1e30, float("inf"), float("nan")])
def test_extreme_values_and_nan_come_through(value):
    need_extension()
    r, y = torch.tensor([value]), torch.tensor([2.0])
    for function, inputs in ((sigmoid_gate, (r, y)), (squared_relu, (r,))):
        ours, theirs = (function(*inputs, backend=backend) for backend in ("extension", "reference"))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-37, equal_nan=True)


def test_two_dtypes_are_promoted_as_torch_does():
    gated = sigmoid_gate(draw(4, dtype=torch.bfloat16), draw(4, dtype=torch.float32))
    assert gated.dtype == torch.float32


@pytest.mark.gpu
def test_the_cuda_kernels_equal_the_cpus():
    need_extension("cuda")
    r, y = draw(2, 5, 67, dtype=torch.float32), draw(2, 67, 5, dtype=torch.float32).view(2, 5, 67)
    torch.testing.assert_close(sigmoid_gate(r.cuda(), y.cuda()).cpu(), sigmoid_gate(r, y))
    torch.testing.assert_close(squared_relu(r.cuda()).cpu(), squared_relu(r))
