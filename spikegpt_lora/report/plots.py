"""Pictures: one sentence's spikes, a training's loss, the accuracy of methods, what fewer reads cost of it, what a
setting of an encoder's adapters does, and where they are silent."""

import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np

from ..observe.traces import GATE, SpikeTrace
from ..utils.files import whole_file
from .results import SETTINGS, title_of


def draw_raster(trace: SpikeTrace, path: Path, sentence: int = 0, title: str = "") -> None:
    """Draw one sentence's spikes as a PNG: words on the time axis, one panel a population; black = spike, of integer
    ones the largest of either sign."""
    from matplotlib.figure import Figure  # a Figure of its own: no pyplot, no global backend

    length = int(trace.lengths[sentence])
    layers = [name for name in trace.spikes if GATE not in name]
    gates = [name for name in trace.spikes if GATE in name]
    panels = [(name, trace.spikes[name][sentence, :length]) for name in layers]
    if gates:  # one panel for all gates: their units stacked
        panels.append(("adapter gates", np.concatenate([trace.spikes[g][sentence, :length] for g in gates], axis=1)))
    figure = Figure(figsize=(max(6, 0.42 * length), 1.35 * len(panels) + 1.2), layout="constrained")
    for axis, (name, spikes) in zip(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels):
        axis.imshow(np.abs(spikes.T), cmap="Greys", vmin=0, aspect="auto", interpolation="nearest", origin="lower")
        axis.set_ylabel(f"{spikes.shape[1]} units")
        axis.set_title(f"{name}: {100 * (spikes != 0).mean():.1f} % firing", fontsize=8, loc="left", pad=2)
        axis.tick_params(labelsize=7)
        axis.yaxis.label.set_fontsize(7)
    words = trace.words[sentence, :length]
    first = named_once(words)
    axis.set_xticks(first, words[first], rotation=60, ha="right", fontsize=8)
    figure.suptitle(title, fontsize=9)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=240)


def named_once(words: Sequence[str]) -> list[int]:
    """The tokens that a time axis names: of a word of several tokens the first."""
    return [t for t in range(len(words)) if t == 0 or words[t] != words[t - 1]]


def draw_accuracy(results: dict, path: Path) -> None:
    """Draw test accuracy by method as a PNG: a dot a seed, a line at the mean; baselines as horizontal lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for x, row in enumerate(results["summary"]):
        accuracy = [100 * run["test_accuracy"] for run in results["runs"] if run["method"] == row["method"]]
        axis.scatter([x] * len(accuracy), accuracy, color="C0", zorder=3)
        axis.hlines(np.mean(accuracy), x - 0.25, x + 0.25, color="C0")
    for style, row in zip(cycle(("--", ":", "-.", (0, (6, 1)))), results["baselines"]):
        axis.axhline(100 * row["accuracy_test"], color="gray", linestyle=style, label=row["method"])
    axis.set_xticks(range(len(results["summary"])), [title_of(row) for row in results["summary"]], fontsize=8)
    axis.set_ylabel("test accuracy, %")
    axis.set_title(f"{results['task']}, {results['model']}: one dot a seed", fontsize=9)
    axis.grid(axis="y", alpha=0.3)
    if results["baselines"]:
        axis.legend(fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


def draw_loss(log: list[list[float]], path: Path) -> None:
    """Draw the training loss over the steps as a PNG; `log` as `pretrain.loop.Pretraining` keeps it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot([entry[0] for entry in log], [entry[1] for entry in log], linewidth=1)
    axis.set_xlabel("step")
    axis.set_ylabel("training loss, nats a token")
    axis.grid(alpha=0.3)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


