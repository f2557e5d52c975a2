"""A price on spikes: what a training adds to its loss so that matrices read fewer of them.

    loss + price * reads        reads = sum over matrices of rows sum |q| / (tokens sum of rows * inputs)

q are the integers that a matrix reads at a real token, each of which touches every row of it: so it is the share of all
weights that is read, a spike of size 2 counted twice. Straight-through gradients carry it to the neurons.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..forward import hooked
from ..ops.spike_linear import SpikeLinear


class Reads:
    """Sums over the matrices that were called since it was made."""

    def __init__(self, mask: Tensor | None = None) -> None:
        self.mask, self.touched, self.weights = mask, 0.0, 0

    def see(self, linear: SpikeLinear, inputs: tuple, kwargs: dict) -> None:
        sizes = inputs[0].abs().sum(dim=-1)  # of every token
        if self.mask is None or self.mask.shape != sizes.shape:
            size = sizes.mean()
        else:
            size = (sizes * self.mask).sum() / self.mask.sum()
        self.touched = self.touched + linear.out_features * size
        self.weights += linear.weight.numel()

    def share(self) -> Tensor | float:
        """`reads` as above, with its gradient; 0 of a model without integer spikes."""
        return self.touched / max(self.weights, 1)


@contextmanager
def seeing_reads(model: nn.Module, mask: Tensor | None) -> Iterator[Reads]:
    """What the matrices of `model` read while it is open; mask `(B, T)`, where tokens are real."""
    reads = Reads(mask)
    matrices = (module for module in model.modules() if isinstance(module, SpikeLinear))
    with hooked(matrix.register_forward_pre_hook(reads.see, with_kwargs=True) for matrix in matrices):
        yield reads
