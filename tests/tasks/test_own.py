"""A task of one's own: every kind of file, columns found and named, splits kept and made, refusals in a sentence."""

import csv
import json
import logging
import socket
import time

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from huggingface_hub import constants

from spikegpt_lora.tasks.own import name_of
from spikegpt_lora.tasks.registry import labels_of, load_task
from spikegpt_lora.tasks.splits import split_of
from spikegpt_lora.tasks.text import to_ascii

CLASSES = ["anger", "fear", "joy", "sadness", "surprise"]
ROWS = [{"text": f'the "{name}" of day {n}, again .', "label": name} for n in range(20) for name in CLASSES]


def written(path, rows):
    """`path`, holding `rows` as its ending says."""
    if path.suffix in (".csv", ".tsv"):
        quoted = {"quoting": csv.QUOTE_NONE, "delimiter": "\t", "quotechar": None} if path.suffix == ".tsv" else {}
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), **quoted)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        text = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
        path.write_text(text, encoding="utf-8")
    return path


def named(data):
    """(text, name of the class) by split."""
    names = labels_of(data)
    return {split: [(row["text"], names[row["label"]]) for row in rows] for split, rows in data.items()}


def sentences(data):
    return sorted(pair for rows in named(data).values() for pair in rows)


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    return load_task(str(written(tmp_path_factory.mktemp("five") / "five.csv", ROWS)))


def test_a_file_without_splits_is_split_by_the_hash_with_its_classes_in_order(five):
    assert labels_of(five) == CLASSES
    assert sentences(five) == sorted((row["text"], row["label"]) for row in ROWS)
    assert list(five) == ["train", "validation", "test"] and len(five["train"]) > 60 > len(five["test"]) > 10


