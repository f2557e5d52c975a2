"""CoLA and RTE as GLUE has them (Wang et al. 2019): train and dev, as the labels of its test splits are not published.

CoLA, the Corpus of Linguistic Acceptability (Warstadt et al. 2019), asks whether a sentence is acceptable. RTE,
Recognizing Textual Entailment, asks whether a first text says the second; the two are joined by `PAIR`.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .own import read_own
from .splits import PAIR, Row, lines_of

if TYPE_CHECKING:
    from datasets import DatasetDict

HUB_ID = "nyu-mll/glue"

COLA_LABELS = ["unacceptable", "acceptable"]

RTE_LABELS = ["entailment", "not_entailment"]


def read_cola(data_dir: str | Path | None = None) -> dict[str, list[Row]]:
    """Splits train and validation, GLUE's dev, from `data_dir`, else SPIKEGPT_LORA_DATA, else the hub.

    Args:
        data_dir: with train.tsv and dev.tsv, or a folder cola/ with them.

    Raises:
        ValueError: no such files, or a line that is not GLUE's. FileNotFoundError: no hub.
    """
    return _read("cola", data_dir, _cola, ["sentence"], COLA_LABELS)


def read_rte(data_dir: str | Path | None = None) -> dict[str, list[Row]]:
    """As `read_cola`, of RTE."""
    return _read("rte", data_dir, _rte, ["sentence1", "sentence2"], RTE_LABELS)


def load_cola(folder: Path | None = None, holdout: bool = False) -> "DatasetDict":
    """Splits train and dev, with columns `text`, as it is written, and `label`.

    Args:
        folder: as of `read_cola`.
        holdout: dev is a tenth of the training set, for choosing settings; GLUE's own is not touched.

    Raises:
        ValueError, FileNotFoundError: as `read_cola`.
    """
    from datasets import Dataset, DatasetDict

    parts = read_cola(folder)
    columns = {name: {"text": [row.text for row in p], "label": [row.label for row in p]} for name, p in parts.items()}
    data = DatasetDict(train=Dataset.from_dict(columns["train"]), dev=Dataset.from_dict(columns["validation"]))
    if holdout:
        split = data["train"].train_test_split(0.1, seed=0)
        data = DatasetDict(train=split["train"], dev=split["test"])
    return data


def _read(
    name: str, data_dir: str | Path | None, parse: Callable[[Path], Iterator[Row]], texts: list[str], labels: list[str]
) -> dict[str, list[Row]]:
    given = data_dir or os.environ.get("SPIKEGPT_LORA_DATA")
    if not given:
        parts, found = read_own(f"{HUB_ID}:{name}", texts, "label")
        number = [labels.index(label) for label in found]
        return {split: [Row(row.where, row.text, number[row.label]) for row in p] for split, p in parts.items()}
    folder = Path(given) / name if (Path(given) / name).is_dir() else Path(given)
    files = {"train": folder / "train.tsv", "validation": folder / "dev.tsv"}
    if missing := [file.name for file in files.values() if not file.is_file()]:
        raise ValueError(
            f"the folder of {name} must hold train.tsv and dev.tsv, or a folder {name}/ with them, as GLUE has them; "
            f"found no {' and no '.join(missing)} in {folder}"
        )
    return {split: list(parse(file)) for split, file in files.items()}


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
        yield Row(where, PAIR.join(fields[1:3]), RTE_LABELS.index(fields[3]))
