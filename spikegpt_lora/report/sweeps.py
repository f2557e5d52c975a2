"""Runs of an encoder under several settings (`results.SETTINGS`): each setting in a row, beside LoRA at the same one.

A row (`summarize_settings`) holds method, the settings that its runs hold, seeds, trainable (parameters), step_ms
(median), and over its seeds mean and _spread (sample deviation) of
    METRIC, loss    on dev; loss in nats
    gap             METRIC on as many training sentences, in evaluation mode, minus METRIC
    sparsity, dead_ranks
each None where a run does not have it; what stands beside LoRA, on the seeds that both have:
    minus_lora, minus_lora_seeds    METRIC minus LoRA's by seed, [] where there is no such LoRA; its interval (t)
    accuracy_minus_lora             `paired.PairedDifference` as a dict, None without LoRA or sentences' outcomes
and grad_norm: null or {mean, sd, max} of the adapters' gradient over all steps, before it is clipped.
"""

from collections.abc import Sequence

import numpy as np

from .markdown import interval, percent, table
from .paired import paired_difference, seeds_interval
from .results import SETTINGS, folder_of, mean_and_spread

PLAIN = "lora"

LEGEND = (
    "Mean ± standard deviation over seeds. Minus LoRA: at the same rank, and of several learning rates at the same; "
    "over seeds: 95 % interval of the mean (t); over sentences: accuracy, its interval by bootstrap; neither is "
    "corrected for the number of rows. Train - dev: the same measure on as many training sentences, in evaluation "
    "mode, minus that on dev. Gradient norm: of the adapters, before clipping, mean ± standard deviation over steps."
)

NAMES = {"mcc": "MCC x 100", "accuracy": "accuracy %", "f1": "F1 %"}


def by_setting(runs: Sequence[dict]) -> dict[str, list[dict]]:
    """Runs that differ in nothing but the seed, by the name of their folder, in the order of the first of each."""
    alike: dict[str, list[dict]] = {}
    for run in runs:
        alike.setdefault(folder_of(run).rpartition("/")[0], []).append(run)
    return alike


def summarize_settings(runs: Sequence[dict], metric: str) -> list[dict]:
    """One row a method and setting."""
    rows = []
    for alike in by_setting(runs).values():
        first = alike[0]
        row = {"method": first["method"]} | {name: first[name] for name in SETTINGS if name in first}
        row |= {"seeds": [run["seed"] for run in alike], "trainable": first["trainable"]}
        row["step_ms"] = float(np.median([run["step_ms"] for run in alike]))
        gaps = [run[f"train_{metric}"] - run[metric] for run in alike]
        row["gap"], row["gap_spread"] = mean_and_spread(gaps)
        for key in (metric, "loss", "sparsity", "dead_ranks"):
            row[key], row[f"{key}_spread"] = mean_and_spread([run.get(key) for run in alike])
        row["grad_norm"] = _norms([run.get("grad_norm") for run in alike])
        rows.append(row | _beside(alike, plain_of(first, runs), metric))
    return rows


def plain_of(run: dict, runs: Sequence[dict]) -> dict[int, dict]:
    """LoRA's runs at the rank of `run`, and where LoRA has several learning rates there at that of `run`, by seed; none
    where `run` has no rank and LoRA several."""
    same = [one for one in runs if one["method"] == PLAIN and run.get("rank") in (None, one.get("rank"))]
    if len({one.get("learning_rate") for one in same}) > 1:
        same = [one for one in same if one.get("learning_rate") == run.get("learning_rate")]
    return {one["seed"]: one for one in same} if len(by_setting(same)) == 1 else {}


def _beside(runs: list[dict], plain: dict[int, dict], metric: str) -> dict:
    shared = [run for run in runs if run["seed"] in plain] if runs[0]["method"] != PLAIN else []
    differences = [run[metric] - plain[run["seed"]][metric] for run in shared]
    pairs = [(run, plain[run["seed"]]) for run in shared if "correct" in run and "correct" in plain[run["seed"]]]
    mine, its = ([[int(bit) for bit in pair[side]["correct"]] for pair in pairs] for side in (0, 1))
    found = vars(paired_difference(mine, its)) if pairs else None
    minus = {"minus_lora": differences, "minus_lora_seeds": seeds_interval(differences) if differences else None}
    return minus | {"accuracy_minus_lora": found}


def _norms(norms: list[dict | None]) -> dict | None:
    known = [one for one in norms if one is not None]
    if not known:
        return None
    means = {key: float(np.mean([one[key] for one in known])) for key in ("mean", "sd")}
    return means | {"max": max(one["max"] for one in known)}


def settings_table(rows: list[dict], metric: str) -> str:
    """The rows as Markdown; of the settings that some row has, a column each."""
    settings = [name for name in SETTINGS if any(name in row for row in rows)]
    head = ["method", *(name.replace("_", " ") for name in settings), "trained", NAMES[metric], "minus LoRA, by seed"]
    head += ["over seeds", "accuracy minus LoRA, over sentences", "train - dev", "sparsity %", "dead ranks %"]
    lines = [
        [
            row["method"],
            *(str(row.get(name, "–")) for name in settings),
            f"{row['trainable']:,}",
            percent(row, metric),
            ", ".join(f"{100 * one:+.2f}" for one in row["minus_lora"]) or None,
            interval(row["minus_lora_seeds"]) if row["minus_lora"] else None,
            _accuracy(row["accuracy_minus_lora"]),
            *(percent(row, key, digits=1) for key in ("gap", "sparsity", "dead_ranks")),
            _norm(row["grad_norm"]),
            f"{row['step_ms']:.0f}",
        ]
        for row in rows
    ]
    return table([*head, "gradient norm", "step ms"], lines)


def _accuracy(difference: dict | None) -> str | None:
    return difference and f"{100 * difference['difference']:+.2f} ({interval(difference['sentences'])})"


def _norm(norms: dict | None) -> str:
    return "–" if norms is None else f"{norms['mean']:.3g} ± {norms['sd']:.3g}, at most {norms['max']:.3g}"