@pytest.mark.parametrize("suffix", [".tsv", ".json", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_task(five, tmp_path, suffix):
    assert named(load_task(str(written(tmp_path / f"five{suffix}", ROWS)))) == named(five)


def test_a_name_with_brackets_is_no_pattern(five, tmp_path):
    assert named(load_task(str(written(tmp_path / "five[1]*.csv", ROWS)))) == named(five)


@pytest.mark.parametrize(
    "columns", [("Review", "Class"), ("content", "sentiment"), ("said", "mood"), ("title", "target")]
)
def test_columns_are_found_by_their_usual_names_or_as_the_only_ones_that_can_be_meant(five, tmp_path, columns):
    rows = [{"id": n, columns[0]: row["text"], columns[1]: row["label"]} for n, row in enumerate(ROWS)]
    assert named(load_task(str(written(tmp_path / "a.csv", rows)))) == named(five)


def test_columns_that_are_named_come_before_those_that_would_be_found(five, tmp_path):
    rows = [
        {"text": f"no {n}", "label": n % 2, "said": row["text"], "mood": row["label"]} for n, row in enumerate(ROWS)
    ]
    path = str(written(tmp_path / "a.jsonl", rows))
    assert named(load_task(path, text_columns=["said"], label_column="mood")) == named(five)
    assert labels_of(load_task(path)) == ["0", "1"]


def test_several_columns_of_text_are_joined_by_a_dash(tmp_path):
    rows = [{"premise": f"it rains {n}", "hypothesis": "it is wet", "label": n % 3} for n in range(60)]
    data = load_task(str(written(tmp_path / "a.csv", rows)), text_columns=["premise", "hypothesis"])
    assert all(text.startswith("it rains ") and text.endswith(" -- it is wet") for text, _ in sentences(data))


@pytest.mark.parametrize(
    "given, names",
    [
        ([10, 9, -1], ["-1", "9", "10"]),
        (["NA", "None", "b"], ["NA", "None", "b"]),
        ([True, False, True], ["False", "True"]),
        ([1.0, 2.0, 1.0], ["1", "2"]),
    ],
)
def test_names_of_classes_are_what_is_written_whole_numbers_in_their_order(tmp_path, given, names):
    rows = [{"text": f"number {n}", "label": given[n % 3]} for n in range(90)]
    for suffix in (".csv", ".jsonl", ".parquet"):
        assert labels_of(load_task(str(written(tmp_path / f"a{suffix}", rows)))) == names


def test_a_classlabel_gives_its_names(tmp_path):
    rows = [{"text": f"number {n}", "label": n % 2} for n in range(60)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    pairs = sentences(load_task(str(tmp_path / "a.parquet")))
    assert all(name == ("yes" if int(text.split()[1]) % 2 else "no") for text, name in pairs) and len(pairs) == 60


def parts(folder, **splits):
    """A folder with a .jsonl file for each of `splits`: their rows."""
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        written(folder / f"{name.replace('_', '-')}.jsonl", rows)
    return str(folder)


def test_splits_of_the_datas_own_are_kept(tmp_path):
    data = load_task(parts(tmp_path, train=ROWS[:60], dev=ROWS[60:80], test=ROWS[80:]))
    found = {split: sorted(rows) for split, rows in named(data).items()}
    texts = [(row["text"], row["label"]) for row in ROWS]
    assert found == {
        "train": sorted(texts[:60]), "validation": sorted(texts[60:80]), "test": sorted(texts[80:])
    }  # fmt: skip


def test_pieces_of_a_split_are_read_together(tmp_path):
    pieces = {f"train_0000{n}_of_00002": ROWS[50 * n :][:50] for n in range(2)}
    assert len(sentences(load_task(parts(tmp_path, **pieces, test=ROWS[:5])))) == 105


def test_without_validation_the_hash_takes_a_part_of_train_for_it(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = load_task(parts(tmp_path, train=ROWS[:80], test=ROWS[80:]))
    assert len(data["test"]) == 20 and len(data["train"]) + len(data["validation"]) == 80
    whole = load_task(parts(tmp_path / "whole", train=ROWS[:80]))
    assert named(data)["validation"] == named(whole)["validation"]
    assert data["test"].info.description in caplog.text and "Test is the data's own; " in caplog.text


@pytest.mark.parametrize("hidden", [{"label": -1}, {"label": None}, {}])
def test_a_test_split_with_hidden_labels_is_not_used_and_validation_takes_its_place(tmp_path, caplog, hidden):
    caplog.set_level(logging.INFO)
    rows = [row | {"label": CLASSES.index(row["label"])} for row in ROWS]
    test = [{"text": f"secret {n}"} | hidden for n in range(9)]
    data = load_task(parts(tmp_path, train=rows[:80], validation=rows[80:], test=test))
    assert sorted(named(data)["test"]) == sorted((row["text"], str(row["label"])) for row in rows[80:])
    assert (
        "test.jsonl holds no labels and is not used" in caplog.text
        and "Test is what the data call validation" in caplog.text
    )


def test_pooled_splits_are_split_as_those_of_a_file(five, tmp_path):
    assert named(load_task(parts(tmp_path, train=ROWS[:50], test=ROWS[50:]), pooled=True)) == named(five)


def test_a_sentence_in_two_classes_is_counted_and_kept_and_in_one_split(tmp_path, caplog):
    rows = [*ROWS, ROWS[0] | {"label": "joy"}, ROWS[0], ROWS[1] | {"label": "joy"}]
    data = load_task(str(written(tmp_path / "a.csv", rows)))
    assert len(sentences(data)) == 103 and "holds 2 sentences in more than one class" in caplog.text
    assert (
        len([split for split, pairs in named(data).items() if any(text == ROWS[0]["text"] for text, _ in pairs)]) == 1
    )


def test_test_sentences_that_were_read_before_are_counted(tmp_path, caplog):
    load_task(parts(tmp_path, train=ROWS[:80], test=ROWS[77:]))
    assert "3 test sentences stand in train or validation too" in caplog.text


def test_a_class_without_a_training_sentence_is_named(tmp_path, caplog):
    load_task(parts(tmp_path, train=ROWS[:80], test=[*ROWS[80:], {"text": "a rare one", "label": "awe"}]))
    assert "no training sentence of" in caplog.text and "is of class awe" in caplog.text


def test_other_splits_of_a_hub_data_set_are_not_used_and_named(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    splits = {"train": ROWS, "test": ROWS[:10], "unsupervised": [{"text": "x", "label": "joy"}]}
    hub = DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda *place: {("owner/name", "part"): hub}[place])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(sentences(load_task("owner/name:part"))) == 110
    assert "of owner/name:part the splits unsupervised are not used" in caplog.text


def test_letters_that_get_lost_are_counted_where_they_are_many(tmp_path, caplog):
    rows = [row | {"text": f"{row['text']} naïve"} for row in ROWS]
    load_task(str(written(tmp_path / "a.csv", rows)))
    assert "WARNING" not in caplog.text and to_ascii("naïve") == "naive"
    load_task(str(written(tmp_path / "b.csv", [row | {"text": f"{row['text']} дом"} for row in ROWS])))
    assert "% of the letters of" in caplog.text and "have no ASCII form (д о м)" in caplog.text


def test_it_is_called_as_its_file_folder_or_hub_id(tmp_path):
    written(tmp_path / "my.reviews.csv", ROWS)
    places = [tmp_path / "my.reviews.csv", tmp_path, "owner/name", "owner/name:part"]
    assert [name_of(str(place)) for place in places] == ["my.reviews", tmp_path.name, "owner-name", "owner-name-part"]


NUMBERED = [{"id": n, "said": f"{n} it", "more": f"{n} me"} for n in range(40)]


@pytest.mark.parametrize(
    "rows, columns, message",
    [
        (NUMBERED, {}, "has the columns id, said, more: which one is the label must be said, with --label-column NAME"),
        ([row | {"label": row["id"] % 2} for row in NUMBERED], {}, "which one is the text must be said"),
        (ROWS, {"label_column": "mood"}, "a.jsonl has the columns text, label, and no mood: see --text-column"),
        (ROWS, {"text_columns": ["text", "x"]}, "and no x: see"),
        (ROWS, {"label_column": "text", "text_columns": ["label"]}, r"two or more classes.* found 100 \(.*, \.\.\.\)"),
        ([row | {"label": "one"} for row in ROWS], {}, r"in column label: found 1 \(one\) in 100 rows"),
        ([*ROWS, {"text": " ", "label": "joy"}], {}, "a.jsonl row 101 must hold a text in column text, found ' '"),
        ([*ROWS, {"text": " ?! ", "label": "joy"}], {}, "a.jsonl row 101 must hold a sentence .letters or digits"),
        ([*ROWS, {"text": "what", "label": None}], {}, "row 101 must hold a label in column label, as other rows"),
        ([row | {"label": n / 7} for n, row in enumerate(ROWS, 1)], {}, "row 1 must hold a class, a word or a whole"),
        ([row | {"label": [n % 2]} for n, row in enumerate(ROWS)], {}, r"row 1 must hold a class.*found \[0\]"),
        (ROWS[:12], {}, "must hold more sentences: there are 12, and too few for validation"),
    ],
)
def test_what_is_no_task_is_refused_in_a_sentence(tmp_path, rows, columns, message):
    path = written(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        load_task(str(path), **columns)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"text", "a.txt must be one of .csv, .tsv, .json, .jsonl, .parquet"),
        ("a.csv", b"", "a.csv must be a whole .csv file in UTF-8: No columns"),
        ("a.csv", b"text,label\n", "a.csv must hold sentences, found no row"),
        ("a.csv", b"text,label\nfin\xe9,1\n", "a.csv must be a whole .csv file in UTF-8: .*0xe9"),
        ("a.csv", b"text,label\na,b\na,b,c\n", "a.csv must be a whole .csv file.* line 3"),
        ("a.jsonl", b'{"text": "a', "a.jsonl must be a whole .jsonl file"),
        ("a.parquet", b"none", "a.parquet must be a whole .parquet file"),
    ],
)
def test_a_damaged_file_is_named_quietly(tmp_path, capfd, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_task(str(tmp_path / name))
    assert capfd.readouterr() == ("", "")


def test_a_folder_without_splits_or_with_one_twice_is_refused(tmp_path):
    written(tmp_path / "reviews.csv", ROWS)
    with pytest.raises(ValueError, match="must hold files called train, .*; found reviews.csv"):
        load_task(str(tmp_path))
    parts(tmp_path, train=ROWS, dev=ROWS, valid=ROWS)
    with pytest.raises(ValueError, match="one file of the split validation.*; found dev.jsonl, valid.jsonl"):
        load_task(str(tmp_path))


def test_no_task_of_ones_own_is_called_as_a_registered_one_or_takes_a_folder_of_one(tmp_path):
    path = str(written(tmp_path / "cola.csv", ROWS))
    with pytest.raises(ValueError, match="called as the task cola is, which --task cola reads"):
        load_task(path)
    with pytest.raises(ValueError, match="data_dir is for subj, subj-mini, cola, rte: .*five.csv"):
        load_task(str(written(tmp_path / "five.csv", ROWS)), tmp_path)
    with pytest.raises(ValueError, match="those of subj-mini are known"):
        load_task("subj-mini", label_column="label")


def test_a_hub_out_of_reach_is_one_sentence_within_five_seconds(monkeypatch, capfd):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        start = time.perf_counter()
        with pytest.raises(FileNotFoundError, match="owner/name is no file or folder here, and the .* out of reach"):
            load_task("owner/name")
        assert time.perf_counter() - start < 5
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="owner/name is no file or folder here, and not to be had from"):
        load_task("owner/name")
    assert capfd.readouterr() == ("", "")


def test_the_hash_rule_is_that_of_the_registered_tasks():
    assert [split_of(f"{int(u * 2**256):064x}") for u in (0.69, 0.71, 0.79, 0.81)] == [
        "train", "validation", "validation", "test"
    ]  # fmt: skip
