"""Other forwards and other tensors in modules for a while: neither their code nor the keys of state_dict change."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from transformers import TrainerCallback


@contextmanager
def own_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """While it is open, calling `module` runs `forward`."""
    before = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before  # type: ignore[method-assign]


@contextmanager
def swapped(values: Iterable[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """While it is open, these modules' parameters, buffers, modules or attributes of these names are these values."""
    before: list[tuple[dict, str, Any]] = []
    try:
        for module, name, value in values:
            holder = _holder(module, name)
            before.append((holder, name, holder[name]))
            holder[name] = value
        yield
    finally:
        for holder, name, value in reversed(before):
            holder[name] = value


def _holder(module: nn.Module, name: str) -> dict:
    places: tuple[dict, ...] = (module._parameters, module._buffers, module._modules, module.__dict__)
    return next(held for held in places if name in held)


class Opened(TrainerCallback):
    """A callback that changes a model's forwards while it trains: from on_train_begin to on_train_end, or to the end of
    a `with` block, which is left after an exception too. Whoever trains the model after an exception without one calls
    `close()` first."""

    def __init__(self) -> None:
        self.opened = ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Leave the model as it was."""
        self.opened.close()

    def on_train_end(self, args, state, control, **kwargs):
        self.close()
