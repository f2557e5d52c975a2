"""What reads the integer residual: kernel against plain torch, and both against the LayerNorm that it stands for."""

import pytest
import torch
from helpers import need_extension

from spikegpt_lora.neurons.residual import IntegerNorm
from spikegpt_lora.ops.backend import default_backend
from spikegpt_lora.ops.integer_read import RowShift
from spikegpt_lora.ops.spike_linear import SpikeLinear
from spikegpt_lora.ops.token_shift import token_shift_reference

SHAPES = [(1, 1, 1, 1), (1, 1, 70, 3), (3, 33, 17, 5), (2, 9, 13, 600)]  # B, T, C, rows


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def a_reader(shape, dtype, with_last, with_mask):
    """n, norm, two matrices, and of each the token shift of its rows."""
    B, T, C, R = shape
    norm, linears = IntegerNorm(C), [SpikeLinear(C, R), SpikeLinear(C, R)]
    with torch.no_grad():
        for seed, p in enumerate([*norm.parameters(), *(linear.weight for linear in linears)]):
            p.copy_(draw(*p.shape, seed=seed))
        norm.centre.copy_((3 * draw(C, seed=8)).round())
    norm, linears = norm.to(dtype), [linear.to(dtype) for linear in linears]
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.7 if with_mask else None
    lasts = [draw(B, R, seed=s, dtype=dtype).requires_grad_() if with_last else None for s in (9, 10)]
    shifts = [
        RowShift(draw(1, 1, R, seed=s, dtype=dtype).requires_grad_(), last, mask) for s, last in zip((4, 5), lasts)
    ]
    return (4 * draw(B, T, C, seed=7)).round().to(dtype).requires_grad_(), norm, linears, shifts


