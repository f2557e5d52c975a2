"""Some half-blocks skip their backward: the forward is exact, and what is left out is their gradient.

    x + f(x)        dropped in a step:  gradient of x + stop(f(x)), so adapters in f learn nothing from that step

Which ones is drawn anew each step, the same number each time, so that every step takes the same time. Source: DropBP
(Woo et al. 2024, arXiv 2402.17812), whose shares differ by layer by a measured sensitivity; here all are alike.
"""

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ...model import Block
from .step_change import StepChange, own_forward

# What is added to the residual stream, by the names in a block: SpikeGPT, Llama, GPT-2.
HALVES = (("att", "ffn"), ("self_attn", "mlp"), ("attn", "mlp"))


class DropBackward(StepChange):
    """A Trainer's callback, see the top of this file.

    Args:
        p: share of the half-blocks whose backward a step leaves out, in [0, 1].
        modules: regular expression of their names; None: both halves of every block of SpikeGPT, Llama or GPT-2. Each
            must be what a residual stream adds: `x + module(x)`.

    Raises:
        ValueError: p out of range. When the training begins: a model without half-blocks that are known; several
            processes, where one would wait for another's gradients.
    """

    def __init__(self, p: float, modules: str | None = None) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p, the share of half-blocks without a backward, must be in [0, 1], got {p}")
        self.p, self.modules = p, modules
        self.dropped: frozenset[nn.Module] = frozenset()
        self.halves: list[nn.Module] = []

    def begin(self, model, seed=0, batches=None):
        self.seed, self.halves = seed, half_blocks(model, self.modules)
        for half in self.halves:
            self.opened.enter_context(own_forward(half, partial(self._forward, half, half.forward)))

    def begin_step(self, step, steps):
        order = torch.randperm(len(self.halves), generator=torch.Generator().manual_seed(1_000_003 * self.seed + step))
        self.dropped = frozenset(self.halves[i] for i in order[: round(self.p * len(self.halves))])

    def _forward(self, half: nn.Module, whole: Callable, *args, **kwargs):
        if not (half.training and half in self.dropped):
            return whole(*args, **kwargs)
        with torch.no_grad():
            return whole(*args, **kwargs)


def half_blocks(model: nn.Module, modules: str | None = None) -> list[nn.Module]:
    """What the residual stream of `model` adds, in order; raises ValueError where nothing is known or matched."""
    if modules is not None:
        found = [module for path, module in model.named_modules() if re.fullmatch(modules, path)]
        said = f"no module's name matches {modules!r}"
    else:
        found = [half for module in model.modules() for half in _halves(module)]
        said = f"{type(model).__name__} has no half-blocks that are known: name them with modules=a regular expression"
    if not found:
        raise ValueError(f"DropBackward: {said}")
    return found


def _halves(module: nn.Module) -> list[nn.Module]:
    children = dict(module.named_children())
    for names in HALVES:
        if all(name in children for name in names) and (isinstance(module, Block) or "att" not in names):
            return [children[name] for name in names]
    return []
