"""What a comparison of fine-tuning methods leaves behind: results.json, results.md and pictures.

results.json, schema "spikegpt_lora/finetune/2":
    schema, task, model, complete   complete is false while runs are missing, or methods have different seeds
    options, versions, data         settings; package versions; sentences per split and how many were cut short
    baselines                       [{method, accuracy_validation, accuracy_test, seconds, parameters}]
    published                       [{method, accuracy}]: figures of the papers, in percent, with a 216M model
    runs                            one a (method, seed), as `training.finetune` returns it:
        task, method, seed, settings (`settings.FinetuneOptions`), trainable_parameters, total_parameters, seconds
        (training and validation), best_epoch, validation_accuracy (null where no epoch was picked),
        validation_by_epoch, sparsity_by_epoch (on validation, of gates), sparsity_by_step (of training batches, where a
        target is held), test_accuracy, test_correct ("0110...", one a sentence), adapters: null or {sparsity,
        dead_ranks, contribution, modules (see `trace.AdapterActivity`), accuracy_without: with adapters turned off}
    summary                         one a method: seeds, mean and spread (sample standard deviation) of what runs hold
    comparisons                     [{a, b, difference, low, high, per_seed, is_noise}]: see `statistics`
Accuracies, sparsity and dead_ranks are fractions of 1; seconds are wall-clock.
"""

import json
from itertools import combinations
from pathlib import Path

import numpy as np

from ..observe.traces import GATE, SpikeTrace
from ..utils.errors import DamagedFile, read_json
from ..utils.files import whole_file
from .paired import paired_difference

SCHEMA = "spikegpt_lora/finetune/2"

TRIAL_KEYS = ("method", "seed", "settings", "best_epoch", "validation_accuracy", "adapters")
RUN_KEYS = (*TRIAL_KEYS, "test_accuracy", "test_correct", "seconds", "trainable_parameters", "total_parameters")

# Subj, SpikeGPT-216M on a GPU: SpikeGPT's own figures for the first two, SpikeLoRA's for the others.
PUBLISHED = {
    "subj": [
        {"method": "SpikeGPT from scratch", "accuracy": 89.10},
        {"method": "full fine-tuning", "accuracy": 95.30},
        {"method": "LoRA", "accuracy": 90.70},
        {"method": "SpikeLoRA", "accuracy": 91.10},
    ]
}

NAMES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "spikelora": "SpikeLoRA",
    "head": "head only (frozen model)",
    "scratch": "full, from scratch",
}


def read_runs(out: Path) -> list[dict]:
    """The records of the finished runs in a comparison's folder.

    Raises:
        DamagedFile: a run.json that is none, or of another run than its folder's name says.
    """
    runs = []
    for file in sorted(out.glob("*/seed*/run.json")):
        run = read_json(file, keys=RUN_KEYS)
        place = f"{file.parents[1].name}/{file.parent.name}"
        if run["method"] not in NAMES or place != f"{run['method']}/seed{run['seed']}":
            raise DamagedFile(
                f"{file} must be the record of {place}, is that of {run['method']!r} with seed {run['seed']!r}: "
                "move it out of this folder"
            )
        runs.append(run)
    return runs


def summarize(runs: list[dict]) -> list[dict]:
    """One row a method, in the order of NAMES: mean and spread over its seeds."""
    rows = []
    for method in [name for name in NAMES if any(run["method"] == name for run in runs)]:
        of_method = [run for run in runs if run["method"] == method]
        row = {"method": method, "seeds": sorted(run["seed"] for run in of_method)}
        row["trainable_parameters"] = of_method[0]["trainable_parameters"]
        for key in ("validation_accuracy", "test_accuracy", "seconds"):
            row[key], row[f"{key}_spread"] = _mean_and_spread([run[key] for run in of_method])
        for key in ("sparsity", "dead_ranks", "contribution", "accuracy_without"):
            values = [run["adapters"][key] for run in of_method if run["adapters"]]
            row[key] = float(np.mean(values)) if values and None not in values else None
        rows.append(row)
    return rows


def _mean_and_spread(values: list[float | None]) -> tuple[float | None, float | None]:
    if None in values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def compare(runs: list[dict]) -> list[dict]:
    """Paired difference in test accuracy for each pair of methods, on the seeds that both have."""
    comparisons = []
    for a, b in combinations([name for name in NAMES if any(run["method"] == name for run in runs)], 2):
        correct = {name: {run["seed"]: run["test_correct"] for run in runs if run["method"] == name} for name in (a, b)}
        seeds = sorted(correct[a].keys() & correct[b].keys())
        if seeds:
            bits = [[[int(bit) for bit in correct[name][seed]] for seed in seeds] for name in (a, b)]
            difference = paired_difference(*bits)
            comparisons.append({"a": a, "b": b, **vars(difference), "is_noise": difference.is_noise})
    return comparisons


