"""What choosing is worth: how near each choice of channels comes to the best, and whether the head's gradient tells
what the adapters' says."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ...forward import RealTokens, hooked, run
from .channels import EACH_STEP, Chosen, SparseChannels, SparseConfig
from .pairs import rows_of
from .skip import FrequentDirections, SkipBatches
from .step_change import own_forward

CHOICES = ("oracle", "static", "svd_token", "svd", "magnitude", "random")


def choices(
    model: nn.Module, batches: list[Mapping], calibration: Iterable[Mapping], keep: float, rank: int = 8
) -> dict[str, dict[str, float]]:
    """Of each way to choose, the mean over batches and MLPs of `model`, in evaluation mode and dense otherwise:

    overlap   share of the best channels (those of "oracle") that it finds
    energy    share of the squares of h that it keeps
    error     |W2 h - W2[:, S] h_S|^2 / |W2 h|^2
    """
    read = list(calibration)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in CHOICES}
    with ExitStack() as stack:
        ways = {}
        for name in CHOICES:
            config = SparseConfig(keep, name, rank=rank, layers="all", start=0.0, calibration=max(1, len(read)))
            ways[name] = stack.enter_context(SparseChannels(config))
            ways[name].begin(model, 0, lambda number: read[:number])
        tokens = RealTokens(model)
        sets: dict[tuple[str, str], Tensor] = {}
        for name, sparse in ways.items():
            for one in sparse.chosen:
                note = partial(_note, sparse, one, sets, name, one.pair.scopes[0].forward)
                stack.enter_context(own_forward(one.pair.scopes[0], note))
        see = partial(_compare, tokens, ways["oracle"], sets, found)
        hooks = [one.pair.consumer.register_forward_pre_hook(partial(see, one)) for one in ways["oracle"].chosen]
        stack.enter_context(hooked([tokens.attach(), *hooks]))
        for step, batch in enumerate(batches):
            for sparse in ways.values():
                sparse.step = step
            run(model, batch, batch.keys() - {"labels"})
    names = ("overlap", "energy", "error")
    return {name: dict(zip(names, np.mean(rows, axis=0).tolist())) for name, rows in found.items()}


def _note(sparse: SparseChannels, one: Chosen, sets: dict, name: str, whole, *args, **kwargs):
    sets[name, one.pair.name] = sparse.best(one, args, kwargs) if name in EACH_STEP else sparse.sets[one.pair.name]
    return whole(*args, **kwargs)


def _compare(tokens: RealTokens, oracle: SparseChannels, sets: dict, found: dict, one: Chosen, module, args) -> None:
    h = tokens.real(args[0]).flatten(0, -2)
    weight = rows_of(one.pair.consumer).double()
    best = set(sets["oracle", one.pair.name].tolist())
    whole, energy = h @ weight.t(), float(h.square().sum())
    for name, rows in found.items():
        kept = sets[name, one.pair.name]
        error = (whole - h[:, kept] @ weight[:, kept].t()).square().sum() / whole.square().sum()
        share = float(h[:, kept].square().sum()) / energy
        rows.append((len(best & set(kept.tolist())) / len(best), share, float(error)))


class Novelties(TrainerCallback):
    """Beside a `SkipBatches(1.0)`, which accepts every batch: of each, what its score looks at, and how new the true
    gradient of all adapter weights is.

    Args:
        gate: the SkipBatches.
        directions: of the sketch of true gradients.
    """

    def __init__(self, gate: SkipBatches, directions: int = 16) -> None:
        self.gate, self.true = gate, FrequentDirections(directions)
        self.rows: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        adapters = [p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None and "lora_" in name]
        gradient = torch.cat(adapters)
        self.rows.append(
            {"head": self.gate.last_score, "norm": self.gate.last_norm, "true": self.true.novelty(gradient)}
            | {"true_norm": float(gradient.norm())}
        )
        self.true.add(gradient)


def spearman(rows: list[dict[str, float]], a: str, b: str, skipped: int) -> tuple[float, float, float]:
    """Rank correlation of two columns, after the first `skipped` rows, and its 95 % bootstrap interval."""
    from scipy.stats import bootstrap, spearmanr

    x, y = (np.array([row[name] for row in rows[skipped:]]) for name in (a, b))
    settings = {"paired": True, "vectorized": False, "n_resamples": 2000, "method": "percentile"}
    found = bootstrap((x, y), lambda x, y: spearmanr(x, y).statistic, rng=np.random.default_rng(0), **settings)
    interval = found.confidence_interval
    return float(spearmanr(x, y).statistic), float(interval.low), float(interval.high)
