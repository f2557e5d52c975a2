"""Looking on at a forward from outside: in evaluation mode, with hooks that go again, over real tokens only."""

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .model import SpikeGPTModel
from .neurons.lif import real_steps_first

READ = ("input_ids", "attention_mask", "inputs_embeds")  # what a SpikeGPT reads of a batch


def token_model(model: nn.Module) -> nn.Module:
    """The part of `model` whose forward is given tokens and mask: the SpikeGPTModel inside, or `model` itself."""
    return next((m for m in model.modules() if isinstance(m, SpikeGPTModel)), model)


def bound_arguments(model: nn.Module, args: tuple, kwargs: dict) -> dict:
    """What a forward was called with, by name."""
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    return {**given, **given.get("kwargs", {})}


def tokens_of(given: Mapping) -> Tensor | None:
    """Of a batch, or of what a forward was given: its ids `(B, T)` or embeddings `(B, T, C)`; None without either."""
    return next((given[key] for key in ("input_ids", "inputs_embeds") if given.get(key) is not None), None)


def real_first(batch: Mapping) -> tuple[Tensor, Tensor]:
    """Where `batch` has real tokens, bool `(B, T)`, and the places `(B, longest)` that put them first; on the CPU."""
    mask = batch.get("attention_mask")
    mask = torch.ones(cast(Tensor, tokens_of(batch)).shape[:2]).bool() if mask is None else mask.bool().cpu()
    return mask, real_steps_first(mask)[:, : int(mask.sum(1).max())]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module, not just the whole, is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """While it is open, hooks stand whose handles `handles` gives, each as it is attached; afterwards they are gone,
    also after an exception, and where not all could be attached."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def run(model: nn.Module, batch: Mapping, keys: Collection[str] = READ) -> Any:
    """What `model` gives for `batch`, in evaluation mode and without gradient, on the device that it is on.

    Args:
        keys: of `batch`, what the forward is given; those that it does not hold are left out.
    """
    device = next(model.parameters(), torch.empty(0)).device
    given = {key: batch[key] for key in keys if key in batch}
    with evaluating(model):
        return model(**{key: x.to(device) if isinstance(x, Tensor) else x for key, x in given.items()})


class RealTokens:
    """Knows which tokens of the forward now running are real, and which modules it has called already."""

    def __init__(self, model: nn.Module):
        self.model = token_model(model)
        self.mask: Tensor | None = None  # (B, T); None: everything is real
        self.called: set[str] = set()

    def attach(self) -> RemovableHandle:
        """Begin; returns the handle of the hook."""
        return self.model.register_forward_pre_hook(self._start, with_kwargs=True)

    def _start(self, model, args, kwargs):
        given = bound_arguments(model, args, kwargs)
        self.mask, tokens = given.get("attention_mask"), tokens_of(given)
        if self.mask is None and tokens is not None:
            self.mask = tokens.new_ones(tokens.shape[:2])
        if self.mask is not None:
            self.mask = self.mask.bool()
        self.called.clear()

    def first(self, name: str) -> bool:
        """Whether this is `name`'s first call in this forward."""
        new = name not in self.called
        self.called.add(name)
        return new

    def real(self, x: Tensor) -> Tensor | None:
        """x `(B, T, d)` in float64, 0 where there is no token (so that sums are over real ones, without waiting for the
        device); None where x holds no tokens."""
        if self.mask is not None and x.shape[:-1] != self.mask.shape:
            return None
        return x.detach().double() if self.mask is None else x.detach().double() * self.mask[..., None]

    def count(self, x: Tensor) -> Tensor:
        """How many real tokens x holds."""
        return x.new_full((), x[..., 0].numel(), dtype=torch.float64) if self.mask is None else self.mask.sum()
