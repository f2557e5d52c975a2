"""Classification tasks as `datasets.DatasetDict`: their names, and loading them in fixed splits (see splits.py).

A task of your own is a function that gives its sentences, and a row in `TASKS`.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .splits import Row, digest_of, hash_split
from .subj import HUB_ID, LABELS, PUBLISHED, SUBJ_FINGERPRINT, read_mini, read_subj

if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.getLogger(__name__)


class Task(NamedTuple):
    """How to read a task, and what is known of it.

    labels: names of its classes, in the order of `Row.label`.
    per_class: sentences of each class.
    fingerprint: sha256 of its sorted digests, None where no text was released.
    published: [{method, accuracy}], figures of papers in percent, for the table of results.
    hub_id: of the same sentences on the Hugging Face hub, for the cards of models.
    """

    read: Callable[[str | Path | None], Iterable[Row]]
    labels: Sequence[str]
    per_class: int
    fingerprint: str | None = None
    published: Sequence[dict] = ()
    hub_id: str | None = None


TASKS = {
    "subj": Task(read_subj, LABELS, 5000, SUBJ_FINGERPRINT, PUBLISHED, HUB_ID),
    "subj-mini": Task(read_mini, LABELS, 300),
}


def load_task(name: str, data_dir: str | Path | None = None) -> "DatasetDict":
    """Splits train, validation and test (70/10/20 %) of task `name`, with columns `text` (ASCII) and `label`.

    "subj" (10,000 sentences) is read from `data_dir`, else from the folder in SPIKEGPT_LORA_DATA, else from SetFit/subj
    on the Hugging Face hub or in its local cache: the same sentences, splits and order, but the hub's copy was
    tokenised a second time ("ca n't"), so compare scores within one source. "subj-mini" (600 sentences of our own) is
    built in. Sentences repeated within a class (Subj has two pairs that differ in punctuation alone) are kept and fall
    into the same split.

    Raises ValueError for an unknown name, a folder without the files, and damaged data (file, line, rule, finding);
    FileNotFoundError, within 5 seconds, when there is no source.
    """
    if name not in TASKS:
        raise ValueError(f"name must be one of {', '.join(TASKS)}, got {name!r}")
    task = TASKS[name]
    rows = [(digest_of(row), row) for row in task.read(data_dir)]
    _check(name, task, rows)
    digests = "".join(sorted(digest for digest, _ in rows))
    if task.fingerprint not in (None, hashlib.sha256(digests.encode()).hexdigest()):
        logger.warning("the sentences of %s are not the released ones, so the split is not the usual one", name)
    return hash_split(rows, list(task.labels))


def _check(name: str, task: Task, rows: list[tuple[str, Row]]) -> None:
    first: dict[str, Row] = {}
    for digest, row in rows:
        other = first.setdefault(digest, row)
        if other.label != row.label:
            raise ValueError(f"{row.where} must be in one class, found {row.text!r} in the other at {other.where}")
    counts = Counter(row.label for _, row in rows)
    files = ", ".join(dict.fromkeys(row.where.rpartition(" line ")[0] for _, row in rows))
    for label, label_name in enumerate(task.labels):
        if counts[label] != task.per_class:
            raise ValueError(
                f"{name} must hold {task.per_class} {label_name} sentences, found {counts[label]} in {files}"
            )