def draw_reads(points: list[dict], path: Path) -> None:
    """Draw validation accuracy over weight reads as a PNG, of `results.accuracy_and_reads`: a colour a method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for color, method in enumerate(dict.fromkeys(point["method"] for point in points)):
        of_method = [point for point in points if point["method"] == method]
        x = [1.0 if point["weight_reads"] is None else point["weight_reads"] for point in of_method]
        y = [100 * point["validation_accuracy"] for point in of_method]
        axis.scatter(x, y, color=f"C{color}", label=of_method[0]["title"], zorder=3)
        for place, point in zip(zip(x, y), of_method):
            seeds = f" ({point['seeds']} seeds)" * (point["seeds"] > 1)
            axis.annotate(point["folder"] + seeds, place, xytext=(4, 4), textcoords="offset points", fontsize=7)
    axis.set_xlim(0, 1.12)
    axis.set_xlabel("weights of the blocks that a token reads, of all (1: real numbers, a dense product)")
    axis.set_ylabel("validation accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


def draw_frontier(rows: list[dict], path: Path, title: str) -> None:
    """Draw what ways of training reach over the time that they take as a PNG. `rows`: of each way title, method, time
    (the dense way's is 1), loss, and accuracy or None; ways that are merely shorter are joined by a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axis = figure.subplots()
    key, unit = ("accuracy", 100) if rows[0]["accuracy"] is not None else ("loss", 1)
    plain = [row for row in rows if row["method"] == "dense" or row["method"].startswith("short")]
    steps = sorted((row["time"], unit * row[key]) for row in plain)
    axis.plot(*zip(*steps), color="gray", marker="o", linewidth=1, label="dense step, fewer steps")
    for number, row in enumerate(row for row in rows if row not in plain):
        style = {"color": f"C{number % 10}", "marker": "s^Dv"[number // 10 % 4], "zorder": 3}
        axis.scatter(row["time"], unit * row[key], label=row["title"], **style)
    axis.set_xlabel("time, the dense way's is 1")
    axis.set_ylabel("test accuracy, %" if key == "accuracy" else "validation loss, nats a token")
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


def draw_sweep(rows: list[dict], setting: str, metric: str, path: Path) -> None:
    """Draw loss, metric, its generalisation gap and sparsity over a setting as a PNG: mean and spread over seeds, a
    line a method; a dashed one of what does not have the setting.

    Args:
        rows: of `sweeps.summarize_settings`.
    """
    from matplotlib.figure import Figure

    panels = {"loss": "dev loss, nats", metric: f"dev {metric}", "gap": f"train - dev {metric}", "sparsity": "sparsity"}
    lines: dict[str, list[dict]] = {}
    for row in rows:
        others = [f"{name} {row[name]}" for name in SETTINGS if name in row and name != setting]
        lines.setdefault(", ".join([row["method"], *others]), []).append(row)
    figure = Figure(figsize=(14, 3.6), layout="constrained")
    for axis, (key, name) in zip(figure.subplots(1, len(panels)), panels.items()):
        for color, (label, of_line) in enumerate(lines.items()):
            known = [row for row in of_line if row[key] is not None]
            swept = sorted((row for row in known if setting in row), key=lambda row: row[setting])
            x, y = ([row[of] for row in swept] for of in (setting, key))
            if swept:
                spreads = [row[f"{key}_spread"] or 0.0 for row in swept]
                axis.errorbar(x, y, spreads, marker="o", capsize=2, color=f"C{color}", label=label)
            for row in known[: 0 if swept else None]:
                axis.axhline(row[key], linestyle="--", color=f"C{color}", label=label)
        if setting in ("rank", "learning_rate"):
            axis.set_xscale("log")
        axis.set_xlabel(setting.replace("_", " "))
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    figure.legend(*figure.axes[1].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=4)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


def draw_modules(sparsity: dict[str, float], path: Path, title: str) -> None:
    """Draw the silent share of each module's gate as a PNG: a column a block, a row a kind of module.

    Args:
        sparsity: by the module's name, whose first number is its block's; those without one are left out.
    """
    from matplotlib.figure import Figure

    places = {name: match for name in sparsity if (match := re.search(r"\.(\d+)\.(.+)", name))}
    kinds = list(dict.fromkeys(match[2] for match in places.values()))
    blocks = sorted({int(match[1]) for match in places.values()})
    silent = np.full((len(kinds), len(blocks)), np.nan)
    for name, match in places.items():
        silent[kinds.index(match[2]), blocks.index(int(match[1]))] = 100 * sparsity[name]
    figure = Figure(figsize=(max(4, 0.5 * len(blocks) + 3), 0.4 * len(kinds) + 1.4), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(silent, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(range(len(blocks)), [str(block) for block in blocks], fontsize=8)
    axis.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axis.set_xlabel("block")
    axis.set_title(title, fontsize=9)
    figure.colorbar(image).set_label("silent gate outputs, %", fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
