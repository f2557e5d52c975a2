"""What matrices give for the LayerNorm of an integer residual stream, of which they read integers q = n - c.

    z = W_g q                                      W_g = W diag(g)
    y = (z + offsets - mean ones) rstd + biases    of each row: ones = W_g 1, offsets = W_g (o + c), biases = W b
    mixed = y share + previous (1 - share)         previous: y at the real token before; share: one a row

y is W x for x = LN(n + o), so its gradients are computed as those of W x: the mean and the deviation of a token get
theirs where the LayerNorm has them. An adapter adds s B p to z, that is s B (rstd p) to y.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .backend import bind, in_dtype, product_dtype
from .packed_linear import few_rows


@dataclass(frozen=True)
class NormalisedIntegers:
    """Of n `(B, T, C)`: spikes n - c, in n's dtype; in float32, or float64 for float64, stream n + o, x its LayerNorm,
    mean and rstd `(B, T)` of it, which have no gradient; eps, what is added to its variance; and of adapters rstd
    `(B, T, 1)` with its gradient, once for all that read."""

    spikes: Tensor
    stream: Tensor
    x: Tensor
    mean: Tensor
    rstd: Tensor
    eps: float
    differentiable_rstd: Tensor | None = None

    def for_adapters(self) -> "NormalisedIntegers":
        """The same with that rstd. The mean may be without a gradient: the variance is least there."""
        variance = (self.stream - self.mean[..., None]).square().mean(dim=-1, keepdim=True)
        return replace(self, differentiable_rstd=torch.rsqrt(variance + self.eps))


@dataclass(frozen=True)
class Matrix:
    """What reads: weight W `(R, C)`; scaled W_g `(R, C)` and vectors `(3, R)`, ones, offsets and biases, neither with a
    gradient; and of an adapter passed p `(B, T, r)`, b `(R, r)` and scaling s."""

    weight: Tensor
    scaled: Tensor
    vectors: Tensor
    passed: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0


@dataclass(frozen=True)
class RowShift:
    """Token shift of rows: share, R elements; last `(B, R)`, y at the last real token so far, None: 0; mask bool
    `(B, T)`, where False the token does not exist."""

    share: Tensor
    last: Tensor | None = None
    mask: Tensor | None = None


def integer_read(n: NormalisedIntegers, matrix: Matrix, shift: RowShift | None = None) -> tuple[Tensor, Tensor]:
    """y, or where there is a shift mixed, `(B, T, R)` in what the product is computed in; and y at the last real token
    `(B, R)` in float32, or float64 for float64 (without a shift: empty). The kernels must be there; of a matrix with an
    adapter, n is what `for_adapters` gives."""
    dtype, real = product_dtype(n.spikes), n.mean.dtype
    spikes, scaled, b = (None if t is None else in_dtype(t, dtype) for t in (n.spikes, matrix.scaled, matrix.b))
    moments = n.mean, n.rstd
    after: tuple[Tensor | None, ...] = (None, None, None)
    if shift is not None:
        last = None if shift.last is None else in_dtype(shift.last, real)
        after = in_dtype(shift.share.reshape(-1), real), last, shift.mask
    if matrix.passed is None and few_rows(n.spikes):
        z = torch.ops.spikegpt_lora.packed_linear(spikes, scaled, None)
        return torch.ops.spikegpt_lora.integer_rows(z, *moments, matrix.vectors, *after)
    passed = normed = None
    if matrix.passed is not None:
        passed = in_dtype(matrix.passed, dtype)
        normed = in_dtype(matrix.passed * n.differentiable_rstd, dtype)
    x, weight = in_dtype(n.x, dtype), in_dtype(matrix.weight, dtype)
    adapter = passed, normed, b, matrix.scaling
    return torch.ops.spikegpt_lora.integer_read(spikes, scaled, matrix.vectors, x, weight, *moments, *adapter, *after)


@bind
def _bind() -> None:
    def fake(z, mean, rstd, vectors, share, *rest):
        return z.new_empty(z.shape), mean.new_empty(0 if share is None else z.shape[0], z.shape[2])

    def fake_backward(z, mean, rstd, vectors, share, *rest):
        return z.new_empty(z.shape), share.new_empty(share.shape), share.new_empty(z.shape[0], z.shape[2])

    torch.library.register_fake("spikegpt_lora::integer_rows", fake)
    torch.library.register_fake("spikegpt_lora::integer_rows_backward", fake_backward)
