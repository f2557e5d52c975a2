"""A task of one's own: text classification with two or more classes, from a file, a folder or a hub id (tables.py).

Columns are named, or found: by what they are usually called (`TEXT`, `LABEL`); else the text is the only column of
text, and the label the only one with few distinct values. Several columns of text, such as premise and hypothesis,
are joined by `PAIR`. Labels may be words, whole numbers or a ClassLabel; the classes are numbered in the order of their
names, whole numbers in theirs. Labels that are all -1 or empty are hidden ones, as those of GLUE's test splits: such a
split is not used.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from .splits import PAIR, Row
from .tables import Table, read_tables
from .text import to_ascii

TEXT = ("text", "sentence", "review", "content", "comment", "tweet", "message", "question", "document", "body", "title")

LABEL = ("label", "labels", "class", "target", "category", "sentiment", "emotion", "intent", "topic")

FEW = 100  # distinct values of a column that is taken for the label without being called so

LOST = 0.01  # share of the letters that may get lost without a warning

logger = logging.getLogger(__name__)


def name_of(place: str) -> str:
    """What a task of one's own is called: as its file (without the ending) or folder, or owner-name of the hub."""
    path = Path(place)
    return path.stem if path.is_file() else path.resolve().name if path.is_dir() else re.sub("[/:]", "-", place)


def read_own(
    place: str, text_columns: Sequence[str] = (), label_column: str | None = None, between: str = PAIR
) -> tuple[dict[str, list[Row]], list[str]]:
    """Rows by split (train, validation and test, or WHOLE) and the names of the classes.

    Args:
        between: what stands between the texts of several columns.

    Raises:
        ValueError: no column of text or labels, a row without one of them, fewer than two classes, or as `read_tables`.
        FileNotFoundError: as `read_tables`.
    """
    tables = read_tables(place)
    first = tables.get("train") or next(iter(tables.values()))
    texts, label = _columns(first, text_columns, label_column)
    names = {split: _labels(table, label) for split, table in tables.items()}
    for split in [split for split, given in names.items() if not any(given)]:
        logger.info("note: %s holds no labels and is not used", tables[split].where)
        del names[split]
    found = {name for given in names.values() for name in given if name}
    classes = sorted(sorted(found), key=int if all(re.fullmatch(r"-?\d+", name) for name in found) else None)
    shown = f"{', '.join(classes[:8])}{', ...' * (len(classes) > 8)}"
    count = sum(map(len, names.values()))
    if not 2 <= len(classes) <= count / 2:
        raise ValueError(
            f"{place} must hold two or more classes, and sentences of each, in column {label}: found {len(classes)} "
            f"({shown}) in {count:,} rows; name another --label-column"
        )
    logger.info("%s: text in %s; %d classes in %s: %s", place, " and ".join(texts), len(classes), label, shown)
    number = {name: index for index, name in enumerate(classes)}
    rows = {
        split: list(_rows(tables[split], texts, [number.get(name or "") for name in given], label, between))
        for split, given in names.items()
    }
    _warn_of_lost_letters(place, (row.text for part in rows.values() for row in part))
    return rows, classes


def _columns(table: Table, texts: Sequence[str], label: str | None) -> tuple[list[str], str]:
    """Names of the columns of text and of the one of labels: those that are given, else those that are found."""
    columns = list(dict.fromkeys(name for row in table.rows for name in row))
    listed = f"{table.where} has the columns {', '.join(columns)}"
    if unknown := [name for name in [*texts, *([label] if label else [])] if name not in columns]:
        raise ValueError(f"{listed}, and no {', '.join(unknown)}: see --text-column and --label-column")
    distinct = {name: {str(row.get(name)) for row in table.rows} for name in columns}
    few = [name for name in columns if 2 <= len(distinct[name]) <= min(FEW, len(table.rows) // 2)]
    others = [name for name in columns if name not in texts]
    label = label or _called(LABEL, others) or _only(name for name in others if name in few)
    if label is None:
        raise ValueError(f"{listed}: which one is the label must be said, with --label-column NAME")
    words = [name for name in columns if name != label and all(isinstance(row.get(name), str) for row in table.rows)]
    text = _called(TEXT, [name for name in columns if name != label])
    text = text or _only(words) or _only(name for name in words if name not in few)
    if not texts and text is None:
        raise ValueError(f"{listed}: which one is the text must be said, with --text-column NAME")
    return list(texts) or [str(text)], label


def _called(usual: Sequence[str], columns: list[str]) -> str | None:
    lower = {name.lower(): name for name in reversed(columns)}
    return next((lower[name] for name in usual if name in lower), None)


def _only(names: Iterable[str]) -> str | None:
    found = list(names)
    return found[0] if len(found) == 1 else None


def _labels(table: Table, column: str) -> list[str | None]:
    """The name of each row's class; None where there is none."""
    feature = (table.features or {}).get(column)
    values = [row.get(column) for row in table.rows]
    if hasattr(feature, "names"):  # a ClassLabel
        return [feature.names[value] if value is not None and value >= 0 else None for value in values]
    names = [_name(value, f"{table.where} row {n}", column) for n, value in enumerate(values, 1)]
    return names if set(names) != {"-1"} else [None] * len(names)


def _name(value: object, where: str, column: str) -> str | None:
    if value is None or value != value:  # a missing cell is NaN
        return None
    if isinstance(value, float) and value.is_integer():  # a missing cell makes whole numbers floats
        value = int(value)
    if not isinstance(value, str | int):
        raise ValueError(f"{where} must hold a class, a word or a whole number, in column {column}, found {value!r}")
    return " ".join(str(value).split()) or None


def _rows(table: Table, texts: list[str], labels: list[int | None], column: str, between: str) -> Iterable[Row]:
    for number, (row, label) in enumerate(zip(table.rows, labels, strict=True), 1):
        where = f"{table.where} row {number}"
        if label is None:
            raise ValueError(f"{where} must hold a label in column {column}, as other rows of it do, found none")
        for name in texts:
            if not isinstance(found := row.get(name), str) or not found.strip():
                raise ValueError(f"{where} must hold a text in column {name}, found {found!r}")
        yield Row(where, between.join(row[name] for name in texts), label)


def _warn_of_lost_letters(place: str, texts: Iterable[str]) -> None:
    counts = Counter(character for text in texts for character in text if character.isalpha())
    lost = {character: n for character, n in counts.items() if not to_ascii(character)}
    share = sum(lost.values()) / max(1, sum(counts.values()))
    if share > LOST:
        some = " ".join(sorted(lost, key=lambda character: -lost[character])[:8])
        logger.warning(
            "%.1f %% of the letters of %s are left out, as they have no ASCII form (%s): the text is read as ASCII",
            100 * share,
            place,
            some,
        )
