"""Splits that do not depend on where the text came from.

u = sha256(ASCII letters and digits of the sentence as read, lower-cased) / 2^256
train: u < 0.7, validation: 0.7 <= u < 0.8, test: 0.8 <= u; inside a split sentences are ordered by u

Data that have a test split of their own keep it. Where they have no validation split, it is the sentences of train with
0.7 <= u < 0.8.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .text import to_ascii

if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.getLogger(__name__)

PAIR = " -- "  # between the texts of a pair, as between the parts of a sentence: a line's end is lost in `to_ascii`


class Row(NamedTuple):
    """One sentence as read; `where` is its file and line, `label` the index of its class."""

    where: str
    text: str
    label: int


def digest_of(row: Row) -> str:
    """Hexadecimal sha256 of the sentence that splits and orders it, the same in every encoding of the text."""
    key = re.sub(r"[^a-z0-9]", "", row.text.encode("ascii", "ignore").decode().lower())
    if not key:
        raise ValueError(f"{row.where} must hold a sentence (letters or digits), found {row.text!r}")
    return hashlib.sha256(key.encode()).hexdigest()


def split_of(digest: str) -> str:
    u = int(digest, 16) / 2**256
    return "train" if u < 0.7 else "validation" if u < 0.8 else "test"


def hash_split(rows: list[tuple[str, Row]], labels: list[str]) -> "DatasetDict":
    """All `rows`, each after its digest, split by it."""
    parts: dict[str, list] = {"train": [], "validation": [], "test": []}
    for digest, row in rows:
        parts[split_of(digest)].append((digest, row))
    return _as_data(parts, labels)


def own_split(parts: dict[str, list[tuple[str, Row]]], labels: list[str]) -> "DatasetDict":
    """The splits of data that have train and test, or train and validation, which then is the test split; what was done
    is said, and stays in the `info.description` of each."""
    train, validation, test = parts["train"], parts.get("validation"), parts.get("test")
    note = "Train, validation and test are the data's own."
    if test is None:
        validation, test = None, validation
        note = "Test is what the data call validation, as they have no test split with labels; " + _TENTH
    elif validation is None:
        note = "Test is the data's own; " + _TENTH
    if validation is None:
        validation = [row for row in train if split_of(row[0]) == "validation"]
        train = [row for row in train if split_of(row[0]) != "validation"]
    logger.info("note: %s", note)
    read = {digest for digest, _ in [*train, *validation]}
    if known := sum(digest in read for digest, _ in test):
        logger.warning("note: %d test sentences stand in train or validation too", known)
    return _as_data({"train": train, "validation": validation, "test": test}, labels, note)


_TENTH = "validation is a tenth of their train, by the hash of its sentences."


def _as_data(parts: dict[str, list[tuple[str, Row]]], labels: list[str], note: str = "") -> "DatasetDict":
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=labels)})
    data = DatasetDict()
    for name, rows in parts.items():
        ordered = sorted((digest, to_ascii(row.text), row.label) for digest, row in rows)
        columns = [{"text": text, "label": label} for _, text, label in ordered]
        data[name] = Dataset.from_list(columns, features=features)
        data[name].info.description = note
    return data


def resplit(data: "DatasetDict", seed: int) -> "DatasetDict":
    """All sentences of `data`, split 90/10 into train and test by `seed`, stratified: what the SpikeLoRA authors do."""
    from datasets import concatenate_datasets

    return concatenate_datasets(list(data.values())).train_test_split(0.1, stratify_by_column="label", seed=seed)


def fold(data: "DatasetDict", number: int, count: int, names: Sequence[str]) -> "DatasetDict":
    """The sentences of the splits `names`, in the order of u, cut into `count` equal stretches: the one of this number
    is the test split, all others are for training."""
    from datasets import DatasetDict, concatenate_datasets

    if not 0 <= number < count:
        raise ValueError(f"of {count} folds each seed is the number of one, 0 ... {count - 1}, got {number}")
    everything = concatenate_datasets([data[name] for name in names])
    start, stop = (place * len(everything) // count for place in (number, number + 1))
    others = [*range(start), *range(stop, len(everything))]
    return DatasetDict(train=everything.select(others), test=everything.select(range(start, stop)))


@dataclass(frozen=True)
class Protocol:
    """How seeds are tested. `split`: (data, seed) to the splits that the seed reads; `one_split`: they are the same for
    every seed, so that intervals over sentences and seeds, and baselines, have a meaning; `disjoint`: each seed tests
    sentences of its own, so that all seeds together test each once."""

    split: Callable[["DatasetDict", int], "DatasetDict"]
    one_split: bool = False
    disjoint: bool = False


def as_it_is(data: "DatasetDict", seed: int) -> "DatasetDict":
    return data


ONE_SPLIT = Protocol(as_it_is, one_split=True)
BY_SEED = Protocol(resplit)


def folds(count: int, with_test: bool) -> Protocol:
    """`count` folds, numbered by the seed, of all sentences or, to choose settings by, of train and validation."""
    names = ("train", "validation", "test") if with_test else ("train", "validation")
    return Protocol(partial(fold, count=count, names=names), disjoint=True)


def lines_of(path: Path, encoding: str) -> Iterator[tuple[str, str]]:
    """Pairs (file and line number, text); only the byte \\n ends a line."""
    return lines_in(path.read_bytes(), str(path), encoding)


def lines_in(raw: bytes, name: str, encoding: str) -> Iterator[tuple[str, str]]:
    """The same of bytes, which messages call `name`."""
    if not raw:
        raise ValueError(f"{name} must hold one sentence a line, found an empty file")
    for number, line in enumerate(raw.removesuffix(b"\n").split(b"\n"), 1):
        where = f"{name} line {number}"
        try:
            yield where, line.decode(encoding)
        except UnicodeDecodeError as error:
            found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
            raise ValueError(f"{where} must be {encoding} text, found {found}") from error
