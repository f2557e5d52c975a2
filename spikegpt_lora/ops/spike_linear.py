"""The linear layer that reads integer spikes: y = W diag(s) q.

q are integers, so on a chip that holds W diag(s) every product is an addition, or a few of bit planes; s is what one
spike of each channel stands for: the scale of the neuron that sent it, or the gain of a norm.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class SpikeLinear(nn.Linear):
    """nn.Linear without bias whose columns are scaled when it is called; hooks on it see the integers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, spikes: Tensor, scale: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """q `(..., inputs)`, scale s `(inputs,)` (None: 1) -> `(..., outputs)`."""
        return F.linear(spikes, self.weight if scale is None else self.weight * scale)
