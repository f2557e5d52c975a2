"""Weights as whole numbers of a few bits times one scale a row, rounded to nearest, with or without learned clipping.

    symmetric     k = floor(w / s + 1/2) in -n ... n         s = max(h, -l) / n, n = 2^(bits - 1) - 1
    zero point    k = floor(w / s + 1/2) + z in 0 ... n      s = (h - l) / n, n = 2^bits - 1, z = floor(-l / s + 1/2)
    w is replaced by s k, or s (k - z); h = upper * max w and l = lower * min w, a row (an output)

Round to nearest is upper = lower = 1. Learned clipping (OmniQuant, Shao et al. 2023, arXiv 2308.13137, eq. 2) is
upper = sigmoid(a), lower = sigmoid(b) with a, b from 4 on, trained straight through the rounding.
"""

import torch
from torch import Tensor, nn

BITS = (8, 4)
FIRST = 4.0  # a and b at first: sigmoid(4) = 0.982


def round_straight(u: Tensor) -> Tensor:
    """floor(u + 1/2), whose gradient is that of u."""
    return u + (torch.floor(u + 0.5) - u).detach()


def round_to_grid(
    weight: Tensor, bits: int, zero_point: bool = False, upper: Tensor | float = 1.0, lower: Tensor | float = 1.0
) -> Tensor:
    """The matrix `(outputs, inputs)` on its grid, in its own units; a row of zeros stays one.

    Args:
        bits: from 2 to 8.
        upper, lower: numbers or `(outputs, 1)`, see the top of this file.

    Raises:
        ValueError: other bits.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"integer weights must have 2 to 8 bits, got {bits}")
    high, low = weight.amax(1, keepdim=True) * upper, weight.amin(1, keepdim=True) * lower
    if not zero_point:
        most = 2 ** (bits - 1) - 1
        largest = torch.maximum(high, -low)
        scale = torch.where(largest > 0, largest / most, 1.0)
        return round_straight(weight / scale).clamp(-most, most) * scale
    most, high, low = 2**bits - 1, high.clamp(min=0), low.clamp(max=0)  # 0 is on every grid
    scale = torch.where(high > low, (high - low) / most, 1.0)
    zero = round_straight(-low / scale)
    return ((round_straight(weight / scale) + zero).clamp(0, most) - zero) * scale


class Clipping(nn.Module):
    """A parametrization of a linear layer's weight (`torch.nn.utils.parametrize`): the weight on a grid whose ends are
    learned. Parameters: upper, lower `(outputs, 1)`, a and b at the top of this file."""

    def __init__(self, outputs: int, bits: int, zero_point: bool = False) -> None:
        super().__init__()
        self.bits, self.zero_point = bits, zero_point
        self.upper = nn.Parameter(torch.full((outputs, 1), FIRST))
        self.lower = nn.Parameter(torch.full((outputs, 1), FIRST))

    def forward(self, weight: Tensor) -> Tensor:
        return round_to_grid(weight, self.bits, self.zero_point, self.upper.sigmoid(), self.lower.sigmoid())
