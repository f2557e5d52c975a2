"""What every neuron of this package answers for itself, so that nobody who looks on asks which kind it is.

A new neuron is a file of this folder, and a method of the exported graph's interpreter if it is to be exported.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor, nn


class Neuron(nn.Module, ABC):
    """A population of neurons; `forward` returns their spikes alone, so that hooks see them whoever runs the model.

    levels: the values that a spike can have, whole numbers in rising order.
    graded: what is passed on is spike times current, not the spike.
    from_rest: every token is a first step from rest; nothing is remembered from one to the next.
    has_current: it integrates a current; of what is not, a row of a table, an observer records none and counts none.
    has_membrane: with `store_v_seq = True` each call leaves `v_seq` `(B, T, C)`, the membrane after each token.
    op: the operation of the exported graph that does what it does.
    """

    levels: tuple[int, ...] = (0, 1)
    graded: bool = False
    from_rest: bool = False
    has_current: bool = True
    has_membrane: bool = True
    op: str
    store_v_seq: bool  # of those that have a membrane

    @abstractmethod
    def step(
        self, x: Tensor, membrane: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run the neurons over a stretch of tokens.

        Args:
            x: input current `(B, T, C)`, floating point.
            membrane: `(B, C)`, the membrane after the previous stretch; None means at rest.
            mask: bool `(B, T)`; where False the time step does not exist: no spike, membrane carried, no gradient.

        Returns:
            spikes `(B, T, C)` in x's dtype, and the membrane `(B, C)` after the last real step (float32, or float64
            for float64 input); None of a neuron that remembers nothing.
        """

    def node(self) -> dict:
        """The settings that graph.json holds for it: plain numbers and lists.

        Raises:
            ValueError: no operation of the graph does what it does; the message goes on from the neuron's name.
        """
        return {} if self.levels == (0, 1) else {"levels": list(self.levels)}


def neurons_of(model: nn.Module) -> Iterator[tuple[str, Neuron]]:
    """Every neuron of `model` with its path in it, in the order in which they are registered."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Neuron))
