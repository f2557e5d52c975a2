"""Measures what adapters do while a model reads, by forward hooks that are removed afterwards.

Counts stay on the device until they are asked for, so looking on costs no synchronisation. Only real tokens count, over
everything that is read (the authors' library reports the last batch only, padding included). Of a module that one
forward calls twice, the first call counts: DeBERTa calls its projections again on relative positions, no tokens.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adapters.convolution import CONVOLUTIONS, channels_last
from ..adapters.gate import SpikeGate, gates_of, mean
from ..forward import RealTokens, hooked


@dataclass
class AdapterActivity:
    """What a model's active adapters did over all real tokens that it read.

    sparsity: share of gate outputs that are silent; dead_ranks: share of rank units that never fired; both None without
    spiking gates. contribution: norm of what the adapters add over the norm of W0 x, both over all adapted modules and
    real tokens; None where W0 x is 0, or was not looked at.
    modules: by module name the same three, threshold and tau (their mean where they were learned by rank), membrane
        (mean after each token) and firing, the spikes a token (sum of their sizes) of each rank unit.
    left_out: modules whose input is no row of tokens (a pooler's, say), which were not counted. A place of a
        convolution counts as a token: in a model that is given no tokens all do, in one that is, only those of a
        convolution that gives a place for each token.
    """

    sparsity: float | None
    dead_ranks: float | None
    contribution: float | None
    modules: dict[str, dict]
    left_out: list[str] = field(default_factory=list)


class AdapterObserver:
    """Counts, while `observe_adapters` is active; see `activity`."""

    def __init__(self, model: nn.Module, membranes: bool = False, contributions: bool = True):
        self.tokens, self.membranes, self.contributions = RealTokens(model), membranes, contributions
        named = self.tokens.model.named_modules()
        self.adapted: dict[str, Any] = {name: module for name, module in named if isinstance(module, BaseTunerLayer)}
        self.gates = dict(gates_of(self.tokens.model))
        # module or gate -> what -> sum over real tokens
        self.counts: dict[str, dict[str, Any]] = defaultdict(lambda: defaultdict(int))
        self.before: dict[str, Tensor] = {}  # W0 x of modules at work

    def hooks(self) -> Iterator[RemovableHandle]:
        """Attaches one hook after the other; gives their handles."""
        yield self.tokens.attach()
        for name, module in self.adapted.items() if self.contributions else ():
            yield module.get_base_layer().register_forward_hook(partial(self._frozen, name))
            yield module.register_forward_hook(partial(self._adapted, name))
        for name, gate in self.gates.items():
            yield gate.register_forward_hook(partial(self._gate, name))

    def _frozen(self, name, module, inputs, output):
        self.before.pop(name, None)
        if self.tokens.first(name) and (real := self._real(output, module)) is not None:
            self.before[name] = real

    def _adapted(self, name, module, inputs, output):
        before = self.before.pop(name, None)
        if before is not None:
            added = (self._real(output, module.get_base_layer()) - before).square().sum()
            self._add(name, added=added, frozen=before.square().sum())

    def _real(self, output, base):
        return self.tokens.real(channels_last(output, base) if isinstance(base, tuple(CONVOLUTIONS)) else output)

    def _gate(self, name, gate, inputs, output):
        if self.tokens.first(name) and (real := self.tokens.real(output)) is not None:
            spikes = real.flatten(0, -2)
            sums = {"fired": (spikes != 0).double().sum(0), "spikes": spikes.abs().sum(0)}
            self._add(name, **sums, tokens=self.tokens.count(output))
            if self.membranes:
                self._add(name, membrane=self.tokens.real(gate.membranes(inputs[0])).sum())

    def _add(self, name: str, **sums: Tensor) -> None:
        for what, value in sums.items():
            self.counts[name][what] = self.counts[name][what] + value

    def activity(self) -> AdapterActivity | None:
        """What was seen so far; None of a model without adapters.

        Raises:
            ValueError: no real token was read.
        """
        if not self.adapted:
            return None
        modules = {name: {"contribution": _ratio([self.counts[name]])} for name in self.adapted if name in self.counts}
        gates = {name: self.counts[name] for name in self.gates if name in self.counts}
        if not (modules or gates) or not all(int(counts["tokens"]) for counts in gates.values()):
            raise ValueError("nothing was observed: let the model read at least one batch with a real token")
        for name, counts in gates.items():
            name, gate = name.split(".lora_gate.")[0], self.gates[name]
            modules[name] = modules.get(name, {"contribution": None}) | _of_gate(gate, counts)
        silent = [1 - counts["fired"] / counts["tokens"] for counts in gates.values()]
        return AdapterActivity(
            sparsity=float(torch.cat(silent).mean()) if gates else None,
            dead_ranks=float((torch.cat(silent) == 1).double().mean()) if gates else None,
            contribution=_ratio([self.counts[name] for name in modules]),
            modules=modules,
            left_out=[name for name in self.adapted if name not in modules],
        )


def _of_gate(gate: SpikeGate, counts: dict) -> dict:
    rate = counts["fired"] / counts["tokens"]
    measured = {
        "sparsity": 1 - float(rate.mean()),
        "dead_ranks": float((rate == 0).double().mean()),
        "threshold": mean(gate.threshold_now()),
        "tau": mean(gate.tau_now()),
        "firing": (counts["spikes"] / counts["tokens"]).tolist(),
    }
    return measured | (
        {"membrane": float(counts["membrane"].mean() / counts["tokens"])} if "membrane" in counts else {}
    )


def _ratio(counts: list[dict]) -> float | None:
    added, frozen = (float(sum(one[what] for one in counts)) for what in ("added", "frozen"))
    return (added / frozen) ** 0.5 if frozen else None


@contextmanager
def observe_adapters(
    model: nn.Module, membranes: bool = False, contributions: bool = True
) -> Iterator[AdapterObserver]:
    """While it is open, every forward of `model` is counted: training, a Trainer's evaluation, your own loop.

    Args:
        model: any model with adapters of peft, SpikeGPT or not.
        membranes: gather mean membranes too, which costs a second pass through each gate, token by token.
        contributions: compare what adapters add with W0 x; without it gates alone are looked at, in far less time.
    """
    observer = AdapterObserver(model, membranes, contributions)
    with hooked(observer.hooks()):
        yield observer
