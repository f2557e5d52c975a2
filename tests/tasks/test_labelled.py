"""Sentences of an intermediate task, and folds."""

import lzma
import os

import pytest
from datasets import Dataset, DatasetDict

from spikegpt_lora.tasks.labelled import load_labelled
from spikegpt_lora.tasks.splits import fold, folds

LABELS = ["objective", "subjective"]


def film(folder, lines):
    (folder / "film").mkdir()
    (folder / "film" / "sentences.tsv.xz").write_bytes(lzma.compress("\n".join(lines).encode() + b"\n"))
    return folder


def test_film_is_read_by_source_critics_are_subjective_and_all_others_are_not(tmp_path):
    lines = ["netflix\tA man leaves .", "rt_reviews\ta caf\u00e9 of a film .", "amazon\tshe returns ."]
    rows = load_labelled("film", LABELS, film(tmp_path, lines))
    assert rows["text"] == ["a man leaves .", "a cafe of a film .", "she returns ."] and rows["label"] == [0, 1, 0]


def test_film_is_found_through_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIKEGPT_LORA_DATA", str(film(tmp_path, ["a\tx", "rt_reviews\ty"])))
    assert len(load_labelled("film", LABELS)) == 2


def test_a_file_names_the_classes_of_the_task(tmp_path):
    (path := tmp_path / "own.tsv").write_text("subjective\tI like it .\nobjective\tit ends .\n", encoding="utf-8")
    assert load_labelled(str(path), LABELS)["label"] == [1, 0]


@pytest.mark.parametrize(
    "text, rule",
    [
        ("good\tI like it .\n", r"own.tsv line 1 must be objective or subjective, a tab and a sentence, found 'good"),
        ("subjective\tyes .\nsubjective\tno .\n", "must hold sentences of every class, found none that is objective"),
        ("subjective\n", "a tab and a sentence"),
    ],
)
def test_other_lines_are_refused(tmp_path, text, rule):
    (path := tmp_path / "own.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rule):
        load_labelled(str(path), LABELS)


def test_film_is_refused_for_other_classes_than_subjs(tmp_path):
    with pytest.raises(ValueError, match="tells objective from subjective, and this task's classes are bad, good, so"):
        load_labelled("film", ["bad", "good", "so"], film(tmp_path, ["a\tx", "rt_reviews\ty"]))


def test_where_there_is_none_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("SPIKEGPT_LORA_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="must name a folder with film/sentences.tsv.xz .* got None"):
        load_labelled("film", LABELS)
    with pytest.raises(FileNotFoundError, match="must be film or a file of label, tab and sentence: no .*nowhere.tsv"):
        load_labelled(str(tmp_path / "nowhere.tsv"), LABELS)
    (tmp_path / "sentences.tsv.xz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="must be UTF-8 text in a whole .xz archive"):
        load_labelled("film", LABELS, tmp_path)


@pytest.mark.skipif("SPIKEGPT_LORA_DATA" not in os.environ, reason="needs film/: set SPIKEGPT_LORA_DATA to its folder")
def test_the_real_film_has_119_227_sentences_44_632_of_critics():
    rows = load_labelled("film", LABELS)
    assert (len(rows), sum(rows["label"])) == (119_227, 44_632)


def splits(**sizes):
    numbers = iter(range(1000))
    return DatasetDict(
        {name: Dataset.from_dict({"text": [next(numbers) for _ in range(n)]}) for name, n in sizes.items()}
    )


def test_folds_test_every_sentence_once_and_never_train_on_what_they_test():
    data, protocol = splits(train=70, validation=10, test=23), folds(10, with_test=True)
    parts = [protocol.split(data, number) for number in range(10)]
    assert sorted(sum((list(part["test"]["text"]) for part in parts), [])) == list(range(103))
    assert all(sorted([*part["train"]["text"], *part["test"]["text"]]) == list(range(103)) for part in parts)
    assert {len(part["test"]) for part in parts} == {10, 11}


def test_folds_to_choose_by_never_hold_a_test_sentence():
    part = folds(4, with_test=False).split(splits(train=70, validation=10, test=20), 3)
    assert max([*part["train"]["text"], *part["test"]["text"]]) == 79


def test_a_seed_that_is_no_fold_is_refused():
    with pytest.raises(ValueError, match=r"each seed is the number of one, 0 \.\.\. 4, got 5"):
        fold(splits(train=10), 5, 5, ["train"])
