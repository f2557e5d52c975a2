"""Contextual channel sparsity: a training step computes some of the hidden channels of each MLP, the set S.

    h = f(W1 x),  y = W2 h        ->        h_S = f(W1[S] x),  y = W2[:, S] h_S

forward and backward, adapters included: of W1's the rows S of B, of W2's the columns S of A. f works on each channel
alone. Evaluation is dense. Source: SparseLoRA (Khaki et al. 2025, arXiv 2506.16500), which chooses S by a low-rank
estimate of h for the mean token of each text, `select="svd"` here.

Nothing is changed in any MLP's code: while one runs, its layers hold slices of their weights in place of the weights.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ...adapters.sparsity import SparsityController
from ...forward import RealTokens, hooked, run
from ...utils.checks import check
from ..run import adapters_off
from .pairs import ChannelPair, base_of, find_pairs, rows_of
from .step_change import StepChange, own_forward, swapped

SELECT = ("static", "svd", "svd_token", "oracle", "magnitude", "random", "none")
LOOKING = ("svd", "svd_token", "oracle")  # choose by what is read
EACH_STEP = (*LOOKING, "random")  # choose anew
LAYERS = ("all", "all_but_first")


@dataclass(frozen=True)
class SparseConfig:
    """How `SparseChannels` chooses.

    keep: share of the hidden channels that a step computes, in (0, 1]; at least one.
    select: how they are chosen.
        static     largest norm of h times W2's column over `calibration` batches, once, adapters off
        svd        largest estimate of that for each sentence's mean token, W1 of rank `rank`: the paper's
        svd_token  the same for every token
        oracle     largest norm in the batch itself, which takes the dense product: what choosing could bring at most
        magnitude  largest norm of W1's row times W2's column
        random     other ones each time
        none       one channel alone, so that the MLP is as good as left out: what not having it costs
    layers: "all", "all_but_first", or their numbers in order.
    start, end: between these shares of the steps; before and after, steps are dense.
    refresh: steps for which a choice holds, where there is more than one.
    calibration: batches that "static" reads before the first step.
    pairs: of MLPs that are not known, {regular expression of W1's names: W2's name relative to W1's parent}.

    Raises:
        ValueError: values out of range; one message lists them all.
    """

    keep: float = 0.25
    select: str = "static"
    rank: int = 8
    layers: str | Collection[int] = "all_but_first"
    start: float = 0.05
    end: float = 1.0
    refresh: int = 1
    calibration: int = 10
    pairs: Mapping[str, str] | None = None

    def __post_init__(self):
        named = isinstance(self.layers, str)
        rules = [
            ("keep", "in (0, 1]", 0 < self.keep <= 1),
            ("select", f"one of {', '.join(SELECT)}", self.select in SELECT),
            ("layers", f"{', '.join(LAYERS)} or numbers of layers", not named or self.layers in LAYERS),
            ("start", "in [0, end)", 0 <= self.start < self.end),
            ("end", "<= 1", self.end <= 1),
            *((name, ">= 1", getattr(self, name) >= 1) for name in ("rank", "refresh", "calibration")),
        ]
        check(self, rules)


@dataclass(eq=False)
class Chosen:
    """A pair, its S now, and the slices that belong to it. `keep`: how many channels; `changes`: whether S is chosen
    anew; `factors`: of "svd"."""

    pair: ChannelPair
    keep: int
    changes: bool = False
    index: Tensor | None = None
    step: int | None = None  # when S was chosen
    frozen: dict[tuple[int, str], nn.Parameter] = field(default_factory=dict)
    transposed: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    factors: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)

    @cached_property
    def norms(self) -> Tensor:
        """Of W2's columns, as they were when S was first chosen."""
        return self.pair.out_norms().float()

    def choose(self, index: Tensor, step: int) -> None:
        self.index, self.step = index, step
        self.frozen.clear()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it, the layers of the pair hold the slices of S."""
        with swapped(self._slices()):
            yield

    def _gathered(self, key: tuple[int, str], whole: Tensor, dim: int) -> Tensor:
        """S of a frozen tensor. Columns are ten times as dear to gather as rows: where S changes, from a transposed
        copy."""
        index = cast(Tensor, self.index)
        if dim != 1 or not self.changes:
            return whole.index_select(dim, index)
        if key not in self.transposed:
            self.transposed[key] = whole.t().contiguous()
        return self.transposed[key].index_select(0, index).t()

    def _slices(self) -> Iterator[tuple[nn.Module, str, Any]]:
        index = cast(Tensor, self.index)
        for module, name, dim in list(self.pair.sliced()):
            whole = cast(Tensor, getattr(module, name))
            if whole.requires_grad:
                yield module, name, whole.index_select(dim, index)
                continue
            key = (id(module), name)
            if key not in self.frozen:  # gathered once for each S
                with torch.no_grad():
                    self.frozen[key] = nn.Parameter(self._gathered(key, whole, dim), requires_grad=False)
            yield module, name, self.frozen[key]
        for producer in self.pair.producers:
            if isinstance(base := base_of(producer), Conv1D):
                yield base, "nf", len(index)


class SparseChannels(StepChange):
    """A Trainer's callback: its training steps compute a share of the channels of each MLP (see the top of this file).

        Trainer(model, ..., callbacks=[SparseChannels(SparseConfig(keep=0.25))])

    The same S holds for all micro-batches of a step and for what gradient checkpointing computes again. After the
    training nothing is left behind in the model.

    Args:
        config: how channels are chosen.

    Raises, when the training begins:
        ValueError: a model without a known MLP, with packed weights or DoRA; a layer that there is not; several
            processes that would choose different sets; a `SparsityCallback` beside it, which would move thresholds by
            what gates see of a part of the channels.
    """

    def __init__(self, config: SparseConfig | None = None) -> None:
        super().__init__()
        self.config = SparseConfig() if config is None else config
        self.chosen: list[Chosen] = []
        self.step, self.seed, self.active = 0, 0, False
        self.tokens: RealTokens | None = None

    @property
    def sets(self) -> dict[str, Tensor]:
        """S of each pair by its name, as far as one was chosen."""
        return {one.pair.name: one.index for one in self.chosen if one.index is not None}

    @property
    def shared(self) -> bool:  # type: ignore[override]
        return self.config.select not in LOOKING

    def begin(self, model, seed=0, batches=None):
        select = self.config.select
        pairs = self._of_layers(find_pairs(model, self.config.pairs))
        unknown = [pair.name for pair in pairs if pair.middle is None]
        if unknown and select in LOOKING:
            raise ValueError(
                f'select="{select}" must know what stands between the layers of {unknown[0]}: use select="static"'
            )
        self.seed, self.tokens = seed, RealTokens(model)
        self.chosen = [Chosen(pair, self._number(pair), select in EACH_STEP) for pair in pairs]
        self._prepare(model, batches)
        self.opened.enter_context(hooked([self.tokens.attach()]))
        for one in self.chosen:
            for scope in one.pair.scopes:
                self.opened.enter_context(own_forward(scope, partial(self._forward, one, scope, scope.forward)))

    def begin_step(self, step, steps):
        self.step, progress = step, step / max(1, steps)
        self.active = self.config.start <= progress < self.config.end
        for one in self.chosen:
            _refuse_controller(one.pair)

    def close(self):
        self.active = False
        super().close()

    def _of_layers(self, pairs: list[ChannelPair]) -> list[ChannelPair]:
        layers, count = self.config.layers, len(pairs)
        if isinstance(layers, str):
            return pairs[1:] if layers == "all_but_first" and count > 1 else pairs
        if wrong := sorted(set(layers) - set(range(count))):
            raise ValueError(f"layers must be in 0 ... {count - 1}, got {wrong[0]}")
        return [pair for number, pair in enumerate(pairs) if number in set(layers)]

    def _number(self, pair: ChannelPair) -> int:
        return 1 if self.config.select == "none" else max(1, round(self.config.keep * pair.channels))

    def _prepare(self, model: nn.Module, batches: Callable[[int], Iterable[Mapping]]) -> None:
        """Whatever can be chosen, or computed, before the first step."""
        select = self.config.select
        if select == "static":
            pairs = [one.pair for one in self.chosen]
            scores = calibrated_scores(model, pairs, batches(self.config.calibration))
        for one in self.chosen:
            if select == "static":
                one.choose(_largest(scores[one.pair.name], one.keep), 0)
            elif select == "magnitude":
                norms = torch.stack([rows_of(producer).norm(dim=1) for producer in one.pair.producers]).prod(dim=0)
                one.choose(_largest(norms * one.norms, one.keep), 0)
            elif select == "none":
                one.choose(self._drawn(one), 0)
            elif select.startswith("svd"):
                one.factors = [low_rank(producer, self.config.rank) for producer in one.pair.producers]

    def _forward(self, one: Chosen, scope: nn.Module, whole: Callable, *args, **kwargs):
        if not (self.active and scope.training):
            return whole(*args, **kwargs)
        if scope is one.pair.scopes[0]:
            one.pair.require_start(*args, **kwargs)
            if self._due(one):
                one.choose(self.best(one, args, kwargs), self.step)
        with one.held():
            return whole(*args, **kwargs)

    def _due(self, one: Chosen) -> bool:
        chosen = one.step
        return chosen is None or (one.changes and self.step >= chosen + self.config.refresh)

    @torch.no_grad()
    def best(self, one: Chosen, args: tuple, kwargs: dict) -> Tensor:
        """S that is chosen anew for a pair whose first scope is called with these arguments."""
        if self.config.select == "random":
            return self._drawn(one)
        pair = one.pair
        if self.config.select == "oracle":
            h = self._real(pair.hidden(*args, **kwargs))
            scores = h.square().sum(dim=0).sqrt()
        else:
            x = pair.read(*args, **kwargs)
            x = self._mean(x) if self.config.select == "svd" else self._real(x)
            outputs = [F.linear(F.linear(x.to(V.dtype), V), U, bias) for U, V, bias in one.factors]
            scores = cast(Callable, pair.middle)(*outputs).float().square().sum(dim=0).sqrt()
        return _largest(scores * one.norms, one.keep)

    def _drawn(self, one: Chosen) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + 1_009 * self.step + self.chosen.index(one))
        drawn = torch.randperm(one.pair.channels, generator=generator)[: one.keep].sort().values
        return drawn.to(rows_of(one.pair.consumer).device)

    def _mask(self, x: Tensor) -> Tensor:
        mask = cast(RealTokens, self.tokens).mask
        return x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask

    def _real(self, x: Tensor) -> Tensor:
        """The real tokens of x `(B, T, d)`, `(tokens, d)`."""
        return x[self._mask(x)].float()

    def _mean(self, x: Tensor) -> Tensor:
        """Of each sentence the mean of its real tokens, `(B, d)`."""
        weight = self._mask(x).to(x.dtype)
        weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.einsum("bt,btd->bd", weight, x)


def calibrated_scores(model: nn.Module, pairs: list[ChannelPair], batches: Iterable[Mapping]) -> dict[str, Tensor]:
    """Of each pair by name, how much every channel gives over all real tokens of `batches`, `(channels,)`: the norm of
    h times that of W2's column. Adapters are off, so that a training which goes on chooses as at its beginning."""
    tokens, squares = RealTokens(model), {pair.name: torch.zeros(pair.channels) for pair in pairs}

    def see(pair: ChannelPair, module: nn.Module, args: tuple) -> None:
        real = tokens.real(args[0])
        if real is not None:
            squares[pair.name] += real.square().flatten(0, -2).sum(dim=0).float().cpu()

    def hooks():
        yield tokens.attach()
        for pair in pairs:
            yield pair.consumer.register_forward_pre_hook(partial(see, pair))

    with adapters_off(model), hooked(hooks()):
        for batch in batches:
            run(model, batch, batch.keys() - {"labels"})
    return {pair.name: squares[pair.name].sqrt().to(rows_of(pair.consumer).device) * pair.out_norms() for pair in pairs}


def low_rank(linear: nn.Module, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """U `(outputs, rank)` and V `(rank, inputs)` of the best W = U V of that rank, and the bias."""
    U, S, V = torch.linalg.svd(rows_of(linear).float(), full_matrices=False)
    bias = base_of(linear).bias
    return U[:, :rank] * S[:rank], V[:rank], None if bias is None else bias.detach().float()


def _largest(scores: Tensor, number: int) -> Tensor:
    """Places of the largest scores, in order."""
    if not bool(scores.isfinite().all()):
        raise FloatingPointError("what channels are chosen by is NaN or infinite: the training has diverged")
    return scores.topk(number).indices.sort().values


def _refuse_controller(pair: ChannelPair) -> None:
    """Raise ValueError where somebody moves the thresholds of the consumer's gates by what they see."""
    for gate in getattr(pair.consumer, "lora_gate", {}).values():
        for hook in gate._forward_hooks.values():
            if isinstance(getattr(getattr(hook, "func", None), "__self__", None), SparsityController):
                raise ValueError(
                    f"{pair.name}: a SparsityCallback moves thresholds by what gates see, which is a part of the "
                    "channels in a sparse step: calibrate the thresholds before training (calibrate_thresholds), or "
                    "leave one of the two out"
                )
