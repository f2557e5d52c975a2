"""report.html: a comparison on one page, made of its results.json alone.

One file without a request to any network, for light and dark screens, wide and narrow ones: the answer in words, the
table, paired differences with both intervals, accuracy against what it costs, learning curves, sparsity by module,
settings.
"""

import io
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..utils.errors import read_json
from ..utils.files import write_text
from .markdown import learnt_before, methods_rows
from .results import of_today, title_of, titles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"  # what pictures are drawn in; the page's own colour in its place
FONT = 9


def write_page(folder: Path) -> Path:
    """Write `folder`/report.html, of the results.json there.

    Raises:
        ValueError: no results.json, or one of another kind.
    """
    file = folder / "results.json"
    if not file.is_file():
        raise ValueError(f"{folder} must hold the results.json of a comparison by subj_finetune.py, it does not")
    results = read_json(file, keys=("task", "model", "runs", "summary", "baselines", "published", "data"))
    write_text(folder / "report.html", page(results))
    return folder / "report.html"


def page(results: dict) -> str:
    """HTML of `results`, of any schema (see results.py); older ones have fewer sections."""
    results = of_today(results)
    sections = [
        ("", _verdict(results)),
        ("Methods", _methods(results)),
        ("Paired differences", _differences(results)),
        ("Accuracy against what it costs", _costs(results)),
        ("Learning curves", _curves(results)),
        ("Sparsity by module", _modules(results)),
        ("Settings", _settings(results)),
    ]
    body = "\n".join(
        f"<section>{f'<h2>{title}</h2>' if title else ''}\n{text}\n</section>" for title, text in sections if text
    )
    title = escape(f"{results['task']}: {results['model']}")
    return _PAGE.format(title=title, style=_STYLE, body=body)


# ---- words


def verdict(results: dict) -> list[str]:
    """The answer in sentences: which method is best, by how much, whether that is noise, what it costs."""
    summary = results["summary"]
    if not summary:
        return ["No run is finished yet."]
    best = max(summary, key=lambda row: row["test_accuracy"])
    name, seeds = title_of(best), len(best["seeds"])
    spread = "" if best["test_accuracy_spread"] is None else f" ± {100 * best['test_accuracy_spread']:.2f}"
    said = [
        f"{name} has the highest test accuracy, {100 * best['test_accuracy']:.2f}{spread} % ({seeds} "
        f"seed{'s' * (seeds > 1)})."
    ]
    ahead, level = _around(best["method"], results)
    if seeds == 1:
        said.append("With one seed no difference can be called found: other seeds might turn it round.")
    else:
        if ahead:
            said.append(f"It is better than {_listed(ahead)}.")
        if level:
            rest = [f"{title} ({100 * lead:+.2f} points, {words})" for title, lead, words in level]
            said.append(f"It is not told apart from {_listed(rest)}.")
    if alike := [row for row in summary if title_of(row) in {title for title, *_ in level} | {name}]:
        cheapest = min(alike, key=lambda row: row["trainable_parameters"])
        said.append(
            f"{'Of these ' if len(alike) > 1 else ''}{title_of(cheapest)} trains the fewest parameters, "
            f"{cheapest['trainable_parameters']:,}, in {_minutes(cheapest['seconds'])}."
        )
    if results["baselines"]:
        bag = max(results["baselines"], key=lambda row: row["accuracy_test"])
        said.append(f"A bag of words reaches {100 * bag['accuracy_test']:.2f} % ({bag['method']}).")
    return said


def _around(best: str, results: dict) -> tuple[list[str], list[tuple[str, float, str]]]:
    """Titles of the methods that `best` is found to be better than; and of the others title, lead and words."""
    title, ahead, level = titles(results["summary"]), [], []
    for row in results["comparisons"]:
        if best in (row["a"], row["b"]):
            other, sign = (row["b"], 1) if row["a"] == best else (row["a"], -1)
            if row["found"]:
                ahead.append(title[other])
            else:
                level.append((title[other], sign * row["difference"], row["words"]))
    return ahead, level


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.1f} minutes"


# ---- sections


def _verdict(results: dict) -> str:
    data = results["data"]
    counts = " / ".join(f"{data[split]:,} {split}" for split in ("train", "validation", "test") if split in data)
    state = "" if results.get("complete", True) else " <strong>Incomplete: runs are missing.</strong>"
    asked = f"Which way to fine-tune {results['model']} is best on {results['task']} ({counts} sentences)?"
    before = "".join(f"<p>{_emphasised(text, 2, 'strong')}</p>\n" for text in learnt_before(results))
    asked += f" {split}" if (split := results.get("split")) else ""
    return f"<p>{escape(asked)}{state}</p>\n{before}<p class=answer>{escape(' '.join(verdict(results)))}</p>"


def _emphasised(text: str, stars: int, tag: str) -> str:
    """`text` as HTML; what stands between so many asterisks in a `tag`."""
    return re.sub(rf"\*{{{stars}}}(.+?)\*{{{stars}}}", rf"<{tag}>\1</{tag}>", escape(text))


def _methods(results: dict) -> str:
    names, rows = methods_rows(results)
    return _table(["method", *names], rows)


