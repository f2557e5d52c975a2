"""recipes/reads.py: a table and a picture over comparisons that were run apart."""

import json

import pytest
from running import here


def comparison(folder, correct, reads=None, task="subj", data=("train", "validation", "test")):
    """A folder with the results.json of one run of full fine-tuning."""
    run = {"method": "full", "seed": 0, "trainable_parameters": 1, "seconds": 1.0, "adapters": None}
    run |= {"validation_accuracy": 0.9, "test_accuracy": correct.count("1") / len(correct), "test_correct": correct}
    folder.mkdir()
    results = {"task": task, "data": dict.fromkeys(data, 4), "runs": [run | {"weight_reads": reads}]}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_a_row_a_folder_with_differences_from_the_first_and_a_picture(tmp_path):
    folders = [comparison(tmp_path / "float", "1111"), comparison(tmp_path / "k3", "1101", 0.5)]
    done = here("reads.py", *folders, "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "out" / "reads.md").read_text()
    assert "| float: full fine-tuning | 1 | 90.00 | – | 100.00 | – | 100 (real) |" in table
    assert (
        "| k3: full fine-tuning | 1 | 90.00 | +0.00 | 75.00 | -25.00 (seeds –; sentences -75.00 … +0.00) | 50.0 |"
        in table
    )
    assert table in done.stdout and (tmp_path / "out" / "reads.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "other, message",
    [
        ({"task": "subj-mini"}, "all folders must be of one task, got subj, subj-mini"),
        ({"data": ("train", "test")}, "accuracy is compared on a validation split"),
        (None, "a folder must hold the results.json of a comparison by subj_finetune.py"),
    ],
)
def test_folders_that_cannot_be_compared_are_one_clear_error(tmp_path, other, message):
    second = tmp_path / "second" if other is None else comparison(tmp_path / "second", "1101", **other)
    done = here("reads.py", comparison(tmp_path / "float", "1111"), second, "--output-dir", tmp_path / "out")
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "out").exists()
