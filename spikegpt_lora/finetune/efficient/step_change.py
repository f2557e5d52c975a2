"""Other forwards and tensors in modules while they train; neither their code nor the keys of state_dict change."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
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


class StepChange(TrainerCallback):
    """What changes a model's training steps: a callback of a Trainer, or in a loop of one's own:

        with change:
            change.begin(model, seed, batches)
            for step in range(steps):
                change.begin_step(step, steps)
                ...

    `begin` changes forwards of the model, `close`, the end of a training and that of a `with` block give them back. A
    Trainer tells nobody of an exception: whoever uses the model after one trains inside a `with` block, or calls
    `close()`.
    """

    shared = False  # whether several processes, each with batches of its own, change alike

    def __init__(self) -> None:
        self.opened = ExitStack()

    def begin(self, model: nn.Module, seed: int = 0, batches: Callable[[int], Iterable[Mapping]] | None = None) -> None:
        """Change `model` until it is closed; `batches(n)` gives n batches of the training data."""

    def begin_step(self, step: int, steps: int) -> None:
        """Before each optimizer step, which is number `step` of `steps`."""

    def close(self) -> None:
        """Leave the model as it was."""
        self.opened.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        if args.world_size > 1 and not self.shared:
            raise ValueError(
                f"{type(self).__name__} changes each process's step in its own way, and the others would wait for what "
                "it leaves out: train in one process"
            )
        self.close()
        self.begin(model, args.seed, partial(some_batches, train_dataloader, args.train_batch_size, args.seed))

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin_step(state.global_step, state.max_steps)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()


def some_batches(loader: DataLoader, batch_size: int, seed: int, number: int) -> Iterator[Mapping]:
    """`number` batches of what `loader` reads, drawn by `seed`; no generator of the training is asked."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(loader.dataset), generator=generator)[: number * batch_size].tolist()  # type: ignore[arg-type]
    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return iter(DataLoader(loader.dataset, batch_sampler=parts, collate_fn=loader.collate_fn, generator=generator))