def _table(names: Sequence[str], rows: Sequence[Sequence[str | None]], text: tuple[int, ...] = (0,)) -> str:
    """Columns `text` to the left; what stands between asterisks is emphasised."""

    def cells(tag, row):
        shown = (_emphasised(cell or "", 1, "em") for cell in row)
        return "<tr>" + "".join(f"<{tag}{' class=t' * (n in text)}>{cell}" for n, cell in enumerate(shown))

    lines = [cells("th", names), *(cells("td", row) for row in rows)]
    return "<div class=wide><table>\n" + "\n".join(lines) + "\n</table></div>"


def _differences(results: dict) -> str:
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

    lines = [
        [f"{title[row['a']]} − {title[row['b']]}", f"{100 * row['difference']:+.2f}", row["words"]]
        for row in results["comparisons"]
    ]
    drawn = _picture(draw, 7.5, 0.5 + 0.33 * len(rows), "Paired differences and their intervals")
    return drawn + _table(["difference", "points", "found"], lines, text=(0, 2))


def _costs(results: dict) -> str:
    runs, colors = results["runs"], _colors(results)
    costs: dict[str, Callable[[dict], float | None]] = {
        "minutes of training": lambda run: run["seconds"] / 60,
        "trained parameters": lambda run: run["trainable_parameters"],
        "silent gates, %": lambda run: (
            100 * run["adapters"]["sparsity"] if run["adapters"] and run["adapters"]["sparsity"] is not None else None
        ),
    }
    drawn = []
    for label, cost in costs.items():
        points = [(title_of(run), cost(run), 100 * run["test_accuracy"]) for run in runs]
        points = [point for point in points if point[1] is not None]
        if points:
            drawn.append(_picture(partial(_scatter, points, label, colors), 3.6, 3.0, f"Accuracy against {label}"))
    return f"<div class=row>{''.join(drawn)}</div>" if drawn else ""


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


def _curves(results: dict) -> str:
    runs, colors = results["runs"], _colors(results)
    kinds = {
        "training loss": ("loss_by_epoch", 1),
        "validation loss": ("validation_loss_by_epoch", 1),
        "validation accuracy, %": ("validation_by_epoch", 100),
    }
    drawn = []
    for label, (key, factor) in kinds.items():
        curves = {name: [run[key] for run in runs if title_of(run) == name and run.get(key)] for name in colors}
        if curves := {name: rows for name, rows in curves.items() if rows}:
            drawn.append(_picture(partial(_lines, curves, factor, label, colors), 3.6, 3.0, f"{label} by epoch"))
    gap = [
        [row["title"], *(f"{100 * value:.2f}" for value in (train, row["test_accuracy"], train - row["test_accuracy"]))]
        for row in results["summary"]
        if (train := _mean_of(runs, row["method"], "train_accuracy")) is not None
    ]
    table = _table(["method", "training sentences %", "test %", "gap"], gap) if gap else ""
    return (f"<div class=row>{''.join(drawn)}</div>" if drawn else "") + table


def _mean_of(runs: list[dict], method: str, key: str) -> float | None:
    values = [run[key] for run in runs if run["method"] == method and key in run]
    return float(np.mean(values)) if values else None


def _lines(curves: dict[str, list], factor: float, label: str, colors: dict[str, str], axis: "Axes") -> None:
    for name, rows in curves.items():
        for row in rows:
            axis.plot(range(1, len(row) + 1), [factor * value for value in row], color=colors[name], alpha=0.35)
        if len({len(row) for row in rows}) == 1:
            mean = factor * np.mean(rows, axis=0)
            axis.plot(range(1, len(mean) + 1), mean, "o-", color=colors[name], label=name, markersize=3)
    axis.set_xlabel("epoch")
    axis.set_xticks(range(1, 1 + max(len(row) for rows in curves.values() for row in rows)))
    axis.set_ylabel(label)
    axis.legend(fontsize=FONT - 2, framealpha=0)


def _modules(results: dict) -> str:
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
    return f"<p>{words}</p>" + _picture(draw, 6.5, 0.9 + 0.4 * len(blocks), words)


def _settings(results: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
    shown = escape(json.dumps(results.get("options", {}), indent=1, ensure_ascii=False))
    precision = escape(f"{versions}; {results.get('precision', 'float32')}")
    return f"<p>{precision}</p>\n<details><summary>options.json</summary><pre>{shown}</pre></details>"


def _picture(draw: Callable[["Axes"], None], width: float, height: float, words: str) -> str:
    """An SVG, in inches, in the page's ink."""
    import matplotlib
    from matplotlib.figure import Figure

    ink = {f"{part}.color": INK for part in ("text", "xtick", "ytick")} | {
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
    }
    style = {"svg.fonttype": "none", "svg.hashsalt": words, "font.size": FONT, "font.family": "sans-serif"}
    with matplotlib.rc_context(ink | style):
        figure = Figure(figsize=(width, height), layout="constrained")
        axis = figure.subplots()
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        draw(axis)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", svg[svg.index("<svg") :], count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL).replace(INK, "currentColor")
    return f'<figure role=img aria-label="{escape(words)}" style="max-width:{96 * width:.0f}px">{svg}</figure>'


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; color: #1b1b1b;
  background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.answer { font-size: 1.15rem; border-left: .3rem solid #1f77b4; padding-left: 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #8884; } th { vertical-align: bottom; }
td { white-space: nowrap; } td.t { white-space: normal; } .t { text-align: left; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: .5rem 0; flex: 1 1 16rem; }
svg { width: 100%; height: auto; } pre { overflow-x: auto; font-size: .8rem; }
@media (prefers-color-scheme: dark) { body { color: #e6e6e6; background: #161616; } }
"""

_PAGE = """<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""
