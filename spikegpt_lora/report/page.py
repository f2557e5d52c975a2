"""report.html: a comparison on one page, made of its results.json, and of what else its folder holds.

The answer in words, the table, paired differences with both intervals, accuracy against what it costs, learning curves,
sparsity by module, settings; of predictions what was confused, of traces a sentence's raster and firing by depth.
"""

import json
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path

import numpy as np

from ..observe.traces import SpikeTrace
from ..utils.errors import read_json
from ..utils.files import write_text
from . import charts
from .markdown import learnt_before, methods_rows
from .markup import document, emphasised, folded, picture, side_by_side, table
from .predictions import Prediction, confusion, read_predictions, worst
from .results import folder_of, of_today, title_of, titles
from .spikes import draw_sentence, firing_by_block, record_text, shown_sentences, size_of, trace_of


def read_results(folder: Path) -> dict:
    """The results.json of a comparison's folder.

    Raises:
        ValueError: there is none, or one of another kind.
    """
    file = folder / "results.json"
    if not file.is_file():
        raise ValueError(f"{folder} must hold the results.json of a comparison by subj_finetune.py, it does not")
    return read_json(file, keys=("task", "model", "runs", "summary", "baselines", "published", "data"))


def write_page(results: dict, folder: Path, text: str | None = None) -> Path:
    """Write `folder`/report.html, of the `results` of its results.json; `text`: a sentence of one's own that its model
    reads, for a raster beside those of test sentences.

    Raises:
        ValueError: damaged predictions or traces; for `text`, no model.
    """
    write_text(folder / "report.html", page(results, folder, text))
    return folder / "report.html"


def page(results: dict, folder: Path | None = None, text: str | None = None) -> str:
    """HTML of `results`, of any schema (see results.py), and of what else `folder` holds; of what is missing there are
    no sections. `text`: see `write_page`."""
    results = of_today(results)
    sections = [
        ("", _verdict(results)),
        ("Methods", _methods(results)),
        ("Paired differences", _differences(results)),
        ("Accuracy against what it costs", charts.costs(results)),
        ("Learning curves", _curves(results)),
        ("Sparsity by module", charts.modules(results)),
    ]
    if folder is not None:
        sections += [
            ("What is confused", _confused(results, folder)),
            ("A sentence's spikes", _rasters(results, folder, text)),
            ("Firing by depth", _firing(results, folder)),
        ]
    return document(f"{results['task']}: {results['model']}", [*sections, ("Settings", _settings(results))])


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
    ahead, level, behind = _around(best["method"], results)
    if seeds == 1:
        said.append("With one seed no difference can be called found: other seeds might turn it round.")
    else:
        if ahead:
            said.append(f"It is better than {_listed(ahead)}.")
        if level:
            rest = [f"{title} ({100 * lead:+.2f} points, {words})" for title, lead, words in level]
            said.append(f"It is not told apart from {_listed(rest)}.")
        if behind:
            said.append(f"On the seeds that both have, {_listed(behind)} {'is' if len(behind) == 1 else 'are'} better.")
    alike = [row for row in summary if title_of(row) in {title for title, *_ in level} | {name}]
    if len(alike) == 1:
        said.append(f"It trains {best['trainable_parameters']:,} parameters in {_minutes(best['seconds'])}.")
    else:
        fewest = min(row["trainable_parameters"] for row in alike)
        small = [row for row in alike if row["trainable_parameters"] == fewest]
        times = [f"{title_of(row)} (in {_minutes(row['seconds'])})" for row in small]
        said.append(f"Of these {_listed(times)} train{'s' * (len(small) == 1)} the fewest parameters, {fewest:,}.")
    if results["baselines"]:
        bag = max(results["baselines"], key=lambda row: row["accuracy_test"])
        said.append(f"A bag of words reaches {100 * bag['accuracy_test']:.2f} % ({bag['method']}).")
    return said


