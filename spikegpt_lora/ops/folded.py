"""What is computed of weights alone, kept while they stay as they are: in evaluation it need not be computed again for
every token."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_keeping = True


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Within it nothing is kept: for whatever runs a model once on weights that are about to change, or fill memory."""
    global _keeping
    before, _keeping = _keeping, False
    try:
        yield
    finally:
        _keeping = before


class Folded:
    """A value that a function of some tensors gave, and those tensors.

    It is computed anew where one of them has been changed in place, replaced or moved; whenever a gradient is to go
    through it; and while one of them has a gradient, since torch does not count the changes of its fused optimizers. It
    holds the tensors, so that their memory is not another's meanwhile; it is neither saved nor copied with its owner.
    What is changed through `.data` is not seen: torch does not count that either.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._kept: tuple[list, list[Tensor], Any] | None = None

    def __call__(self, compute: Callable[[], Any], *sources: Tensor) -> Any:
        """`compute()`, which depends on `sources` and on nothing else that changes."""
        state = None if torch.compiler.is_compiling() or not _keeping else _state(sources)
        if state is None:
            self._kept = None
            return compute()
        kept = self._kept
        if kept is None or kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():  # else nothing could be trained with it later
                kept = self._kept = state, [source.detach() for source in sources], compute()
        return kept[2]

    def __deepcopy__(self, memo: dict) -> "Folded":
        return Folded()

    def __reduce__(self):
        return Folded, ()


def _state(sources: tuple[Tensor, ...]) -> list | None:
    """What says whether they have changed; None where nothing does, or a gradient is asked of one of them."""
    gradients, state = torch.is_grad_enabled(), []
    for source in sources:
        if source.requires_grad and (gradients or source.grad is not None):
            return None
        if type(source) not in (nn.Parameter, Tensor) or source.is_inference():
            return None
        state.append((source.data_ptr(), source._version, source.shape, source.dtype))
    return state
