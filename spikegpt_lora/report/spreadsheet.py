"""results.csv: the figures of a comparison's runs for a spreadsheet, a row a run.

Accuracies, sparsity and dead ranks are fractions of 1, seconds wall-clock, as in results.json (see results.py), whose
names they have; what a record does not hold is an empty cell.
"""

import csv
import io
from pathlib import Path

from ..utils.files import write_text
from .results import title_of

OF_RUN = ("test_accuracy", "test_mcc", "validation_accuracy", "train_accuracy", "best_epoch", "trainable_parameters")
OF_RUN += ("total_parameters", "seconds", "weight_reads")
OF_ADAPTERS = ("sparsity", "dead_ranks", "contribution", "accuracy_without")
PARTS = {"intermediate": ("accuracy", "seconds"), "made": ("processor", "threads", "commit")}


def write_spreadsheet(runs: list[dict], path: Path) -> None:
    """Write `runs`, as results.json has them."""
    rows = [_row(run) for run in runs]
    names = dict.fromkeys(name for row in rows for name in row)  # settings differ between versions
    text = io.StringIO()
    sheet = csv.DictWriter(text, list(names), lineterminator="\n")
    sheet.writeheader()
    sheet.writerows(rows)
    write_text(path, text.getvalue())


def _row(run: dict) -> dict:
    row = {name: run.get(name) for name in ("task", "method")} | {"title": title_of(run), "seed": run["seed"]}
    row |= {name: run.get(name) for name in OF_RUN}
    row |= {name: (run["adapters"] or {}).get(name) for name in OF_ADAPTERS}
    row |= {"test_sentences": len(run["test_correct"]), "test_right": run["test_correct"].count("1")}
    row |= {f"{part}.{name}": (run.get(part) or {}).get(name) for part, names in PARTS.items() for name in names}
    return row | {f"settings.{name}": value for name, value in run["settings"].items()}
