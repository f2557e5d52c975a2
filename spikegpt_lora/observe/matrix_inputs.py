"""What every matrix of a model reads, found out while it runs.

    for row in matrix_inputs(model, batches): print(row)

The proof, to whoever wants one, that all of them read integer spikes: nothing is taken from the configuration.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from torch import Tensor, nn

from ..forward import RealTokens, hooked
from ..neurons.neuron import neurons_of
from .operations import count_operations, short_name

HEAD = ["matrix", "reads", "levels", "nonzero %", "weight reads", "plane additions"]  # the last two: of dense
RESIDUAL = "residual stream"
REAL = "real numbers"


@dataclass
class MatrixInput:
    """One nn.Linear over all real tokens that a model read.

    reads: the neurons whose spikes it was given, by name; "residual stream" where they are whole numbers of no neuron;
        "real numbers".
    levels: the whole numbers seen, in rising order; None where one input was no whole number.
    nonzero: share of inputs that were not 0. weight_reads, plane_additions: per token over those of the dense product;
        the second None where inputs were real.
    """

    matrix: str
    reads: str
    levels: tuple[int, ...] | None
    nonzero: float
    weight_reads: float
    plane_additions: float | None


def matrix_inputs(model: nn.Module, batches: Iterable[Mapping]) -> list[MatrixInput]:
    """Let `model` read `batches` and say what each of its matrices was given, in the order in which they stand.

    Args:
        model, batches: as for `count_operations`, whose errors are raised too.
    """
    seen = _Seen(model)
    with hooked(seen.hooks()):
        counted = count_operations(model, batches)
    table = []
    for name, one in counted.layers.items():
        whole = one.spikes == "integer"
        table.append(
            MatrixInput(
                matrix=name,
                reads=seen.source(name) if whole else REAL,
                levels=tuple(sorted(seen.levels[name])) if whole else None,
                nonzero=one.input_density,
                weight_reads=one.weight_reads / one.dense_macs,
                plane_additions=None if one.plane_additions is None else one.plane_additions / one.dense_macs,
            )
        )
    return table


def by_kind(table: list[MatrixInput]) -> list[MatrixInput]:
    """The same with the blocks taken together, "att.key" say: all levels, and the means over blocks."""
    kinds: dict[str, list[MatrixInput]] = defaultdict(list)
    for row in table:
        kinds[_without_block(row.matrix)].append(row)
    return [
        MatrixInput(
            matrix=kind,
            reads=" and ".join(sorted({_without_block(row.reads) for row in rows})),
            levels=None if any(row.levels is None for row in rows) else _union(row.levels or () for row in rows),
            nonzero=fmean(row.nonzero for row in rows),
            weight_reads=fmean(row.weight_reads for row in rows),
            plane_additions=None
            if any(row.plane_additions is None for row in rows)
            else fmean(row.plane_additions or 0.0 for row in rows),
        )
        for kind, rows in kinds.items()
    ]


def cells(table: list[MatrixInput]) -> list[list[str]]:
    """Rows of text under HEAD, for `report.markdown.table`."""
    return [
        [
            row.matrix,
            row.reads,
            "" if not row.levels else f"{row.levels[0]} … {row.levels[-1]}, {len(row.levels)} seen",
            f"{100 * row.nonzero:.1f}",
            f"{row.weight_reads:.3f}",
            "" if row.plane_additions is None else f"{row.plane_additions:.3f}",
        ]
        for row in table
    ]


def _without_block(name: str) -> str:
    return re.sub(r"blocks\.\d+\.", "", name)


def _union(levels: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sorted(set().union(*levels)))


class _Seen:
    """Whole numbers that matrices were given, and which neurons had just sent them."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.tokens = model, RealTokens(model)
        self.levels: dict[str, set[int]] = defaultdict(set)
        self.sources: dict[str, set[str]] = defaultdict(set)
        self.sent: dict[int, tuple[str, Tensor]] = {}  # by identity: the tensor is kept, so that no other has it

    def hooks(self):
        yield self.tokens.attach()
        yield self.tokens.model.register_forward_pre_hook(lambda *_: self.sent.clear())
        for name, neuron in neurons_of(self.model):
            yield neuron.register_forward_hook(partial(self._sent, short_name(name)))
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear):
                yield module.register_forward_pre_hook(partial(self._given, short_name(name)), with_kwargs=True)

    def _sent(self, name, neuron, inputs, output) -> None:
        self.sent[id(output)] = (name, output)

    def _given(self, name, linear, args, kwargs) -> None:
        x = args[0] if args else kwargs["input"]
        self.sources[name].add(self.sent[id(x)][0] if id(x) in self.sent else RESIDUAL)
        if (mask := self.tokens.mask) is not None and x.shape[:-1] == mask.shape:
            x = x[mask]
        values = x.detach().unique()
        if torch.equal(values, values.floor()) and values.isfinite().all():
            self.levels[name].update(int(value) for value in values)

    def source(self, name: str) -> str:
        return " and ".join(sorted(self.sources[name]))