def _around(best: str, results: dict) -> tuple[list[str], list[tuple[str, float, str]], list[str]]:
    """Titles of the methods that `best` is found to be better than; of those that it is not told apart from title, lead
    and words; titles of those that are found better on the seeds that both have, where it has others too."""
    title, ahead, level, behind = titles(results["summary"]), [], [], []
    for row in results["comparisons"]:
        if best in (row["a"], row["b"]):
            other, sign = (row["b"], 1) if row["a"] == best else (row["a"], -1)
            if row["found"]:
                (ahead if sign * row["difference"] > 0 else behind).append(title[other])
            else:
                level.append((title[other], sign * row["difference"], row["words"]))
    return ahead, level, behind


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
    before = "".join(f"<p>{emphasised(text, 2, 'strong')}</p>\n" for text in learnt_before(results))
    asked += f" {split}" if (split := results.get("split")) else ""
    return f"<p>{escape(asked)}{state}</p>\n{before}<p class=answer>{escape(' '.join(verdict(results)))}</p>"


def _methods(results: dict) -> str:
    names, rows = methods_rows(results)
    return table(["method", *names], rows, shown=partial(emphasised, stars=1, tag="em"))


def _differences(results: dict) -> str:
    title = titles(results["summary"])
    lines = [
        [f"{title[row['a']]} − {title[row['b']]}", f"{100 * row['difference']:+.2f}", row["words"]]
        for row in results["comparisons"]
    ]
    return charts.differences(results) + table(["difference", "points", "found"], lines, text=(0, 2)) if lines else ""


def _curves(results: dict) -> str:
    gap = [
        [row["title"], *(f"{100 * value:.2f}" for value in (train, row["test_accuracy"], train - row["test_accuracy"]))]
        for row in results["summary"]
        if (train := _mean_of(results["runs"], row["method"], "train_accuracy")) is not None
    ]
    return charts.curves(results) + (table(["method", "training sentences %", "test %", "gap"], gap) if gap else "")


def _mean_of(runs: list[dict], method: str, key: str) -> float | None:
    values = [run[key] for run in runs if run["method"] == method and key in run]
    return float(np.mean(values)) if values else None


# ---- sections of predictions


def _confused(results: dict, folder: Path) -> str:
    answers: dict[str, list[list[Prediction]]] = {}
    for run in results["runs"]:
        if (file := folder / folder_of(run) / "predictions.tsv").is_file():
            answers.setdefault(run["method"], []).append(read_predictions(file))
    shown = [row for row in results["summary"] if row["method"] in answers]
    if not shown:
        return ""
    everything = [one for runs in answers.values() for run in runs for one in run]
    labels = sorted({one.label for one in everything} | {one.prediction for one in everything})
    tables = [f"<div><h3>{escape(title_of(row))}</h3>{_matrix(answers[row['method']], labels)}</div>" for row in shown]
    words = "Test sentences by their class and by what a method takes them for, counted over its seeds."
    best = max(shown, key=lambda row: row["test_accuracy"])
    return f"<p>{words}</p>{side_by_side(tables)}{_worst(answers, best)}"


def _matrix(runs: list[list[Prediction]], labels: list[str]) -> str:
    counts = confusion(one for run in runs for one in run)
    rows = [[label, *(f"{counts[label, said]:,}" for said in labels)] for label in labels]
    return table(["class", *(f"taken for {label}" for label in labels)], rows)


def _worst(answers: dict[str, list[list[Prediction]]], row: dict) -> str:
    mistakes = [
        [
            one.sentence,
            one.label,
            one.prediction,
            f"{one.probability:.3f}",
            "{} of {}".format(*one.wrong),
            "{} of {}".format(*one.wrong_elsewhere),
        ]
        for one in worst(answers, row["method"])
    ]
    if not mistakes:
        return ""
    names = ["sentence", "class", "taken for", "probability", "seeds wrong", "other methods' runs wrong"]
    return folded(
        f"The {len(mistakes)} sentences that {title_of(row)} is most confidently wrong about (mean over its seeds)",
        table(names, mistakes, text=(0, 1, 2)),
    )


# ---- sections of traces


