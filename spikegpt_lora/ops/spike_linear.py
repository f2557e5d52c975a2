"""The linear layer that reads integer spikes: y = W diag(s) q.

q are integers, so on a chip that holds W diag(s) every product is an addition, or a few of bit planes; s is what one
spike of each channel stands for: the scale of the neuron that sent it, or the gain of a norm.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .folded import Folded
from .packed_linear import few_rows


class SpikeLinear(nn.Linear):
    """nn.Linear without bias whose columns are scaled when it is called; hooks on it see the integers.

    W diag(s) is kept while no gradient goes through it and neither changes; for a few rows of spikes it is read by the
    kernel of `packed_linear`.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.folded = Folded()

    def forward(self, spikes: Tensor, scale: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """q `(..., inputs)`, scale s `(inputs,)` (None: 1) -> `(..., outputs)`."""
        weight = self.weight if scale is None else self.scaled(scale)
        if few_rows(spikes) and weight.dtype == torch.float32:
            return torch.ops.spikegpt_lora.packed_linear(spikes, weight, None)
        return F.linear(spikes, weight)

    def scaled(self, scale: Tensor) -> Tensor:
        """W diag(s)."""
        own = self._parameters.get("weight")  # as an attribute it takes as long as a small kernel
        weight = self.weight if own is None else own  # a parametrization computes it
        return self.folded(lambda: weight * scale, weight, scale)

    def _apply(self, *args, **kwargs):
        self.folded.clear()
        return super()._apply(*args, **kwargs)
