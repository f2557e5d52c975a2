"""Looking on at a forward from outside: what it was given, and which of its tokens are real."""

import inspect

import torch
from torch import Tensor, nn

from .model import SpikeGPTModel


def reader_of(model: nn.Module) -> nn.Module:
    """The part of `model` whose forward is given tokens and mask: the SpikeGPTModel inside, or `model` itself."""
    return next((m for m in model.modules() if isinstance(m, SpikeGPTModel)), model)


def bound_arguments(model: nn.Module, args: tuple, kwargs: dict) -> dict:
    """What a forward was called with, by name."""
    given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
    return {**given, **given.get("kwargs", {})}


class Reader:
    """Knows which tokens of the forward now running are real, and which modules it has called already."""

    def __init__(self, model: nn.Module):
        self.model = reader_of(model)
        self.mask: Tensor | None = None  # (B, T); None: everything is real
        self.called: set[str] = set()

    def attach(self):
        """Begin; returns the handle of the hook."""
        return self.model.register_forward_pre_hook(self._start, with_kwargs=True)

    def _start(self, model, args, kwargs):
        given = bound_arguments(model, args, kwargs)
        tokens = next((given[key] for key in ("input_ids", "inputs_embeds") if given.get(key) is not None), None)
        self.mask = given.get("attention_mask")
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
