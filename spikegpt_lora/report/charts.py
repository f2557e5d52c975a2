"""Charts of a comparison as HTML, from its results: each is empty where the results hold nothing of its kind."""

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .markup import FONT, INK, picture, side_by_side
from .results import seconds_of, title_of, titles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves = dict[str, list[list[float]]]  # title of a method -> a curve a seed


def differences(results: dict) -> str:
    """Forest plot of the paired differences, with both intervals."""
    rows, title = results["comparisons"][::-1], titles(results["summary"])
    if not rows:
        return ""

    def draw(axis: "Axes"):
        for y, row in enumerate(rows):
            for shift, key, color in ((0.12, "seeds", "C0"), (-0.12, "sentences", "C1")):
                if row[key] is not None:
                    axis.plot([100 * end for end in row[key]], [y + shift] * 2, color=color, linewidth=2.5)
            axis.plot(100 * row["difference"], y, "o", color=INK, markersize=5 if row["found"] else 3.5)
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.set_yticks(range(len(rows)), [f"{title[row['a']]} − {title[row['b']]}" for row in rows])
        axis.set_xlabel("points of test accuracy; blue: 95 % over seeds, orange: over sentences")

    return picture(draw, 7.5, 0.5 + 0.33 * len(rows), "Paired differences and their intervals")


def costs(results: dict) -> str:
    """Test accuracy against what it costs, a dot a run."""
    runs, colors = results["runs"], _colors(results)
    kinds: dict[str, Callable[[dict], float | None]] = {
        "minutes of training": lambda run: seconds_of(run) / 60,
        "trained parameters": lambda run: run["trainable_parameters"],
        "silent gates, %": lambda run: (
            100 * run["adapters"]["sparsity"] if run["adapters"] and run["adapters"]["sparsity"] is not None else None
        ),
    }
    drawn = []
    for label, cost in kinds.items():
        points = [(title_of(run), cost(run), 100 * run["test_accuracy"]) for run in runs]
        points = [point for point in points if point[1] is not None]
        if points:
            drawn.append(picture(partial(_scatter, points, label, colors), 3.6, 3.0, f"Accuracy against {label}"))
    return side_by_side(drawn)


def _scatter(points: list[tuple], label: str, colors: dict[str, str], axis: "Axes") -> None:
    for name, color in colors.items():
        if of_method := [point[1:] for point in points if point[0] == name]:
            axis.scatter(*zip(*of_method), color=color, s=16, label=name)
    if label == "trained parameters":
        axis.set_xscale("log")
    axis.set_xlabel(label)
    axis.set_ylabel("test accuracy, %")
    axis.legend(fontsize=FONT - 2, framealpha=0)


def _colors(results: dict) -> dict[str, str]:
    """Of each method's title, the same in all pictures."""
    return {title: f"C{number}" for number, title in enumerate(titles(results["summary"]).values())}


def curves(results: dict) -> str:
    """Loss and accuracy by epoch, a line a run and a bold one for the mean."""
    runs, colors = results["runs"], _colors(results)
    kinds = {
        "training loss": ("loss_by_epoch", 1),
        "validation loss": ("validation_loss_by_epoch", 1),
        "validation accuracy, %": ("validation_by_epoch", 100),
    }
    drawn = []
    for label, (key, factor) in kinds.items():
        by_title = {
            name: [[factor * value for value in run[key]] for run in runs if title_of(run) == name and run.get(key)]
            for name in colors
        }
        if by_title := {name: rows for name, rows in by_title.items() if rows}:
            draw = partial(_lines, by_title, label, colors, "epoch", 1)
            drawn.append(picture(draw, 3.6, 3.0, f"{label} by epoch"))
    return side_by_side(drawn)


def firing(results: dict, rates: dict[str, Curves]) -> str:
    """Mean firing rates by block, a chart a kind of neuron; `rates`: of each kind, in percent."""
    drawn = []
    for kind, by_title in rates.items():
        draw = partial(_lines, by_title, "firing rate, %", _colors(results), "block", 0)
        drawn.append(f"<div><h3>{kind}</h3>{picture(draw, 3.2, 2.5, f'Firing by block: {kind}')}</div>")
    return side_by_side(drawn)


def _lines(curves: Curves, label: str, colors: dict[str, str], unit: str, first: int, axis: "Axes") -> None:
    """`unit`, from `first` on: what the values of a curve are of."""
    for name, rows in curves.items():
        for row in rows:
            axis.plot(range(first, first + len(row)), row, color=colors[name], alpha=0.35)
        if len({len(row) for row in rows}) == 1:
            mean = np.mean(rows, axis=0)
            axis.plot(range(first, first + len(mean)), mean, "o-", color=colors[name], label=name, markersize=3)
    axis.set_xlabel(unit)
    axis.set_xticks(range(first, first + max(len(row) for rows in curves.values() for row in rows)))
    axis.set_ylabel(label)
    axis.legend(fontsize=FONT - 2, framealpha=0)


def modules(results: dict) -> str:
    """Sparsity of gates by block and module."""
    by_name: dict[str, list[float]] = {}
    for run in results["runs"]:
        for name, module in ((run["adapters"] or {}).get("modules") or {}).items():
            if module.get("sparsity") is not None:
                by_name.setdefault(name, []).append(100 * module["sparsity"])
    places = {name: re.search(r"blocks\.(\d+)\.(\w+\.\w+)", name) for name in by_name}
    found = {(int(place[1]), place[2]): np.mean(by_name[name]) for name, place in places.items() if place}
    if not found:
        return ""
    blocks, kinds = sorted({block for block, _ in found}), sorted({kind for _, kind in found})
    grid = np.array([[found.get((block, kind), np.nan) for kind in kinds] for block in blocks])

    def draw(axis: "Axes"):
        axis.imshow(grid, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        axis.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
        axis.set_yticks(range(len(blocks)), [f"block {block}" for block in blocks])
        for y, x in np.ndindex(grid.shape):
            axis.text(x, y, f"{grid[y, x]:.0f}", ha="center", va="center", color="w" if grid[y, x] < 60 else "k")

    words = "Silent gate outputs, %, mean over the runs that have gates."
    return f"<p>{words}</p>" + picture(draw, 6.5, 0.9 + 0.4 * len(blocks), words)