def _rasters(results: dict, folder: Path, text: str | None) -> str:
    """Of the best method with gates, else of the best, a sentence of each class; before them `text`."""
    rows = sorted(results["summary"], key=lambda row: (row["sparsity"] is None, -row["test_accuracy"]))
    runs = (run for row in rows for run in results["runs"] if run["method"] == row["method"])
    run, trace = next(((run, trace) for run in runs if (trace := trace_of(folder, run))), (None, None))
    if run is None or trace is None:
        if text is not None:
            raise ValueError(f"{folder} must hold the traces of a run for --trace-text, it has none: run it again")
        return ""
    drawn = [_raster(trace, one, trace, _named(folder, run, trace, one)) for one in shown_sentences(trace)]
    if text is not None:
        own, answer = record_text(folder, run, text, results.get("options", {}).get("max_length", 128))
        drawn.insert(0, _raster(own, 0, trace, f"Your sentence: {answer}"))
    words = f"{title_of(run)}, seed {run['seed']}. {_BANDS.format(sentences=len(trace.lengths))}"
    return f"<p>{escape(words)}</p>{side_by_side(drawn)}"


_BANDS = (
    "Each band is a population, from the embedding downwards; in it, the neurons that fire most often over {sentences} "
    "test sentences stand on top. Blue is a spike, the larger the stronger, orange one below 0. Red neurons are dead: "
    "they fire in none of these sentences."
)


def _raster(trace: SpikeTrace, sentence: int, others: SpikeTrace, heading: str) -> str:
    width, height = size_of(trace, sentence)
    draw = partial(draw_sentence, trace, sentence, others)
    drawn = picture(draw, width, height, f"Spikes over tokens. {heading}")
    # A long sentence has a row of its own, and on a narrow screen it is wider than that.
    scrolled = f'<div style="min-width:{60 * width:.0f}px">{drawn}</div>'
    return f'<div class=wide style="flex-basis:{84 * width:.0f}px"><h3>{escape(heading)}</h3>{scrolled}</div>'


def _named(folder: Path, run: dict, trace: SpikeTrace, sentence: int) -> str:
    """A recorded test sentence with its class, by name where the run left predictions."""
    file = folder / folder_of(run) / "predictions.tsv"
    known = read_predictions(file)[sentence].label if file.is_file() else f"class {trace.labels[sentence]}"
    return f"Test sentence {sentence + 1}, {known}"


def _firing(results: dict, folder: Path) -> str:
    rates: dict[str, charts.Curves] = {}
    for run in results["runs"]:
        if trace := trace_of(folder, run):
            for kind, by_block in firing_by_block(trace).items():
                curves = rates.setdefault(kind, {}).setdefault(title_of(run), [])
                curves.append([100 * rate for rate in by_block])
    if not rates:
        return ""
    words = "Share of neurons that fire at a token, over the recorded test sentences; a line a seed, dots the mean."
    return f"<p>{words}</p>{charts.firing(results, rates)}"


# ---- settings


def _settings(results: dict) -> str:
    options, made = results.get("options", {}), [run["made"] for run in results["runs"] if run.get("made")]

    def distinct(key: str) -> str:
        return "; ".join(dict.fromkeys(str(one[key]) for one in made if one[key] is not None))

    facts = {
        "processor": distinct("processor"),
        "threads": distinct("threads"),
        "system": distinct("system"),
        "python": distinct("python"),
        "packages": ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items()),
        "commit": distinct("commit"),
        "precision": results.get("precision", "float32"),
        "sha256 of the sentences": options.get("text_sha256"),
        "sha256 of the weights to start from": options.get("model_sha256"),
    }
    rows = [[name, value] for name, value in facts.items() if value]
    commands = "\n".join(dict.fromkeys(one["command"] for one in made))
    shown = f"<pre>{escape(json.dumps(options, indent=1, ensure_ascii=False))}</pre>"
    return (
        table(["what", "of the runs"], rows, text=(0, 1))
        + (f"<p>Made by</p><pre class=wrap>{escape(commands)}</pre>" if commands else "")
        + folded("options.json", shown)
    )
