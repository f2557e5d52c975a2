"""The spikes of the embedding: 1[E[token] >= 0], backward the ATan surrogate.

Source: SpikeGPT (Zhu, Zhao & Eshraghian 2023, section 3.2), upstream `src/model.py`.
"""

from spikingjelly.activation_based import surrogate
from torch import Tensor

from .neuron import Neuron


class EmbeddingSpike(Neuron, surrogate.ATan):
    """Spikes where a token's row of the embedding is not negative: once trained, a table of spikes.

    Args:
        alpha: sharpness of the surrogate gradient.
    """

    from_rest = True
    has_current = has_membrane = False
    op = "embed_spike"

    def step(self, x: Tensor, membrane: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, None]:
        spikes = self(x)  # through __call__: hooks must see them
        return spikes if mask is None else spikes * mask[..., None], None
