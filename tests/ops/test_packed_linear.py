"""Linear layers with packed matrices: kernel and reference, both against float64, and what is refused."""

import pytest
import torch
from helpers import need_extension

from spikegpt_lora.ops.packed_linear import FEW, packed_linear


def packed(kind, outputs, inputs, seed=0):
    """A matrix of this kind, and its scale."""
    generator = torch.Generator().manual_seed(seed)
    if kind == torch.int8:
        weight = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
        return weight, 0.1 + torch.rand(outputs, generator=generator)
    return torch.randn(outputs, inputs, generator=generator).to(kind), None


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


KINDS = pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int8], ids=str)


@KINDS
@pytest.mark.parametrize("rows", range(1, 10))
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 32), (70, 33), (129, 200)], ids=str)
@pytest.mark.parametrize("backend", ["extension", "reference"])
def test_a_product_is_that_of_the_unpacked_matrix(kind, rows, shape, backend):
    if backend == "extension":
        need_extension()
    (weight, scale), x = packed(kind, *shape), drawn(rows, shape[1])
    exact = x.double() @ weight.double().T * (1 if scale is None else scale.double())
    size = x.double().abs() @ weight.double().abs().T * (1 if scale is None else scale.double())
    y = packed_linear(x, weight, scale, backend=backend)
    assert y.dtype == torch.float32 and bool(((y - exact).abs() <= 1e-6 * size).all())


@KINDS
@pytest.mark.parametrize("shape", [(96,), (1, 1, 96), (2, 3, 96), (0, 96)], ids=str)
def test_every_number_of_dimensions_is_kept(kind, shape):
    need_extension()
    (weight, scale), x = packed(kind, 7, 96), drawn(*shape)
    y = packed_linear(x, weight, scale, backend="extension")
    assert y.shape == (*shape[:-1], 7)
    torch.testing.assert_close(y, packed_linear(x, weight, scale, backend="reference"), rtol=1e-4, atol=1e-3)


@KINDS
def test_what_is_not_contiguous_is_read_where_it_is(kind):
    need_extension()
    weight, scale = packed(kind, 7, 80)
    weight, x = weight[:, ::2], drawn(40, 3).T
    y = packed_linear(x, weight, scale, backend="extension")
    assert torch.equal(y, packed_linear(x.contiguous(), weight.contiguous(), scale, backend="extension"))


@KINDS
def test_neither_rows_nor_threads_change_a_row(kind):
    need_extension()
    (weight, scale), x = packed(kind, 1000, 200), drawn(9, 200)
    together = packed_linear(x, weight, scale, backend="extension")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([packed_linear(row, weight, scale, backend="extension") for row in x.split(1)])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, alone)


def test_a_number_that_is_not_finite_reaches_its_row_alone():
    need_extension()
    (weight, scale), x = packed(torch.int8, 5, 40), drawn(3, 40)
    x[1, 33] = torch.nan
    y = packed_linear(x, weight, scale, backend="extension")
    assert y.isfinite().all(dim=1).tolist() == [True, False, True]


def test_many_rows_are_those_of_the_reference():
    (weight, scale), x = packed(torch.int8, 5, 40), drawn(FEW + 1, 40)
    assert torch.equal(packed_linear(x, weight, scale), packed_linear(x, weight, scale, backend="reference"))


REFUSED = {
    "x": ({"x": drawn(1, 3).double()}, "x must be float32, got"),
    "inputs": ({"x": drawn(1, 4)}, r"x must be \(..., 3\), got \(1, 4\)"),
    "number": ({"x": torch.tensor(1.0)}, r"x must be \(..., 3\), got \(\)"),
    "weight": ({"weight": drawn(3)}, r"weight must be \(outputs, inputs\), got \(3,\)"),
    "kind": ({"weight": drawn(2, 3).half()}, "weight must be float32, bfloat16 or int8, got Half"),
    "scale": ({"scale": torch.ones(3)}, r"scale must be \(2,\) for input \(1, 3\), got \(3,\)"),
    "scale's kind": ({"scale": torch.ones(2).double()}, "scale must be Float for Float input, got Double"),
}


@pytest.mark.parametrize("changes, message", REFUSED.values(), ids=REFUSED)
def test_what_the_kernel_refuses(changes, message):
    need_extension()
    with pytest.raises(ValueError, match=message):
        packed_linear(**{"x": drawn(1, 3), "weight": drawn(2, 3)} | changes, backend="extension")


def test_the_reference_refuses_another_dtype_too():
    with pytest.raises(ValueError, match="x must be float32, got torch.float64"):
        packed_linear(drawn(1, 3).double(), drawn(2, 3), backend="reference")


def test_a_gradient_is_refused():
    x = drawn(1, 3).requires_grad_()
    with pytest.raises(ValueError, match="packed weights have no gradient"):
        packed_linear(x, drawn(2, 3))
    with torch.no_grad():
        assert packed_linear(x, drawn(2, 3)).shape == (1, 2)


def test_a_device_without_kernel_is_refused_where_the_kernel_is_asked_for():
    with pytest.raises(ValueError, match="has a kernel for the CPU alone, got an input on meta"):
        packed_linear(torch.empty(1, 3, device="meta"), torch.empty(2, 3, device="meta"), backend="extension")


@KINDS
def test_torch_accepts_it_as_an_operator(kind):
    need_extension()
    tests = ("test_schema", "test_faketensor")  # it has no gradient
    torch.library.opcheck(
        torch.ops.spikegpt_lora.packed_linear, (drawn(2, 1, 40), *packed(kind, 7, 40)), test_utils=tests
    )
