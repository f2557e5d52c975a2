"""What adapters do while a model reads, seen from outside: opt-in, by forward hooks that are gone afterwards.

Counts stay on the device until they are asked for, so looking on costs no synchronisation. Only real tokens count, over
everything that is read (the authors' library reports the last batch only, padding included). Of a module that one
forward calls twice, the first call counts: DeBERTa calls its projections again on relative positions, no tokens.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..model import SpikeGPTModel
from .gate import SpikeGate
from .sequence import bound_arguments


@dataclass
class AdapterActivity:
    """What a model's active adapters did over all real tokens that it read.

    sparsity: share of gate outputs that are silent; dead_ranks: share of rank units that never fired; both None without
    spiking gates. contribution: norm of what the adapters add over the norm of W0 x, both over all adapted modules and
    real tokens; None where W0 x is 0.
    modules: by module name the same three, threshold and tau (their mean where they were learned by rank), membrane
        (mean after each token) and firing, the spikes a token of each rank unit.
    left_out: modules whose input is no row of tokens (a pooler's, say), which were not counted.
    """

    sparsity: float | None
    dead_ranks: float | None
    contribution: float | None
    modules: dict[str, dict]
    left_out: list[str] = field(default_factory=list)


class Reader:
    """Knows which tokens of the forward now running are real, and which modules it has called already."""

    def __init__(self, model: nn.Module):
        self.model = next((m for m in model.modules() if isinstance(m, SpikeGPTModel)), model)
        self.mask: Tensor | None = None  # (B, T)
        self.called: set[str] = set()

    def attach(self):
        """Begin; returns the handle of the hook."""
        return self.model.register_forward_pre_hook(self._start, with_kwargs=True)

    def _start(self, model, args, kwargs):
        given = bound_arguments(model, args, kwargs)
        ids = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        mask = given.get("attention_mask")
        self.mask = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device) if mask is None else mask.bool()
        self.called.clear()

    def real(self, name: str, x: Tensor) -> Tensor | None:
        """The real tokens' rows of x `(B, T, d)`; None where x holds no tokens or `name` was called before."""
        if name in self.called:
            return None
        self.called.add(name)
        return x.detach()[self.mask] if x.shape[:-1] == self.mask.shape else None


class AdapterObserver:
    """Counts, while `observe_adapters` is active; see `activity`."""

    def __init__(self, model: nn.Module, membranes: bool = False):
        self.reader, self.membranes = Reader(model), membranes
        self.adapted = {n: m for n, m in self.reader.model.named_modules() if isinstance(m, BaseTunerLayer)}
        self.gates = {n: m for n, m in self.reader.model.named_modules() if isinstance(m, SpikeGate)}
        self.tokens: Tensor | int = 0
        self.counts = defaultdict(lambda: defaultdict(int))  # module or gate -> what -> sum over real tokens
        self.before: dict[str, Tensor] = {}

    def hooks(self):
        yield self.reader.attach()
        yield self.reader.model.register_forward_pre_hook(self._start)
        for name, module in self.adapted.items():
            yield module.get_base_layer().register_forward_hook(partial(self._frozen, name))
            yield module.register_forward_hook(partial(self._adapted, name))
        for name, gate in self.gates.items():
            yield gate.register_forward_hook(partial(self._gate, name))

    def _start(self, model, args):
        self.tokens = self.tokens + self.reader.mask.sum()
        self.before.clear()

    def _frozen(self, name, module, inputs, output):
        if (real := self.reader.real(name, output)) is not None:
            self.before[name] = real.double()

    def _adapted(self, name, module, inputs, output):
        before = self.before.pop(name, None)
        if before is not None:
            counts, now = self.counts[name], output.detach()[self.reader.mask].double()
            counts["added"] = counts["added"] + (now - before).square().sum()
            counts["frozen"] = counts["frozen"] + before.square().sum()

    def _gate(self, name, gate, inputs, output):
        if (real := self.reader.real(name, output)) is not None:
            counts = self.counts[name]
            counts["fired"] = counts["fired"] + real.double().sum(0)
            if self.membranes:
                after = gate.membranes(inputs[0])[self.reader.mask]
                counts["membrane"] = counts["membrane"] + after.double().sum(0)

    def activity(self) -> AdapterActivity | None:
        """What was seen so far; None of a model without adapters.

        Raises:
            ValueError: no real token was read.
        """
        if not self.adapted:
            return None
        tokens = int(self.tokens)
        if tokens == 0:
            raise ValueError("nothing was observed: let the model read at least one batch with a real token")
        modules = {}
        for name in self.adapted:
            if name in self.counts:
                modules[name] = {"contribution": _ratio([self.counts[name]])}
        fired = {name: self.counts[name]["fired"] for name in self.gates if name in self.counts}
        for name, counts in fired.items():
            gate = self.gates[name]
            modules[name.split(".lora_gate.")[0]] |= _of_gate(counts, tokens) | {
                "threshold": float(torch.as_tensor(gate.threshold_now()).mean()),
                "tau": float(torch.as_tensor(gate.tau_now()).mean()),
                "firing": (counts / tokens).tolist(),
            }
            if self.membranes:
                membrane = float(self.counts[name]["membrane"].mean() / tokens)
                modules[name.split(".lora_gate.")[0]]["membrane"] = membrane
        overall = _of_gate(torch.cat(list(fired.values())), tokens) if fired else {}
        return AdapterActivity(
            sparsity=overall.get("sparsity"),
            dead_ranks=overall.get("dead_ranks"),
            contribution=_ratio([self.counts[name] for name in self.adapted if name in self.counts]),
            modules=modules,
            left_out=[name for name in self.adapted if name not in self.counts],
        )


def _of_gate(fired: Tensor, tokens: int) -> dict[str, float]:
    return {"sparsity": 1 - float(fired.mean()) / tokens, "dead_ranks": float((fired == 0).double().mean())}


def _ratio(counts: list[dict]) -> float | None:
    added, frozen = (float(sum(one[what] for one in counts)) for what in ("added", "frozen"))
    return (added / frozen) ** 0.5 if frozen else None


@contextmanager
def observe_adapters(model: nn.Module, membranes: bool = False) -> Iterator[AdapterObserver]:
    """While it is open, every forward of `model` is counted: training, a Trainer's evaluation, your own loop.

    Args:
        model: any model with adapters of peft, SpikeGPT or not.
        membranes: gather mean membranes too, which costs a second pass through each gate, token by token.
    """
    observer = AdapterObserver(model, membranes)
    handles = list(observer.hooks())
    try:
        yield observer
    finally:
        for handle in handles:
            handle.remove()
