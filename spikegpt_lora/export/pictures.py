"""A bundle in pictures, from its files alone: one sentence's spikes, who fires how often, who is silent, what it costs.

What is drawn comes from functions of its own (`sentence_trace`, `firing_rates`, `silent_share`, `operations_by_group`).
Populations are in the order of the manifest, which is the order in which they run: traces.h5 has them by name, block 10
before block 2. Colours are those of Okabe and Ito, told apart by colour-blind readers, and series differ in marker too.
"""

import json
import re
from itertools import cycle
from pathlib import Path

import numpy as np

from ..observe.traces import GATE, SpikeTrace
from ..report import plots
from ..report.spikes import gate_of, readable
from ..utils.files import whole_file
from .bundle import Bundle, as_integers

FEWEST = 5  # sentences behind a column of the sparsity map: of fewer, it would show sentences and not positions
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = "osD^vP*"
DPI = 200

# what is counted: its name in words, its colour
EXECUTED = {
    "dense_macs": ("dense MACs", "#BBBBBB"),
    "effective_macs": ("effective MACs", "#0072B2"),
    "effective_acs": ("effective ACs", "#E69F00"),
}
EVENT_DRIVEN = {"additions": ("additions", "#E69F00"), "products": ("products", "#0072B2")}
GROUPS = ("att W0", "ffn W0", "adapters A", "adapters B")


