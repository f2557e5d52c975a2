"""The integer residual stream: what blocks add are spikes, so with an integer in place of ln0 all of it is integers.

    n = round(a) 1[E[token] >= 0] + spikes of every LIF so far             `IntegerAmplitude`; a: a channel
    W LN(n + o) = (W_g (n - c) + W_g (o + c) - mean W_g 1) / deviation + W b       W_g = W diag(g); `IntegerNorm`

So a matrix behind a LayerNorm reads the integers n - c themselves, exactly, and what is real-valued comes after it: two
numbers a token (mean and deviation of n + o) and three a row of W. c, integers a channel, changes nothing but how many
of the integers are 0.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
        """W LN(n + o) of each of `linears`, `(..., rows)`; they are called with the integers n - c, and g as their
        scale (see `SpikeLinear`)."""
        x = n + self.offset
        variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
        rstd, spikes = torch.rsqrt(variance + self.eps), n - self.centre
        vectors = torch.stack([self.weight, self.weight * (self.offset + self.centre), self.bias])
        read = []
        for linear in linears:
            ones, offsets, biases = F.linear(vectors, cast(Tensor, linear.weight).to(vectors.dtype))
            product = linear(spikes, scale=self.weight)
            read.append((product + offsets - mean * ones) * rstd + biases)
        return read
