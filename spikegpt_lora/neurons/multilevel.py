"""Neurons with integer spikes, what a matrix reads where `SpikeGPTConfig.matrix_spikes` is "integer".

    u = x / s                       s > 0: what one spike stands for, learned, a channel
    k = floor(u + 1/2) in -K ... K  it fires its k-th spike at u = k - 1/2; one-sided: in 0 ... K
    sent is k, or k^2 ("squared", as relu(x)^2 grows), and the matrix that reads it holds s, or s^2: see `SpikeLinear`

Backward, straight through the rounding: dk/du = 1 between the outermost levels' half steps and 0 beyond. With s in the
matrix as well, its gradient is that of a learned step size, (k - u) or, beyond, k (LSQ, Esser et al. 2020, arXiv
1902.08153, eq. 3).

In neuromorphic terms k is the sign and number of spikes of a population: one memoryless LIF a level. Source: the
generalised integrate-and-fire neuron of SpikeLLM (Xing et al. 2024, arXiv 2407.04752, section 3.1).
"""

import torch
from torch import Tensor, nn

from ..ops.folded import Folded
from ..ops.integer_spikes import integer_spikes
from .neuron import Neuron

MOST = 127  # the largest K: a spike is one byte


class IntegerSpikes(Neuron):
    """Integer spikes of `channels` neurons without memory.

    With `silent = True` nothing is rounded: u, or where squared max(u, 0)^2, is passed on as it is, so that what the
    spikes cost can be measured, and scales be fitted.

    Parameters and buffers: log_scale `(channels,)`, the logarithm of s; most `(channels,)`, K of each channel.

    Args:
        channels: C.
        most: K, the same for all channels.
        signed: levels -K ... K; else 0 ... K.
        squared: k^2 is sent; not with `signed`.
        scale: s at first.

    Raises:
        ValueError: K is not in 1 ... 127, or signed squares.
    """

    op = "integer_spikes"
    from_rest = True
    has_membrane = False
    most: Tensor

    def __init__(
        self, channels: int, most: int, signed: bool = True, squared: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__()
        if not 1 <= most <= MOST:
            raise ValueError(f"the largest spike must be in 1 ... {MOST}, got {most}")
        if signed and squared:
            raise ValueError("squared spikes have no sign: give signed=False")
        self.signed, self.squared, self.initial = signed, squared, (scale, most)
        self.silent = False
        self.folded = Folded()
        self.log_scale = nn.Parameter(torch.empty(channels))
        self.register_buffer("most", torch.empty(channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every s and K as given at first."""
        scale, most = self.initial
        self.log_scale.copy_(torch.full_like(self.log_scale, scale).log())
        self.most.fill_(most)

    @property
    def levels(self) -> tuple[int, ...]:  # type: ignore[override]
        most = int(self.most.max())
        counts = range(-most if self.signed else 0, most + 1)
        return tuple(k * k for k in counts) if self.squared else tuple(counts)

    @property
    def scale(self) -> Tensor:
        """What the matrix multiplies a sent integer by, `(channels,)`: s, or s^2 of a squared one. The same tensor
        while log_scale stays as it is and no gradient goes through it."""
        return self.folded(lambda: (self.log_scale * 2 if self.squared else self.log_scale).exp(), self.log_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Integers of x's shape and dtype for the current x `(..., channels)`."""
        if self.silent:
            u = x / self.log_scale.exp()
            u = u if self.signed else u.relu()
            return (u * u if self.squared else u).to(x.dtype)
        return integer_spikes(x, self.log_scale, self.most, self.signed, self.squared)

    def step(self, x: Tensor, membrane: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, None]:
        spikes = self(x)  # through __call__: hooks must see them
        return spikes if mask is None else spikes * mask[..., None], None

    def node(self) -> dict:
        return {
            "scale": self.log_scale.exp().tolist(),
            "most": [int(k) for k in self.most.tolist()],
            "signed": self.signed,
            "squared": self.squared,
        } | super().node()

    def extra_repr(self) -> str:
        return f"{len(self.most)}, levels={self.levels}"
