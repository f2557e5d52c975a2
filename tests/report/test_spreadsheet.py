"""results.csv: a row a run, with what its record holds and nothing made up."""

import csv

from spikegpt_lora.report.spreadsheet import write_spreadsheet

GATES = {"sparsity": 0.75, "dead_ranks": 0.125, "contribution": 0.5, "modules": {}, "accuracy_without": 0.25}
OLD = {
    "method": "full", "seed": 0, "settings": {"epochs": 2}, "trainable_parameters": 9, "total_parameters": 99,
    "seconds": 60.5, "best_epoch": 1, "validation_accuracy": None, "test_accuracy": 0.75, "test_correct": "1110",
    "adapters": None,
}  # fmt: skip
NEW = OLD | {"task": "subj", "method": "mine", "title": 'one, "two"', "seed": 1, "train_accuracy": 0.9}
NEW |= {"adapters": GATES, "settings": {"epochs": 2, "rank": 4}, "intermediate": {"accuracy": 0.5, "seconds": 3.0}}
NEW |= {"made": {"processor": "one", "threads": 2, "commit": None, "command": "python a.py"}}


def rows_of(runs, folder):
    write_spreadsheet(runs, folder / "results.csv")
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_run_is_a_row_with_the_figures_of_its_record(tmp_path):
    old, new = rows_of([OLD, NEW], tmp_path)
    assert (new["task"], new["method"], new["title"], new["seed"]) == ("subj", "mine", 'one, "two"', "1")
    assert (new["test_accuracy"], new["train_accuracy"], new["best_epoch"], new["seconds"]) == (
        "0.75",
        "0.9",
        "1",
        "60.5",
    )
    assert (new["test_sentences"], new["test_right"], new["sparsity"], new["dead_ranks"]) == ("4", "3", "0.75", "0.125")
    assert (new["made.processor"], new["made.threads"], new["intermediate.seconds"]) == ("one", "2", "3.0")
    assert (new["settings.epochs"], new["settings.rank"]) == ("2", "4") and old["title"] == "full fine-tuning"


def test_what_a_record_does_not_hold_is_an_empty_cell(tmp_path):
    old, new = rows_of([OLD, NEW], tmp_path)
    for name in ("task", "validation_accuracy", "sparsity", "intermediate.accuracy", "made.commit", "settings.rank"):
        assert old[name] == ""
    assert new["made.commit"] == "" and list(old) == list(new)


def test_no_runs_are_no_rows(tmp_path):
    assert rows_of([], tmp_path) == []
