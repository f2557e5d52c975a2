"""GLUE's tasks (Wang et al. 2019): train and dev, as the labels of its test splits are not published.

CoLA, the Corpus of Linguistic Acceptability (Warstadt et al. 2019), asks whether a sentence is acceptable. RTE,
Recognizing Textual Entailment, asks whether a first text says the second; the two are joined by `PAIR`. These two are
tasks of the registry too. An encoder reads all of `GLUE`, and of pairs both texts apart (`load_glue`). STS-B, a number
in place of a class, is not among them.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .own import read_own
from .splits import PAIR, Row, lines_of

if TYPE_CHECKING:
    from datasets import DatasetDict

HUB_ID = "nyu-mll/glue"

COLA_LABELS = ["unacceptable", "acceptable"]

RTE_LABELS = ["entailment", "not_entailment"]

BETWEEN = "\t"  # stands between the texts of a pair that `load_glue` gives, and in neither


class Glue(NamedTuple):
    """What is known of a task of GLUE.

    texts: its columns of text on the hub.
    labels: names of its classes, in the order of GLUE's numbers.
    metrics: what GLUE gives of it, of "mcc", "accuracy" and "f1"; tables compare by the first.
    columns: in GLUE's own files the columns of text and the one of labels; none of what has a reader of its own here.
    """

    texts: Sequence[str]
    labels: Sequence[str]
    metrics: Sequence[str] = ("accuracy",)
    columns: Sequence[str] = ()

    @property
    def max_length(self) -> int:
        """Tokens that an encoder reads. With 128, of RTE one pair of five would lose its second text's end."""
        return 128 * len(self.texts)


_TWO = ("sentence1", "sentence2")
GLUE = {
    "cola": Glue(("sentence",), COLA_LABELS, ("mcc",)),
    "rte": Glue(_TWO, RTE_LABELS),
    "sst2": Glue(("sentence",), ("negative", "positive"), columns=("sentence", "label")),
    "mrpc": Glue(
        _TWO, ("not_equivalent", "equivalent"), ("accuracy", "f1"), columns=("#1 String", "#2 String", "Quality")
    ),
    "qnli": Glue(("question", "sentence"), RTE_LABELS, columns=("question", "sentence", "label")),
    "qqp": Glue(
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        columns=("question1", "question2", "is_duplicate"),
    ),
    # Of MNLI the matched dev set, as the papers.
    "mnli": Glue(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), columns=(*_TWO, "gold_label")),
}


def read_cola(data_dir: str | Path | None = None) -> dict[str, list[Row]]:
    """Splits train and validation, GLUE's dev, from `data_dir`, else SPIKEGPT_LORA_DATA, else the hub.

    Args:
        data_dir: with train.tsv and dev.tsv, or a folder cola/ with them.

    Raises:
        ValueError: no such files, or a line that is not GLUE's. FileNotFoundError: no hub.
    """
    return _read("cola", data_dir)


def read_rte(data_dir: str | Path | None = None) -> dict[str, list[Row]]:
    """As `read_cola`, of RTE."""
    pairs = _read("rte", data_dir)
    return {
        split: [Row(row.where, row.text.replace(BETWEEN, PAIR), row.label) for row in part]
        for split, part in pairs.items()
    }


def load_glue(name: str, folder: str | Path | None = None, holdout: bool = False) -> "DatasetDict":
    """Splits train and dev of task `name`, one of `GLUE`, with columns `text`, as it is written (of a pair both texts,
    `BETWEEN` them), and `label`.

    Args:
        folder: as of `read_cola`.
        holdout: dev is a tenth of the training set, for choosing settings; GLUE's own is not touched.

    Raises:
        ValueError, FileNotFoundError: as `read_cola`.
    """
    from datasets import Dataset, DatasetDict

    parts = _read(name, folder)
    for row in (row for part in parts.values() for row in part):
        if row.text.count(BETWEEN) != len(GLUE[name].texts) - 1:
            raise ValueError(f"{row.where} must hold texts without a tab, found {row.text!r}")
    columns = {name: {"text": [row.text for row in p], "label": [row.label for row in p]} for name, p in parts.items()}
    data = DatasetDict(train=Dataset.from_dict(columns["train"]), dev=Dataset.from_dict(columns["validation"]))
    if holdout:
        split = data["train"].train_test_split(0.1, seed=0)
        data = DatasetDict(train=split["train"], dev=split["test"])
    return data


def _read(name: str, data_dir: str | Path | None) -> dict[str, list[Row]]:
    """Rows of task `name` by split, `BETWEEN` the texts of a pair."""
    given = data_dir or os.environ.get("SPIKEGPT_LORA_DATA")
    if not given:
        return _read_columns(name, f"{HUB_ID}:{name}", [*GLUE[name].texts, "label"])
    folder = Path(given) / name if (Path(given) / name).is_dir() else Path(given)
    if name not in _PARSERS:
        return _read_columns(name, str(folder), GLUE[name].columns)
    files = {"train": folder / "train.tsv", "validation": folder / "dev.tsv"}
    if missing := [file.name for file in files.values() if not file.is_file()]:
        raise ValueError(
            f"the folder of {name} must hold train.tsv and dev.tsv, or a folder {name}/ with them, as GLUE has them; "
            f"found no {' and no '.join(missing)} in {folder}"
        )
    return {split: list(_PARSERS[name](file)) for split, file in files.items()}


def _read_columns(name: str, place: str, columns: Sequence[str]) -> dict[str, list[Row]]:
    """From a folder of tables or the hub, whose classes are called by their names or GLUE's numbers."""
    *texts, label = columns
    parts, found = read_own(place, texts, label, BETWEEN)
    labels = GLUE[name].labels
    numbers = {key: number for number, word in enumerate(labels) for key in (word, str(number))}
    if unknown := [word for word in found if word not in numbers]:
        raise ValueError(f"{place} must hold the classes {', '.join(labels)}, found {', '.join(unknown)}")
    if missing := {"train", "validation"} - parts.keys():
        raise ValueError(f"{place} must hold the splits train and validation (or dev), found no {missing.pop()}")
    number = [numbers[word] for word in found]
    return {
        split: [Row(row.where, row.text, number[row.label]) for row in parts[split]]
        for split in ("train", "validation")
    }


def _cola(path: Path) -> Iterator[Row]:
    for where, line in lines_of(path, "utf-8"):
        fields = line.removesuffix("\r").split("\t")
        if len(fields) != 4 or fields[1] not in ("0", "1"):
            raise ValueError(f"{where} must be source, 0 or 1, mark and sentence, parted by tabs, found {line!r}")
        yield Row(where, fields[3], int(fields[1]))


def _rte(path: Path) -> Iterator[Row]:
    lines = lines_of(path, "utf-8")
    next(lines)  # names of the columns
    for where, line in lines:
        fields = line.removesuffix("\r").split("\t")
        if len(fields) != 4 or fields[3] not in RTE_LABELS:
            raise ValueError(
                f"{where} must be index, two texts and {' or '.join(RTE_LABELS)}, parted by tabs, found {line!r}"
            )
        yield Row(where, BETWEEN.join(fields[1:3]), RTE_LABELS.index(fields[3]))


_PARSERS: dict[str, Callable[[Path], Iterator[Row]]] = {"cola": _cola, "rte": _rte}
