"""Ways to a cheaper step beside simple rivals, one row each: what recipes/efficiency.py compares."""

from collections.abc import Callable
from dataclasses import dataclass

from .backward import DropBackward
from .channels import SparseChannels, SparseConfig
from .skip import SkipBatches
from .step_change import StepChange

SHORT = "short"  # short-0.65: the dense step, for that share of the steps, its schedule fully decayed


@dataclass(frozen=True)
class Way:
    """title: in tables. change: of the steps. upper: adapters stand in the upper half of the blocks alone; cached: and
    what is below is computed once. steps: share of them that is taken."""

    title: str
    change: Callable[[], StepChange] | None = None
    upper: bool = False
    cached: bool = False
    steps: float = 1.0


def _channels(select: str, keep: float = 0.25) -> Callable[[], StepChange]:
    return lambda: SparseChannels(SparseConfig(keep, select))


def _gate(score: str, rate: float = 0.3) -> Callable[[], StepChange]:
    return lambda: SkipBatches(rate, score)


WAYS = {
    "dense": Way("dense step, all steps"),
    "static": Way("25 % of the FFN, static", _channels("static")),
    "svd": Way("25 % of the FFN, svd (SparseLoRA)", _channels("svd")),
    "random": Way("25 % of the FFN, random", _channels("random")),
    "none": Way("FFN left out", _channels("none")),
    "drop-0.5": Way("half of the backwards dropped", lambda: DropBackward(0.5)),
    "drop-0.75": Way("three quarters dropped", lambda: DropBackward(0.75)),
    "upper": Way("upper half adapted", upper=True),
    "trunk": Way("upper half adapted, trunk cached", upper=True, cached=True),
    "novelty": Way("30 % of the batches, by novelty (SLoRA)", _gate("novelty")),
    "norm": Way("30 % of the batches, by the gradient's norm", _gate("norm")),
    "loss": Way("30 % of the batches, by the loss", _gate("loss")),
    "chance": Way("30 % of the batches, at random", _gate("random")),
}


def way(name: str) -> Way:
    """Of WAYS, or of a name such as short-0.65."""
    if name in WAYS:
        return WAYS[name]
    share = float(name.removeprefix(f"{SHORT}-"))
    return Way(f"dense step, {share:g} of the steps", steps=share)


def short(time: float) -> str:
    """The name of the dense way that takes `time` of the dense one's time, to a twentieth, and no longer than that."""
    share = min(20, max(1, round(20 * time))) / 20
    return "dense" if share == 1 else f"{SHORT}-{share:g}"