def results(backend, reader, mixed=True):
    """Rows, the rows of the last tokens, and the gradient of everything."""
    n, norm, linears, shifts = reader
    with default_backend(backend):
        if mixed:
            out = [t for pair in norm.read_mixed(n, linears, shifts) for t in pair]
        else:
            out = norm.read(n, *linears)
    leaves = [n, *norm.parameters(), *(linear.weight for linear in linears)]
    if mixed:
        leaves += [t for shift in shifts for t in (shift.share, shift.last) if t is not None]
    weights = [draw(*t.shape, seed=s).to(t) for s, t in enumerate(out)]
    return [t.detach() for t in out], torch.autograd.grad(out, leaves, weights)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("with_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_mixed_rows_are_the_references_in_values_and_every_gradient(dtype, shape, with_last, with_mask):
    need_extension()
    reader = a_reader(shape, dtype, with_last, with_mask)
    ours, theirs = (results(backend, reader) for backend in ("extension", "reference"))
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-3, "atol": 5e-3}
    torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_that_are_not_mixed_are_the_references_too_and_what_the_matrix_gives_for_the_norm(shape):
    need_extension()
    n, norm, linears, _ = reader = a_reader(shape, torch.float64, False, False)
    ours, theirs = (results(backend, reader, mixed=False) for backend in ("extension", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    normalised = norm(n)
    torch.testing.assert_close(ours[0], [linear(normalised) for linear in linears], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("with_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_after_the_product_the_kernels_values_are_plain_torchs_bit_for_bit(dtype, with_last, with_mask):
    need_extension()
    B, T, R = 3, 33, 70
    z, moments, vectors = draw(B, T, R, dtype=dtype), draw(2, B, T, dtype=dtype), draw(3, R, dtype=dtype)
    share, last = draw(R, seed=1, dtype=dtype), draw(B, R, seed=2, dtype=dtype) if with_last else None
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.7 if with_mask else None
    mean, rstd = moments.unsqueeze(-1)
    rows = (z + vectors[1] - mean * vectors[0]) * rstd + vectors[2]
    ours, _ = torch.ops.spikegpt_lora.integer_rows(z, *moments, vectors, None, None, None)
    assert torch.equal(ours, rows)
    ours = torch.ops.spikegpt_lora.integer_rows(z, *moments, vectors, share, last, mask)
    assert all(map(torch.equal, ours, token_shift_reference(rows, last, mask, share)))


def test_gradcheck_of_everything_that_is_read(backend):
    n, norm, linears, shifts = a_reader((2, 4, 3, 2), torch.float64, True, True)
    own = [p.detach().requires_grad_() for p in (*norm.parameters(), *(linear.weight for linear in linears))]
    names = ["weight", "bias", "offset"]
    modules = [*((norm, name) for name in names), *((linear, "weight") for linear in linears)]

    def read(n, *leaves):
        held = leaves[: len(modules)]
        for (module, name), value in zip(modules, held):
            module._parameters[name] = value
        mixes = [RowShift(share, last, shifts[0].mask) for share, last in zip(leaves[-4:-2], leaves[-2:])]
        return [t for pair in norm.read_mixed(n, linears, mixes) for t in pair]

    given = [*own, *(shift.share for shift in shifts), *(shift.last for shift in shifts)]
    with default_backend("reference"):  # what the kernel is compared with above
        assert torch.autograd.gradcheck(read, (n, *given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_the_kernel_is_near_the_reference_in_float64(dtype):
    need_extension()
    reader = a_reader((3, 33, 17, 5), dtype, True, True)
    with torch.no_grad():
        exact = a_reader((3, 33, 17, 5), torch.float64, True, True)
        pairs = zip(
            [*reader[1].parameters(), *(x.weight for x in reader[2])],
            [*exact[1].parameters(), *(x.weight for x in exact[2])],
        )
        for half, double in pairs:
            double.copy_(half)
    (ours, gradients), (theirs, _) = results("extension", reader), results("reference", exact)
    assert [t.dtype for t in ours] == 2 * [dtype, torch.float32]
    torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=0.3, check_dtype=False)
    assert all(gradient.isfinite().all() and gradient.dtype == dtype for gradient in gradients)


def test_under_autocast_rows_are_in_its_dtype_and_those_that_are_kept_in_float32():
    need_extension()
    n, norm, linears, shifts = a_reader((3, 33, 17, 5), torch.float32, True, True)
    exact = [t for pair in norm.read_mixed(n, linears, shifts) for t in pair]
    with torch.autocast("cpu", torch.bfloat16):
        ours = [t for pair in norm.read_mixed(n, linears, shifts) for t in pair]
    assert [t.dtype for t in ours] == 2 * [torch.bfloat16, torch.float32]
    torch.testing.assert_close(ours, exact, rtol=5e-2, atol=0.3, check_dtype=False)


def test_where_somebody_looks_on_the_matrix_is_called_with_the_integers_and_gives_the_same(backend):
    n, norm, linears, shifts = a_reader((2, 9, 13, 6), torch.float64, True, True)
    expected, seen = norm.read_mixed(n, linears, shifts), []
    linears[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.testing.assert_close(norm.read_mixed(n, linears, shifts), expected, rtol=1e-9, atol=1e-9)
    assert len(seen) == 1 and torch.equal(seen[0], n - norm.centre) and torch.equal(seen[0], seen[0].round())


@pytest.mark.gpu
def test_on_cuda_it_is_the_cpus():
    need_extension("cuda")
    reader = a_reader((3, 33, 17, 5), torch.float32, False, True)
    ours = results("extension", reader)
    n, norm, linears, shifts = reader
    moved = [RowShift(s.share.detach().cuda().requires_grad_(), None, s.mask.cuda()) for s in shifts]
    theirs = results("extension", (n.detach().cuda().requires_grad_(), norm.cuda(), [x.cuda() for x in linears], moved))
    torch.testing.assert_close(ours[0], [t.cpu() for t in theirs[0]], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(list(ours[1]), [t.cpu() for t in theirs[1]], rtol=2e-3, atol=5e-3)


def test_a_mask_without_a_shift_is_refused():
    need_extension()
    z, one = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="give them together with share"):
        torch.ops.spikegpt_lora.integer_rows(z, one, one, torch.zeros(3, 4), None, None, torch.ones(2, 3).bool())
