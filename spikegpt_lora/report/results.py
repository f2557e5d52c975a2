"""What a comparison of fine-tuning methods leaves behind: results.json, results.md, results.csv and pictures.

results.json, schema "spikegpt_lora/finetune/3" (2 had of comparisons difference, low, high, per_seed and is_noise):
    schema, task, model, complete   complete is false while runs are missing, or methods have different seeds
    precision                       float32 or bfloat16 (mixed): of training, validation, test and traces; since 0.3.0
    options, versions, data         settings; package versions; sentences per split and how many were cut short
    split                           where the splits are from, in a sentence; "" where all are ours; since 0.3.0
    baselines                       [{method, accuracy_validation, accuracy_test, mcc_test (since 0.3.0), seconds,
                                    parameters}]; where seeds have splits of their own (since 0.3.0) the mean of each
                                    over seeds and its _spread, with no accuracy_validation
    published                       [{method, accuracy}]: figures of the papers, in percent, with a 216M model
    metric                          "MCC" where papers give it of this task, and tables show it; else "accuracy"; since
                                    0.3.0
    first                           what methods learn from beside the task, {intermediate: null or {task, sentences,
                                    left_out}, teacher: null or {name, sentences, validation_accuracy, seconds}}; since
                                    0.3.0
    runs                            one a (method, seed), as `finetune.run.finetune` returns it:
        task, method, title, seed, settings (`finetune.options.FinetuneOptions`), trainable_parameters,
        total_parameters, seconds (training and validation), best_epoch, validation_accuracy (null where no epoch was
        picked), validation_by_epoch, sparsity_by_epoch (on validation, of gates), sparsity_by_step (of training
        batches, where a target is held), weight_reads (share of the blocks' weights that a token of the validation
        split reads; null where matrices read real numbers), test_accuracy, test_mcc (Matthews' correlation, -1 ... 1;
        since 0.3.0), test_correct ("0110...", one a sentence),
        adapters: null or {sparsity, dead_ranks, contribution, modules (see `observe.adapters.AdapterActivity`),
        accuracy_without: with adapters turned off};
        since 0.3.0 loss_by_epoch (of training, its steps' mean), validation_loss_by_epoch, train_accuracy (in the end,
        on the first 1,000 training sentences), weight_reads, and
        intermediate: null or {sentences, seconds, accuracy: on validation, without one label of the task},
        made: {command, processor (its name), threads (of torch), python, system, commit (of the package, null where
        nothing says it)}: each run has its own, as a comparison may go on elsewhere
    summary                         one a method: title, seeds; mean and spread (sample deviation) of what runs hold;
                                    its seconds are those of the intermediate task too
    comparisons                     [{a, b, found, words, p_corrected (`paired.holm`), and what a `PairedDifference`
                                    holds, low and high too}]
Accuracies, sparsity and dead_ranks are fractions of 1; seconds are wall-clock.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from ..utils.errors import DamagedFile, read_json
from .paired import PairedDifference, holm, paired_difference

SCHEMA = "spikegpt_lora/finetune/3"

LEVEL = 0.05  # of p, corrected, below which a difference is found

TRIAL_KEYS = ("method", "seed", "settings", "best_epoch", "validation_accuracy", "adapters")

RUN_KEYS = (*TRIAL_KEYS, "test_accuracy", "test_correct", "seconds", "trainable_parameters", "total_parameters")

# Of records that hold no title, as those of 0.2.0; and the order in which tables name methods, others last.
_TITLES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "spikelora": "SpikeLoRA",
    "head": "head only (frozen model)",
    "scratch": "full, from scratch",
}


# What runs of one method may differ in beside the seed; a record holds those that its comparison has several values of.
SETTINGS = ("rank", "v_threshold", "learning_rate", "dropout", "budget")


def folder_of(run: dict) -> str:
    """Where a comparison's folder holds a run: METHOD/seed0, or METHOD-rank8-v_threshold0.25/seed0 where these are
    compared too."""
    settings = "".join(f"-{name}{run[name]}" for name in SETTINGS if name in run)
    return f"{run['method']}{settings}/seed{run['seed']}"


def seconds_of(run: dict) -> float:
    """Of all that a run trained, the intermediate task included."""
    return run["seconds"] + (run.get("intermediate") or {"seconds": 0})["seconds"]


def read_runs(out: Path, keys: Sequence[str] = RUN_KEYS) -> list[dict]:
    """The records of the finished runs in a comparison's folder; `keys`: what each must hold.

    Raises:
        DamagedFile: a run.json that is none, or of another run than its folder's name says.
    """
    runs = []
    for file in sorted(out.glob("*/seed*/run.json")):
        run = read_json(file, keys=keys)
        place = f"{file.parents[1].name}/{file.parent.name}"
        if place != folder_of(run):
            raise DamagedFile(
                f"{file} must be the record of {place}, is that of {run['method']!r} with seed {run['seed']!r}: "
                "move it out of this folder"
            )
        runs.append(run)
    return runs


def titles(records: list[dict]) -> dict[str, str]:
    """The title of each method that `records` (runs, trials, rows of the summary) name, in the order of tables."""
    named = _TITLES | {record["method"]: title_of(record) for record in records}
    return {method: title for method, title in named.items() if any(record["method"] == method for record in records)}


def title_of(record: dict) -> str:
    return record.get("title") or _TITLES.get(record["method"], record["method"])


def summarize(runs: list[dict]) -> list[dict]:
    """One row a method: mean and spread over its seeds."""
    rows = []
    for method, title in titles(runs).items():
        of_method = [run for run in runs if run["method"] == method]
        row = {"method": method, "title": title, "seeds": sorted(run["seed"] for run in of_method)}
        row["trainable_parameters"] = of_method[0]["trainable_parameters"]
        row["seconds"], row["seconds_spread"] = mean_and_spread([seconds_of(run) for run in of_method])
        for key in ("validation_accuracy", "test_accuracy", "test_mcc"):
            row[key], row[f"{key}_spread"] = mean_and_spread([run.get(key) for run in of_method])
        for key in ("sparsity", "dead_ranks", "contribution", "accuracy_without"):
            values = [run["adapters"][key] for run in of_method if run["adapters"]]
            row[key] = float(np.mean(values)) if values and None not in values else None
        reads = [run.get("weight_reads") for run in of_method]
        row["weight_reads"] = None if None in reads else float(np.mean(reads))
        rows.append(row)
    return rows


def mean_and_spread(values: list[float | None]) -> tuple[float | None, float | None]:
    """Of runs; None where one of them has no such value, or for the spread where there is one run."""
    if None in values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def compare(runs: list[dict], disjoint: bool = False) -> list[dict]:
    """Paired difference in test accuracy for each pair of methods, on the seeds that both have; `disjoint`: each seed
    tests sentences of its own, as folds do."""
    title, pairs = titles(runs), []
    for a, b in combinations(title, 2):
        of_method = {name: _by_seed(runs, name) for name in (a, b)}
        seeds = sorted(of_method[a].keys() & of_method[b].keys())
        if seeds:
            rows = [_correct(of_method[name], seeds) for name in (a, b)]
            pairs.append((a, b, paired_difference(*rows, folds=disjoint)))
    comparisons, corrected = [], holm([difference.p for *_, difference in pairs])
    for (a, b, difference), p in zip(pairs, corrected):
        row = {"a": a, "b": b, **vars(difference), "low": difference.low, "high": difference.high, "p_corrected": p}
        better = title[a] if difference.difference > 0 else title[b]
        words = f"{better} is better" if p < LEVEL else not_found(difference, "folds" if disjoint else "seeds")
        comparisons.append(row | {"found": p < LEVEL, "words": words})
    return comparisons


def of_today(results: dict) -> dict:
    """`results` of any schema, with comparisons of this one: an older file's are made again from its runs, and where it
    has none there are none."""
    if all("words" in row for row in results["comparisons"]):
        return results
    folds = results.get("options", {}).get("folds") is not None
    return results | {"comparisons": compare(results["runs"], disjoint=folds)}


def not_found(difference: PairedDifference, rows: str = "seeds") -> str:
    """What a difference that is not found says, in words; `rows`: what it is over."""
    if difference.detectable is None:
        return "one seed: over sentences only"
    seen = f"{100 * difference.detectable:.1f} points would have been seen"
    return f"no measurable difference at {len(difference.per_seed)} {rows}; {seen}"


def accuracy_and_reads(folders: dict[str, list[dict]]) -> list[dict]:
    """What integer spikes cost over several comparisons: one dict a folder and method with folder, method, title, seeds
    (how many), validation_accuracy, test_accuracy, weight_reads (means; the last None where real numbers were read),
    and what lies between it and the same method of the first folder, on the seeds that both have:
    validation_difference (a mean) and test_difference (a `PairedDifference`), both None in the first.

    Args:
        folders: records of runs, by the name of their folder.
    """
    first, points = next(iter(folders.values())), []
    for folder, runs in folders.items():
        for row in summarize(runs):
            mine, base = _by_seed(runs, row["method"]), _by_seed(first, row["method"])
            point = {name: row[name] for name in ("method", "title", "validation_accuracy", "test_accuracy")}
            point |= {"folder": folder, "seeds": len(mine), "weight_reads": row["weight_reads"]}
            shared = [] if runs is first else sorted(mine.keys() & base.keys())
            point["validation_difference"] = point["test_difference"] = None
            if shared:
                validation = [mine[seed]["validation_accuracy"] - base[seed]["validation_accuracy"] for seed in shared]
                point["validation_difference"] = float(np.mean(validation))
                point["test_difference"] = paired_difference(_correct(mine, shared), _correct(base, shared))
            points.append(point)
    return points


def _by_seed(runs: list[dict], method: str) -> dict[int, dict]:
    return {run["seed"]: run for run in runs if run["method"] == method}


def _correct(runs: dict[int, dict], seeds: list[int]) -> list[list[int]]:
    return [[int(bit) for bit in runs[seed]["test_correct"]] for seed in seeds]