def draw_all(bundle: Bundle, folder: str | Path, sentence: int = 0) -> list[Path]:
    """Draw raster.png, firing.png, sparsity.png and cost.png; returns their paths.

    Args:
        folder: made if it is not there. Not the bundle's own: a bundle holds what its manifest lists.
        sentence: whose spikes the raster shows, from 0.

    Raises:
        IndexError: the bundle has no such sentence.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in ("raster", "firing", "sparsity", "cost")]
    draw_raster(bundle, paths[0], sentence)
    for draw, path in zip((draw_firing_by_depth, draw_sparsity_map, draw_cost), paths[1:]):
        draw(bundle, path)
    return paths


def populations(bundle: Bundle) -> tuple[list[str], list[str]]:
    """Names of the layers' populations ("emb", "blocks.0.lif1") and of the adapters' gates, each in order of depth."""
    names = [population["name"] for population in bundle.manifest["populations"]]
    return [name for name in names if GATE not in name], [name for name in names if GATE in name]


def draw_raster(bundle: Bundle, path: str | Path, sentence: int = 0) -> None:
    """Draw one sentence's spikes: words below, one panel a population, gates by block.

    Raises:
        IndexError: the bundle has no such sentence.
    """
    trace = sentence_trace(bundle, sentence)
    plots.draw_raster(trace, Path(path), title=f"sentence {sentence}, {trace.lengths[0]} tokens; black = spike")


def sentence_trace(bundle: Bundle, sentence: int) -> SpikeTrace:
    """One sentence of a bundle as a trace whose populations are a raster's panels, from the embedding upwards.

    The gates of a block are one population, stacked in the order in which its name lists them: by themselves they are a
    few units each, and there are many.

    Raises:
        IndexError: the bundle has no such sentence.
    """
    layers, gates = populations(bundle)
    stacked: dict[str, list[str]] = {}
    for name in gates:
        stacked.setdefault(gate_of(name)[0], []).append(name)
    panels = {readable(name): [name] for name in layers}
    panels |= {f"{block} gates, from below: {_modules(names)}": names for block, names in stacked.items()}
    seen = {name: as_integers(bundle.traces[name]["spikes"][[sentence]]) for name in [*layers, *gates]}
    return SpikeTrace(
        spikes={title: np.concatenate([seen[name] for name in names], axis=2) for title, names in panels.items()},
        values={},
        **{key: bundle.sentences[key][[sentence]] for key in ("lengths", "tokens", "words", "labels")},
    )


def _modules(gates: list[str]) -> str:
    """ "att.key, value, ffn.key": a part that several modules share is said once, or it does not fit a narrow panel."""
    said, part = [], None
    for module in [gate_of(name)[1] for name in gates]:
        new, dot, last = module.rpartition(".")
        said.append(last if dot and new == part else module)
        part = new
    return ", ".join(said)


def firing_rates(bundle: Bundle) -> dict[str, np.ndarray]:
    """Population -> float64 `(B,)`: of each sentence the share of (neuron, token) pairs with a spike."""
    lengths, names = bundle.sentences["lengths"], sum(populations(bundle), [])
    return {name: (bundle.traces[name]["spikes"] != 0).mean(axis=2).sum(axis=1) / lengths for name in names}


def draw_firing_by_depth(bundle: Bundle, path: str | Path) -> None:
    """Draw firing rates from the embedding upwards, and beside them those of the gates, one series a kind of module.

    The points are rates over all tokens, as the manifest's `firing_rate`; band and whiskers reach from quartile to
    quartile of the sentences' own rates.
    """
    (layers, gates), rates = populations(bundle), _rates_and_quartiles(bundle)
    widths = [max(3.2, 0.38 * len(layers))] + [4.6] * bool(gates)
    figure = _figure(sum(widths), 3.6)
    axes = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    _draw_layers(axes[0], layers, [rates[name] for name in layers])
    if gates:
        _draw_gates(axes[1], gates, rates)
    for axis in axes:
        axis.grid(axis="y", alpha=0.3)
        axis.tick_params(labelsize=8)
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("firing rate, spikes / (neuron · token)", fontsize=9)
    _save(figure, path)


def _rates_and_quartiles(bundle: Bundle) -> dict[str, np.ndarray]:
    """Population -> (rate over all tokens, lower quartile, upper quartile of the sentences' rates)."""
    lengths = bundle.sentences["lengths"]
    return {
        name: np.array([np.average(rates, weights=lengths), *np.quantile(rates, (0.25, 0.75))])
        for name, rates in firing_rates(bundle).items()
    }


def _draw_layers(axis, names: list[str], rates: list[np.ndarray]) -> None:
    rate, low, high = np.array(rates).T
    axis.fill_between(range(len(names)), low, high, color=PALETTE[0], alpha=0.25, linewidth=0)
    axis.plot(rate, color=PALETTE[0], marker="o", markersize=4, linewidth=1)
    axis.set_xticks(range(len(names)), [readable(name) for name in names], rotation=60, ha="right")
    axis.set_title("layers, by depth\n(band: quartiles of sentences)", fontsize=8)


def _draw_gates(axis, gates: list[str], rates: dict[str, np.ndarray]) -> None:
    series: dict[str, dict[str, np.ndarray]] = {}
    for name in gates:
        block, module = gate_of(name)
        series.setdefault(module, {})[block] = rates[name]
    blocks = list(dict.fromkeys(gate_of(name)[0] for name in gates))
    shifts = np.linspace(-0.25, 0.25, len(series)) if len(series) > 1 else [0]  # whiskers side by side
    for (module, by_block), shift, color, marker in zip(series.items(), shifts, cycle(PALETTE), cycle(MARKERS)):
        x = np.array([blocks.index(block) for block in by_block]) + shift
        rate, low, high = np.array(list(by_block.values())).T
        axis.plot(x, rate, color=color, marker=marker, markersize=4, linewidth=0.8, label=module)
        axis.vlines(x, low, high, color=color, linewidth=1.2)
    axis.set_xticks(range(len(blocks)), blocks)
    axis.set_title("adapter gates, by block\n(whiskers: quartiles of sentences)", fontsize=8)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def silent_share(bundle: Bundle, fewest: int = FEWEST) -> dict[str, np.ndarray]:
    """Population -> float64 `(positions,)`: share in [0, 1] of (neuron, sentence) pairs without a spike at a position.

    A position that fewer than `fewest` sentences reach is left out; of a bundle with fewer sentences than that, one
    that not all of them reach.
    """
    reached = bundle.real.sum(axis=0)
    positions = int((reached >= min(fewest, len(bundle.real))).sum())  # sentences only end: what is kept comes first
    shares = {}
    for name in sum(populations(bundle), []):
        fired = (bundle.traces[name]["spikes"][:, :positions] != 0) & bundle.real[:, :positions, None]
        shares[name] = 1 - fired.mean(axis=2).sum(axis=0) / reached[:positions]
    return shares


def draw_sparsity_map(bundle: Bundle, path: str | Path) -> None:
    """Draw the silent share of each population at each position (see `silent_share`): layers above, gates below."""
    shares = silent_share(bundle)
    parts = [names for names in populations(bundle) if names]
    positions, rows = len(shares[parts[0][0]]), [len(names) for names in parts]
    shown = {"cmap": "viridis", "vmin": 0, "vmax": 100, "aspect": "auto", "interpolation": "none"}
    figure = _figure(max(5, 0.12 * positions + 2.4), 0.17 * sum(rows) + 1.4)
    axes = figure.subplots(len(parts), 1, sharex=True, squeeze=False, height_ratios=rows)[:, 0]
    for axis, names, title in zip(axes, parts, ("layers", "adapter gates")):
        values = 100 * np.array([shares[name] for name in names])
        extent = (0.5, positions + 0.5, len(names) - 0.5, -0.5)  # positions are counted from 1
        image = axis.imshow(values, extent=extent, **shown)
        axis.set_yticks(range(len(names)), [readable(name) for name in names], fontsize=7)
        axis.set_title(title, fontsize=9, loc="left", pad=3)
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    axes[-1].tick_params(axis="x", labelsize=8)
    reached = f"{bundle.real[:, positions - 1].sum()} of {len(bundle.real)} sentences reach the last"
    axes[-1].set_xlabel(f"position in the sentence, tokens ({reached})", fontsize=8)
    bar = figure.colorbar(image, ax=list(axes), fraction=0.04, pad=0.02, aspect=30)
    bar.set_label("silent neurons, %", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    _save(figure, path)


def operations_by_group(layers: dict[str, dict], what: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Sums over the layers of a group, group -> float64 `(len(what),)`, operations a token.

    A block's groups are GROUPS: its W0 by half, its adapters' A and B. Any other layer ("score") is a group of its own,
    after the blocks.

    Args:
        layers: name -> counts, as in cost.json. what: which counts; one that a layer lacks is 0.
    """
    groups: dict[tuple, np.ndarray] = {}
    for name, counts in layers.items():
        group = _group_of(name)
        groups[group] = groups.get(group, 0) + np.array([counts.get(key, 0) for key in what], dtype=np.float64)
    return {group[2]: groups[group] for group in sorted(groups)}


def _group_of(layer: str) -> tuple[float, int, str]:
    """(block, place in the block, label): in this order they are drawn."""
    block, rest = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*)", layer).groups()
    if block is None:
        return float("inf"), 0, rest
    half, _, _ = rest.partition(".")
    factor = re.search(r"\.lora_([AB])\.", rest)
    kind = f"adapters {factor[1]}" if factor else f"{half} W0"
    place = GROUPS.index(kind) if kind in GROUPS else len(GROUPS)
    return int(block), place, f"block {block} {kind if kind in GROUPS else rest}"


def draw_cost(bundle: Bundle, path: str | Path) -> None:
    """Draw cost.json, operations a token by group of layers: as executed, and beside it the event-driven form if it is
    there. Both have one scale, but never a panel in common: they are counts of two programs."""
    cost = json.loads((bundle.folder / "cost.json").read_text(encoding="utf-8"))
    panels = [("as executed", EXECUTED, cost["as_executed"]["layers"])]
    if "event_driven" in cost:
        panels.append(("event-driven form", EVENT_DRIVEN, cost["event_driven"]["layers"]))
    order = list(operations_by_group({name: {} for *_, layers in panels for name in layers}, ()))
    figure = _figure(1 + 5 * len(panels), 0.4 * len(order) + 1.6)
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (title, names, layers) in zip(axes, panels):
        _draw_counts(axis, order, operations_by_group(layers, tuple(names)), list(names.values()))
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1)}
        axis.legend(title=title, alignment="left", fontsize=8, frameon=False, **place)
    axes[0].set_yticks(range(len(order)), order, fontsize=8)
    axes[0].invert_yaxis()  # shared: the first block on top
    axes[0].set_xlim(0, axes[0].get_xlim()[1] * 1.1)  # room for the numbers
    _save(figure, path)


def _draw_counts(axis, order: list[str], counts: dict[str, np.ndarray], names: list[tuple[str, str]]) -> None:
    """A bar with its number a count and group. Totals stand in the legend: one of 0 there alone, not as gaps."""
    values = np.array([counts.get(group, np.zeros(len(names))) for group in order])
    drawn = values.any(axis=0)
    height = 0.84 / max(1, drawn.sum())
    y = np.arange(len(order)) - 0.42 - height / 2
    for of_groups, some, (label, color) in zip(values.T, drawn, names):
        y = y + height * some
        axis.barh(y, of_groups, height, color=color, label=f"{label}: {_rounded(of_groups.sum())} / token in all")
        for x, place in zip(of_groups[of_groups > 0], y[of_groups > 0]):
            axis.annotate(_rounded(x), (x, place), (2, 0), textcoords="offset points", va="center_baseline", fontsize=6)
    axis.xaxis.set_major_formatter(lambda value, _: _rounded(value))
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel("operations / token", fontsize=9)
    axis.margins(y=0.01)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def _rounded(value: float) -> str:
    """Three digits: "461 k", "3.7 M", "17.4"."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * size:
            return f"{float(f'{value / size:.3g}'):g}{letter}"
    return f"{value:.3g}"


def _figure(width: float, height: float):
    from matplotlib.figure import Figure  # a Figure of its own: no pyplot, no global backend

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure, path: str | Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=DPI)
