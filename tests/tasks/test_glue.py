"""CoLA and RTE in GLUE's own files: read, split and refused."""

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from huggingface_hub import constants

from spikegpt_lora.tasks.registry import labels_of, load_task

COLA = [f'gj04\t{n % 2}\t{"*" * (1 - n % 2)}\tThe {n}. "sailors rode.' for n in range(60)]
RTE = [f"{n}\tIt rained {n} days.\t{n} wet days.\t{'not_' * (n % 2)}entailment" for n in range(60)]


def glue(folder, name, lines, head=()):
    (folder / name).mkdir()
    for file, rows in (("train", lines[:50]), ("dev", lines[50:])):
        (folder / name / f"{file}.tsv").write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8")
    return folder


def rows_of(data, split):
    return sorted((row["text"], labels_of(data)[row["label"]]) for row in data[split])


def test_cola_is_tested_on_glues_dev_and_judged_on_a_part_of_train(tmp_path):
    data = load_task("cola", glue(tmp_path, "cola", COLA))
    words = ["unacceptable", "acceptable"]
    assert labels_of(data) == words
    assert rows_of(data, "test") == sorted((f'the {n}. "sailors rode.', words[n % 2]) for n in range(50, 60))
    assert len(data["train"]) + len(data["validation"]) == 50 and len(data["validation"]) > 0


def test_the_two_texts_of_rte_are_joined(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIKEGPT_LORA_DATA", str(glue(tmp_path, "rte", RTE, ["index\tsentence1\tsentence2\tlabel"])))
    data = load_task("rte")
    words = ["entailment", "not_entailment"]
    expected = sorted((f"it rained {n} days. -- {n} wet days.", words[n % 2]) for n in range(50, 60))
    assert labels_of(data) == words and rows_of(data, "test") == expected


def test_the_hubs_copy_is_the_same_task_without_its_hidden_test_labels(tmp_path, monkeypatch):
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["unacceptable", "acceptable"])})
    fields = [line.split("\t") for line in COLA]
    rows = [{"sentence": text, "label": int(label)} for _, label, _, text in fields]
    splits = {"train": rows[:50], "validation": rows[50:], "test": [{"sentence": "secret", "label": -1}]}
    hub = DatasetDict({name: Dataset.from_list(part, features=features) for name, part in splits.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda *place: {("nyu-mll/glue", "cola"): hub}[place])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("SPIKEGPT_LORA_DATA", raising=False)
    of_hub, of_files = load_task("cola"), load_task("cola", glue(tmp_path, "cola", COLA))
    assert all(rows_of(of_hub, split) == rows_of(of_files, split) for split in ("train", "validation", "test"))


@pytest.mark.parametrize(
    "name, line, message",
    [
        (
            "cola",
            "gj04\t2\t\tFine.",
            "train.tsv line 50 must be source, 0 or 1, mark and sentence, parted by tabs, found",
        ),
        ("cola", "gj04\t1\tFine.", "train.tsv line 50 must be source"),
        ("rte", "9\ta\tb\tmaybe", "train.tsv line 50 must be index, two texts and entailment or not_entailment"),
    ],
)
def test_a_line_that_is_not_glues_is_named(tmp_path, name, line, message):
    lines = {"cola": COLA, "rte": RTE}[name]
    with pytest.raises(ValueError, match=message):
        load_task(name, glue(tmp_path, name, [*lines[:49], line, *lines[50:]]))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(
        ValueError, match="the folder of rte must hold train.tsv and dev.tsv.*found no train.tsv and no"
    ):
        load_task("rte", tmp_path)
