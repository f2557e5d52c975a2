"""Sentences for an intermediate task: in the classes of a task, but by another rule, and none of them its own.

`film` tells the source of a sentence, a critic's snippet or a plot. Subj's own labels are such sources (Pang & Lee
2004), so who is trained on them has seen its rule, though none of its sentences: a table must say so.
"""

import lzma
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .splits import Row, lines_of
from .subj import LABELS as SUBJ_LABELS
from .text import to_ascii

if TYPE_CHECKING:
    from datasets import Dataset

FILM_FILE = "sentences.tsv.xz"
SNIPPETS = "rt_reviews"  # the source whose sentences are opinions; all others are plots


def load_labelled(name: str, labels: Sequence[str], data_dir: str | Path | None = None) -> "Dataset":
    """Columns `text` (ASCII) and `label` of the sentences of `name`, in the order of the file.

    Args:
        name: "film", or a file of lines `label<TAB>sentence`.
        labels: names of the classes, in the order of the numbers that they are given.
        data_dir: where film/sentences.tsv.xz is; None: the folder in SPIKEGPT_LORA_DATA.

    Raises:
        FileNotFoundError: no such file. ValueError: a line that is none of its kind, or a class without a sentence, or
            film for other classes than Subj's.
    """
    from datasets import Dataset

    if name == "film" and list(labels) != SUBJ_LABELS:
        raise ValueError(
            f"the intermediate task film tells {' from '.join(SUBJ_LABELS)}, and this task's classes are "
            f"{', '.join(labels)}: give a file of label, tab and sentence with these"
        )

    rows = list(_film(data_dir) if name == "film" else _file(Path(name), labels))
    missing = [label for number, label in enumerate(labels) if all(row.label != number for row in rows)]
    if missing:
        raise ValueError(f"{name} must hold sentences of every class, found none that is {' or '.join(missing)}")
    return Dataset.from_dict({"text": [to_ascii(row.text) for row in rows], "label": [row.label for row in rows]})


def _file(path: Path, labels: Sequence[str]) -> Iterator[Row]:
    if not path.is_file():
        raise FileNotFoundError(f"the intermediate task must be film or a file of label, tab and sentence: no {path}")
    for where, line in lines_of(path, "utf-8"):
        label, _, text = line.partition("\t")
        if label not in labels or not text.strip():
            raise ValueError(f"{where} must be {' or '.join(labels)}, a tab and a sentence, found {line!r}")
        yield Row(where, text, labels.index(label))


def _film(data_dir: str | Path | None) -> Iterator[Row]:
    folder = data_dir or os.environ.get("SPIKEGPT_LORA_DATA")
    places = [Path(folder) / "film" / FILM_FILE, Path(folder) / FILM_FILE] if folder else []
    if not (path := next((place for place in places if place.is_file()), None)):
        raise FileNotFoundError(
            "the intermediate task film was not found: --data-dir or SPIKEGPT_LORA_DATA must name a folder with "
            f"film/{FILM_FILE} (lines: source, tab, sentence; {SNIPPETS} are opinions), got {folder}. Any other file "
            "of label, tab and sentence will do: --intermediate FILE"
        )
    try:
        lines = lzma.decompress(path.read_bytes()).decode("utf-8").removesuffix("\n").split("\n")
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be UTF-8 text in a whole .xz archive: {error}") from error
    for number, line in enumerate(lines, 1):
        source, _, text = line.partition("\t")
        if not text.strip():
            raise ValueError(f"{path} line {number} must be a source, a tab and a sentence, found {line!r}")
        yield Row(f"{path} line {number}", text, int(source == SNIPPETS))