def markdown(results: dict) -> str:
    """The tables of results.json as Markdown; the task's and the model's name stand on top."""
    data = results["data"]
    counts = " / ".join(f"{data[split]:,} {split}" for split in ("train", "validation", "test") if split in data)
    lines = [
        f"# {results['task']}: {results['model']}" + ("" if results["complete"] else " (incomplete: runs are missing)"),
        "",
        f"Sentences: {counts}. "
        + ("The epoch was picked on validation, the" if "validation" in data else "The last epoch counts; the")
        + " test split was read once a run.",
        "",
        "| method | trained parameters | test accuracy % | validation % | seconds | sparsity % | dead ranks % "
        "| adapter / W0x | adapters off % |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [_row(row) for row in results["summary"]]
    for row in results["baselines"]:
        lines.append(
            f"| {row['method']} | {row['parameters']:,} | {100 * row['accuracy_test']:.2f} | "
            f"{100 * row['accuracy_validation']:.2f} | {row['seconds']:.1f} | – | – | – | – |"
        )
    for row in results["published"]:
        lines.append(f"| *published, 216M model: {row['method']}* | | *{row['accuracy']:.2f}* | | | | | | |")
    lines += ["", f"Mean ± standard deviation over seeds {_seeds(results['summary'])}.", _LEGEND]
    if results["comparisons"]:
        lines += [
            "",
            "| paired difference on the test split, points | mean | 95 % interval over sentences and seeds | |",
        ]
        lines += ["| --- | ---: | ---: | --- |"] + [_comparison(row) for row in results["comparisons"]]
    return "\n".join(lines) + "\n"


def model_card(results: dict, record: dict) -> str:
    """The README.md of one run's folder, in the hub's format: what it is, what it scored, how to load and repeat it."""
    adapter = record["adapters"] or {}
    activity = [f"- {key.replace('_', ' ')}: {value:.4f}" for key, value in adapter.items() if isinstance(value, float)]
    versions = [f"{name} {version}" for name, version in results["versions"].items()]
    return _CARD.format(
        library="peft" if adapter else "transformers",
        auto="AutoPeftModelForSequenceClassification" if adapter else "AutoModelForSequenceClassification",
        task=results["task"],
        name=NAMES[record["method"]],
        start="new weights in the shape of" if record["method"] == "scratch" else "starts from",
        model=results["model"],
        test_sentences=results["data"]["test"],
        validation=_validation(record),
        details="\n".join([*activity, "- " + ", ".join(versions)]),
        options=json.dumps(results["options"], indent=1),
        test_accuracy=100 * record["test_accuracy"],
        **{key: record[key] for key in ("seed", "trainable_parameters", "total_parameters")},
    )


def _validation(record: dict) -> str:
    epoch = f"epoch {record['best_epoch']} of {record['settings']['epochs']}"
    if record["validation_accuracy"] is None:
        return f"{epoch}: nothing was picked"
    return f"validation accuracy {100 * record['validation_accuracy']:.2f} % ({epoch}, picked there)"


def trials(records: list[dict]) -> str:
    """What tuning tried, as Markdown: the best trial of each method first."""
    names = ["learning_rate", "epochs", "dropout", "word_dropout", "warmup", "rank", "v_threshold"]
    head = ["method", *names, "best epoch", "validation %", "sparsity %"]
    rows = []
    for method in [name for name in NAMES if any(record["method"] == name for record in records)]:
        of_method = [record for record in records if record["method"] == method]
        for record in sorted(of_method, key=lambda record: -record["validation_accuracy"]):
            values = [f"{record['settings'][name]:g}" for name in names]
            accuracy = f"{100 * record['validation_accuracy']:.2f}"
            gates = (record["adapters"] or {}).get("sparsity")
            sparsity = "–" if gates is None else f"{100 * gates:.1f}"
            rows.append([NAMES[method], *values, str(record["best_epoch"]), accuracy, sparsity])
    return table(head, rows) + "\n"


def table(names: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: the first column to the left, the others (numbers) to the right."""
    lines = [names, ["---"] + ["---:"] * (len(names) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


_CARD = """---
library_name: {library}
pipeline_tag: text-classification
---

# SpikeGPT on {task}: {name}, seed {seed}

- {start} ../../base/seed{seed} (model: {model})
- trained parameters: {trainable_parameters:,} of {total_parameters:,}
- test accuracy {test_accuracy:.2f} % on {test_sentences:,} sentences
- {validation}
{details}

```python
import spikegpt_lora
from {library} import {auto}
model = {auto}.from_pretrained("FOLDER")
```

Made by recipes/subj_finetune.py with these settings:

```json
{options}
```

Trained on English film sentences alone: not meant for other text. One seed says little; see results.md.
"""

_LEGEND = (
    "Sparsity: silent share of the gate's outputs over all real tokens of the test split; dead ranks: units that never "
    "fired there; adapter / W0x: norm of what the adapters add over the norm of what the frozen weights give; "
    "adapters off: test accuracy with the trained `score` alone. "
    "Methods of one seed start from the same model and read the sentences in the same order."
)


def _seeds(summary: list[dict]) -> str:
    by_method = {NAMES[row["method"]]: ", ".join(map(str, row["seeds"])) for row in summary}
    if len(set(by_method.values())) <= 1:
        return next(iter(by_method.values()), "(none yet)")
    return "that differ: " + "; ".join(f"{name} {seeds}" for name, seeds in by_method.items())


def _row(row: dict) -> str:
    def percent(key):
        if row[key] is None:
            return "–"
        spread = row.get(f"{key}_spread")
        return f"{100 * row[key]:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")

    contribution = "–" if row["contribution"] is None else f"{row['contribution']:.3f}"
    return (
        f"| {NAMES[row['method']]} | {row['trainable_parameters']:,} | {percent('test_accuracy')} | "
        f"{percent('validation_accuracy')} | {row['seconds']:.0f} | {percent('sparsity')} | {percent('dead_ranks')} | "
        f"{contribution} | {percent('accuracy_without')} |"
    )


def _comparison(row: dict) -> str:
    verdict = "noise: the interval holds 0" if row["is_noise"] else ""
    return (
        f"| {NAMES[row['a']]} − {NAMES[row['b']]} | {100 * row['difference']:+.2f} | "
        f"{100 * row['low']:+.2f} … {100 * row['high']:+.2f} | {verdict} |"
    )


def draw_raster(trace: SpikeTrace, path: Path, sentence: int = 0, title: str = "") -> None:
    """Draw one sentence's spikes as a PNG: words on the time axis, one panel a population, black = spike."""
    from matplotlib.figure import Figure  # a Figure of its own: no pyplot, no global backend

    length = int(trace.lengths[sentence])
    layers = [name for name in trace.spikes if GATE not in name]
    gates = [name for name in trace.spikes if GATE in name]
    panels = [(name, trace.spikes[name][sentence, :length]) for name in layers]
    if gates:  # one panel for all gates: their units stacked
        panels.append(("adapter gates", np.concatenate([trace.spikes[g][sentence, :length] for g in gates], axis=1)))
    figure = Figure(figsize=(max(6, 0.42 * length), 1.35 * len(panels) + 1.2), layout="constrained")
    for axis, (name, spikes) in zip(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels):
        axis.imshow(spikes.T, cmap="Greys", vmin=0, aspect="auto", interpolation="nearest", origin="lower")
        axis.set_ylabel(f"{spikes.shape[1]} units")
        axis.set_title(f"{name}: {100 * (spikes != 0).mean():.1f} % firing", fontsize=8, loc="left", pad=2)
        axis.tick_params(labelsize=7)
        axis.yaxis.label.set_fontsize(7)
    words = trace.words[sentence, :length]
    first = [t for t in range(length) if t == 0 or words[t] != words[t - 1]]  # a word of several tokens is named once
    axis.set_xticks(first, words[first], rotation=60, ha="right", fontsize=8)
    figure.suptitle(title, fontsize=9)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=240)


def draw_accuracy(results: dict, path: Path) -> None:
    """Draw test accuracy by method as a PNG: a dot a seed, a line at the mean; baselines as horizontal lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for x, row in enumerate(results["summary"]):
        accuracy = [100 * run["test_accuracy"] for run in results["runs"] if run["method"] == row["method"]]
        axis.scatter([x] * len(accuracy), accuracy, color="C0", zorder=3)
        axis.hlines(np.mean(accuracy), x - 0.25, x + 0.25, color="C0")
    for style, row in zip(("--", ":"), results["baselines"]):
        axis.axhline(100 * row["accuracy_test"], color="gray", linestyle=style, label=row["method"])
    axis.set_xticks(range(len(results["summary"])), [NAMES[row["method"]] for row in results["summary"]], fontsize=8)
    axis.set_ylabel("test accuracy, %")
    axis.set_title(f"{results['task']}, {results['model']}: one dot a seed", fontsize=9)
    axis.grid(axis="y", alpha=0.3)
    if results["baselines"]:
        axis.legend(fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
