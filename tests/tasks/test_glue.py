"""GLUE's tasks in its own files and on the hub: read, split and refused."""

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from huggingface_hub import constants

from spikegpt_lora.tasks.glue import GLUE, load_glue
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


FILES = {  # name -> head and a line of its files, and what is read of it
    "sst2": ("sentence\tlabel", 'a "fine film\t1', ('a "fine film', 1)),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t7\t8\tRain.\tWet.", ("Rain.\tWet.", 1)),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\tWhy?\tSo -- it is.\tnot_entailment", ("Why?\tSo -- it is.", 1)),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\tWho?\tWhat?\t0", ("Who?\tWhat?", 0)),
    "mnli": ("index\tsentence1\tsentence2\tgold_label", "0\tRain.\tSnow.\tcontradiction", ("Rain.\tSnow.", 2)),
}  # fmt: skip


def others(name):
    """The line of `FILES`, and one of another class."""
    line = FILES[name][1]
    for word, other in (("not_entailment", "entailment"), ("contradiction", "neutral")):
        if word in line:
            return [line, line.replace(word, other)]
    fields, at = line.split("\t"), 0 if name == "mrpc" else -1
    fields[at] = str(1 - int(fields[at]))
    return [line, "\t".join(fields)]


@pytest.mark.parametrize("name", FILES)
def test_glues_own_files_are_read_and_hidden_labels_are_not(tmp_path, name):
    head, _, read = FILES[name]
    dev = "dev_matched" if name == "mnli" else "dev"
    for file in ("train", dev):
        (tmp_path / f"{file}.tsv").write_text("\n".join([head, *others(name) * 4]) + "\n", encoding="utf-8")
    (tmp_path / "test.tsv").write_text("index\tsentence1\n0\tsecret\n", encoding="utf-8")
    data = load_glue(name, tmp_path)
    assert list(data) == ["train", "dev"] and len(data["train"]) == len(data["dev"]) == 8
    assert tuple(data["dev"][0].values()) == read and len(set(data["dev"]["label"])) == 2


def test_pairs_of_the_hub_are_numbered_as_glue_numbers_them(monkeypatch):
    words = ["not_equivalent", "equivalent"]  # in no order of the alphabet
    features = Features({"sentence1": Value("string"), "sentence2": Value("string"), "label": ClassLabel(names=words)})
    rows = [{"sentence1": f"One -- {n}.", "sentence2": "Two.", "label": n % 2} for n in range(20)]
    hub = DatasetDict({split: Dataset.from_list(rows, features=features) for split in ("train", "validation")})
    monkeypatch.setattr(datasets, "load_dataset", lambda *place: {("nyu-mll/glue", "mrpc"): hub}[place])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("SPIKEGPT_LORA_DATA", raising=False)
    data = load_glue("mrpc")
    assert data["train"][3] == {"text": "One -- 3.\tTwo.", "label": 1} and GLUE["mrpc"].labels[1] == "equivalent"


@pytest.mark.parametrize(
    "splits, line, message",
    [
        (["train"], "0\tWho?\tWhat?\tentailment", "found no validation"),
        (["train", "dev"], "0\tWho?\tWhat?\tmaybe", "must hold the classes entailment, not_entailment, found maybe"),
    ],
)
def test_a_folder_that_is_not_the_tasks_is_refused(tmp_path, splits, line, message):
    for file in splits:
        lines = [FILES["qnli"][0], *[FILES["qnli"][1], line] * 4]
        (tmp_path / f"{file}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_glue("qnli", tmp_path)


def test_a_pair_with_a_tab_in_a_text_is_refused(tmp_path):
    for split in ("train", "validation"):
        rows = [{"question": "Who?\tWhy?", "sentence": "He.", "label": n % 2} for n in range(8)]
        Dataset.from_list(rows).to_json(tmp_path / f"{split}.jsonl")
    with pytest.raises(ValueError, match="row 1 must hold texts without a tab"):
        load_glue("qnli", tmp_path)
