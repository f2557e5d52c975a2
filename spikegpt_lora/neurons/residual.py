"""The integer residual stream: what blocks add are spikes, so with an integer in place of ln0 all of it is integers.

    n = round(a) 1[E[token] >= 0] + spikes of every LIF so far             `IntegerAmplitude`; a: a channel
    W LN(n + o) = (W_g (n - c) + W_g (o + c) - mean W_g 1) / deviation + W b       W_g = W diag(g); `IntegerNorm`

So a matrix behind a LayerNorm reads the integers n - c themselves, exactly, and what is real-valued comes after it: two
numbers a token (mean and deviation of n + o) and three a row of W. c, integers a channel, changes nothing but how many
of the integers are 0.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.backend import in_dtype, untouched, use_extension
from ..ops.integer_read import Matrix, NormalisedIntegers, RowShift, integer_read
from ..ops.spike_linear import SpikeLinear
from ..ops.token_shift import token_shift


class IntegerAmplitude(nn.Module):
    """round(a) times the embedding's spikes, a `(C,)` learned, straight through its rounding. With `silent = True` a is
    not rounded."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.silent = False
        self.amplitude = nn.Parameter(torch.empty(channels))

    def forward(self, spikes: Tensor) -> Tensor:
        a = self.amplitude
        return spikes * (a if self.silent else a + (torch.floor(a + 0.5) - a).detach()).to(spikes.dtype)


class IntegerNorm(nn.LayerNorm):
    """LayerNorm of n + o for integers n `(..., C)`; called it gives LN(n + o).

    Parameters and buffers beside weight g and bias b: offset o and centre c, `(C,)` both; c holds integers.
    """

    centre: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps=eps)
        self.offset = nn.Parameter(torch.empty(channels))
        self.register_buffer("centre", torch.empty(channels))

    def forward(self, n: Tensor) -> Tensor:
        return super().forward(n + self.offset)

    def read(self, n: Tensor, *linears: nn.Module) -> list[Tensor]:
        """W LN(n + o) of each of `linears`, `(..., rows)`.

        They are called with the integers n - c, and g as their scale (see `SpikeLinear`); or where nobody looks on the
        kernels do what they would.
        """
        return [rows for rows, _ in self._read(n, linears, [None] * len(linears))]

    def read_mixed(self, n: Tensor, linears: Sequence[nn.Module], shifts: Sequence[RowShift]) -> list[tuple]:
        """Of each of `linears` its rows as `read` gives them, mixed as its shift says, `(B, T, rows)`; and the rows
        before they are mixed at the last real token, `(B, rows)`."""
        return self._read(n, linears, shifts)

    def _read(self, n, linears, shifts):
        if n.dim() == 3 and use_extension("auto", n.device):
            normalised = self._normalise(n)
            matrices = [self._matrix(linear, normalised.spikes) for linear in linears]
            if any(matrix is not None and matrix.passed is not None for matrix in matrices):
                normalised = normalised.for_adapters()
        else:
            normalised, matrices = None, [None] * len(linears)
        read, reference = [], None
        for linear, matrix, shift in zip(linears, matrices, shifts):
            if matrix is not None:
                read.append(integer_read(normalised, matrix, shift))
                continue
            reference = reference or self._moments(n)
            rows = self._rows(linear, *reference)
            read.append((rows, None) if shift is None else token_shift(rows, shift.last, shift.mask, shift.share))
        return read

    def _moments(self, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """n - c, and mean and 1 / deviation of n + o, `(..., 1)`."""
        variance, mean = torch.var_mean(n + self.offset, dim=-1, correction=0, keepdim=True)
        return n - self.centre, mean, torch.rsqrt(variance + self.eps)

    def _rows(self, linear: nn.Module, spikes: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        """The equations at the top of this file in plain torch: the definition that the kernel is compared with."""
        ones, offsets, biases = self._vectors(cast(Tensor, linear.weight))
        return (linear(spikes, scale=self.weight) + offsets - mean * ones) * rstd + biases

    def _vectors(self, weight: Tensor) -> Tensor:
        """W_g 1, W_g (o + c) and W b, `(3, rows)`."""
        by = torch.stack([self.weight, self.weight * (self.offset + self.centre), self.bias])
        return F.linear(by, weight.to(by.dtype))

    def _normalise(self, n: Tensor) -> NormalisedIntegers:
        real = torch.promote_types(n.dtype, torch.float32)
        gain, bias, offset = (in_dtype(p, real) for p in (self.weight, self.bias, self.offset))
        stream = in_dtype(n, real) + offset
        x, mean, rstd = torch.native_layer_norm(stream, n.shape[-1:], gain, bias, self.eps)
        moments = mean.detach().squeeze(-1), rstd.detach().squeeze(-1)
        return NormalisedIntegers(n - in_dtype(self.centre, n.dtype), stream, x, *moments, self.eps)

    def _matrix(self, linear: nn.Module, spikes: Tensor) -> Matrix | None:
        """What the kernels read of `linear`; None where it must be called."""
        if untouched(linear, SpikeLinear):
            adapter, base = (), cast(SpikeLinear, linear)
        elif (found := getattr(linear, "spike_parts", lambda x: None)(spikes)) is not None:
            base, *adapter = found
        else:
            return None
        return Matrix(base.weight, *self.folded(base, torch.promote_types(spikes.dtype, torch.float32)), *adapter)

    def folded(self, linear: SpikeLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W_g, and its vectors `(3, rows)` in dtype; neither has a gradient, which goes another way."""

        def fold():
            with torch.no_grad():
                return weight * self.weight, in_dtype(self._vectors(weight), dtype)

        weight = cast(Tensor, linear._parameters["weight"])
        return linear.folded(fold, weight, *cast(dict, self._parameters).values(), self.centre)
