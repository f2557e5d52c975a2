"""Tables of labelled text by split, from files or the Hugging Face hub, read by `datasets`.

    reviews.csv                          one table: .csv, .tsv, .json, .jsonl or .parquet
    folder/train.csv, folder/test.csv    and validation (or valid, val, dev); train-00000-of-00002.parquet is a piece
    owner/name, owner/name:config        a data set of the hub

Files are UTF-8. In .csv quotation marks enclose fields; in .tsv they are text, and a tab always parts.
"""

import csv
import glob
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..utils.hub import require_reachable

if TYPE_CHECKING:
    from datasets import Features

logger = logging.getLogger(__name__)

_FIELDS = {"keep_default_na": False}  # "NA" and "None" are words, and may be classes

KINDS = {
    ".csv": ("csv", _FIELDS),
    ".tsv": ("csv", _FIELDS | {"sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}

SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
SPLITS |= dict.fromkeys(("validation_matched", "dev_matched"), "validation")  # what MNLI calls its own

WHOLE = "all"  # the split of what has none

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")

_FILE = re.compile(rf"({'|'.join(SPLITS)})(?:-\d+-of-\d+)?({'|'.join(map(re.escape, KINDS))})")


class Table(NamedTuple):
    """`where`: the file, or hub id and split; `features`: what the columns are, None where the file does not say."""

    where: str
    rows: list[dict]
    features: "Features | None"


def read_tables(place: str) -> dict[str, Table]:
    """The tables of a file, a folder or a hub id, by split: train, validation and test, or WHOLE.

    Raises:
        FileNotFoundError: neither file nor folder, and (within 5 seconds) no hub.
        ValueError: not such a file or folder, a damaged file, or what the hub says.
    """
    path = Path(place)
    if path.is_file():
        return {WHOLE: _read([path])}
    return _read_folder(path) if path.is_dir() else _read_hub(place)


def _read_folder(folder: Path) -> dict[str, Table]:
    names = sorted(file.name for file in folder.iterdir())
    found: dict[str, list[re.Match]] = {}
    for match in filter(None, map(_FILE.fullmatch, names)):
        found.setdefault(SPLITS[match[1]], []).append(match)
    if not found:
        some = ", ".join(names[:8]) or "nothing"
        raise ValueError(
            f"{folder} must hold files called train, validation (or dev) and test, of {', '.join(KINDS)}; found {some}"
        )
    for split, matches in found.items():
        if len({match.groups() for match in matches}) > 1:
            files = ", ".join(match[0] for match in matches)
            raise ValueError(f"{folder} must hold one file of the split {split}, or its numbered pieces; found {files}")
    return {split: _read([folder / match[0] for match in matches]) for split, matches in found.items()}


def _read(files: list[Path]) -> Table:
    from datasets import load_dataset

    suffix = files[0].suffix.lower()
    if suffix not in KINDS:
        raise ValueError(f"{files[0]} must be one of {', '.join(KINDS)}")
    kind, options = KINDS[suffix]
    places = [glob.escape(str(file)) for file in files]
    try:
        with _quiet():  # streaming leaves no copy in the cache
            data = load_dataset(kind, data_files=places, split="train", streaming=True, **options)
            rows = list(data)
    except Exception as error:  # of pandas, pyarrow or the file system
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{files[0]} must be a whole {suffix} file in UTF-8: {reason}") from error
    if not rows:
        raise ValueError(f"{files[0]} must hold sentences, found no row")
    return Table(str(files[0]), rows, data.features)


def _read_hub(place: str) -> dict[str, Table]:
    from datasets import load_dataset
    from huggingface_hub import constants

    repo, _, config = place.partition(":")
    if not constants.is_offline_mode():  # then the cache answers at once
        try:
            require_reachable(constants.ENDPOINT)
        except ConnectionError as error:
            raise FileNotFoundError(
                f"{place} is no file or folder here, and the Hugging Face hub is out of reach ({error}): mend the "
                "path, or connect; what was loaded before is read with HF_HUB_OFFLINE=1"
            ) from error
    try:
        with _quiet():
            data = load_dataset(repo, config or None)
    except Exception as error:  # of datasets, huggingface_hub or the HTTP library
        raise ValueError(
            f"{place} is no file or folder here, and not to be had from the Hugging Face hub (owner/name or "
            f"owner/name:config): {' '.join(str(error).split())[:400]}"
        ) from error
    tables = {name: Table(f"{place} {name}", list(rows), rows.features) for name, rows in data.items()}
    known = {SPLITS[name]: table for name, table in tables.items() if name in SPLITS}
    if known and (more := [name for name in tables if name not in SPLITS]):
        logger.info("note: of %s the splits %s are not used", place, ", ".join(more))
    return known or tables


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it `datasets` logs nothing: what it says is in the exception too."""
    from datasets.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
