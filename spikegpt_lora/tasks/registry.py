"""Classification tasks as `datasets.DatasetDict`: their names, and loading them in fixed splits (see splits.py).

A task of your own is a file, a folder or a hub id (see own.py); one that is to be known by its name is a function that
gives its sentences, and a row in `TASKS`.
"""

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .glue import COLA_LABELS, RTE_LABELS, read_cola, read_rte
from .glue import HUB_ID as GLUE_ON_HUB
from .own import name_of, read_own
from .splits import Row, digest_of, hash_split, own_split
from .subj import HUB_ID as SUBJ_ON_HUB
from .subj import LABELS, PUBLISHED, SUBJ_FINGERPRINT, read_mini, read_subj
from .tables import HUB_ID, KINDS, WHOLE

if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.getLogger(__name__)

MAX_LENGTH = 128

Digests = list[tuple[str, Row]]  # rows, each after its digest


class Task(NamedTuple):
    """How to read a task, and what is known of it.

    read: from a folder (None: wherever they are found), its rows, which are split by us, or a dict of them by split.
    labels: names of its classes, in the order of `Row.label`.
    per_class: sentences of each class; None: not checked.
    fingerprint: sha256 of its sorted digests, None where no text was released.
    published: [{method, accuracy}], figures of papers in percent, for the table of results.
    hub_id: of the same sentences on the Hugging Face hub, for the cards of models.
    metric: what papers give of it, "accuracy" or "MCC", which tables then show beside the accuracy.
    max_length: tokens of a sentence that are read if nothing else is said; the rest is cut off.
    """

    read: Callable[[str | Path | None], Iterable[Row] | dict[str, list[Row]]]
    labels: Sequence[str]
    per_class: int | None = None
    fingerprint: str | None = None
    published: Sequence[dict] = ()
    metric: str = "accuracy"
    max_length: int = MAX_LENGTH
    hub_id: str | None = None


TASKS = {
    "subj": Task(read_subj, LABELS, 5000, SUBJ_FINGERPRINT, PUBLISHED, hub_id=SUBJ_ON_HUB),
    "subj-mini": Task(read_mini, LABELS, 300),
    "cola": Task(read_cola, COLA_LABELS, metric="MCC", hub_id=GLUE_ON_HUB),
    # With 128 tokens, one pair of five would lose its second text's end.
    "rte": Task(read_rte, RTE_LABELS, max_length=256, hub_id=GLUE_ON_HUB),
}


def load_task(
    name: str,
    data_dir: str | Path | None = None,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    pooled: bool = False,
) -> "DatasetDict":
    """Splits train, validation and test of task `name`, with columns `text` (ASCII) and `label`, a ClassLabel.

    "subj" (10,000 sentences) is read from `data_dir`, else from the folder in SPIKEGPT_LORA_DATA, else from SetFit/subj
    on the Hugging Face hub or in its local cache: the same sentences, splits and order, but the hub's copy was
    tokenised a second time ("ca n't"), so compare scores within one source. "subj-mini" (600 sentences of our own) is
    built in. Sentences repeated within a class (Subj has two pairs that differ in punctuation alone) are kept and fall
    into the same split. "cola" and "rte" are GLUE's, read from the same places; test is GLUE's dev, as GLUE keeps the
    labels of its test split. Any other task is the path of a file or folder, or a hub id: see own.py.

    A task's own test split stays one; else 70/10/20 % of all sentences are train, validation and test (splits.py).

    Args:
        text_columns, label_column: of a task of one's own; found where they are not given.
        pooled: own splits are put together and split as those of a task that has none.

    Raises:
        ValueError: an unknown name, a folder without the files, and damaged data (file, line, rule, finding).
        FileNotFoundError: within 5 seconds, when there is no source.
    """
    if name in TASKS:
        if text_columns or label_column:
            raise ValueError(f"columns are named of a task of one's own; those of {name} are known")
        read, labels = TASKS[name].read(data_dir), list(TASKS[name].labels)
    else:
        require_own(name, data_dir)
        read, labels = read_own(name, text_columns, label_column)
    parts = read if isinstance(read, dict) else {WHOLE: read}
    rows = {split: [(digest_of(row), row) for row in part] for split, part in parts.items()}
    everything = list(chain(*rows.values()))
    if name in TASKS and TASKS[name].per_class:
        _check(name, TASKS[name], everything)
    else:
        _warn_of_repeated(name, everything)
    has_own = "train" in rows and len(rows) > 1 and not pooled
    data = own_split(rows, labels) if has_own else hash_split(everything, labels)
    if few := [split for split, part in data.items() if len(part) < 2]:
        raise ValueError(f"{name} must hold more sentences: there are {len(everything)}, and too few for {few[0]}")
    if unseen := sorted(set(range(len(labels))) - set(data["train"]["label"])):
        logger.warning("note: no training sentence of %s is of class %s", name, ", ".join(labels[n] for n in unseen))
    return data


def labels_of(data: "DatasetDict") -> list[str]:
    """Names of the classes of a task, in the order of its labels."""
    return data["train"].features["label"].names


def task_name(name: str) -> str:
    """What a task is called in folders and tables."""
    return name if name in TASKS else name_of(name)


def require_own(name: str, data_dir: str | Path | None) -> None:
    """Raise ValueError where `name` cannot be a task of one's own."""
    if not Path(name).exists() and (not HUB_ID.fullmatch(name) or Path(name).suffix.lower() in KINDS):
        raise ValueError(
            f"a task must be {', '.join(TASKS)}, a file or folder of sentences ({', '.join(KINDS)}), or a hub id "
            f"owner/name; {name!r} is none of these (no such file)"
        )
    if (known := task_name(name)) in TASKS:
        raise ValueError(f"{name} is called as the task {known} is, which --task {known} reads: give it another name")
    if data_dir is not None:
        raise ValueError(f"data_dir is for {', '.join(TASKS)}: {name} is a task's place itself, got {str(data_dir)!r}")


def _check(name: str, task: Task, rows: Digests) -> None:
    """Raise ValueError for a sentence in two classes, or another number of sentences than there should be; warn where
    they are not the released ones."""
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
    digests = "".join(sorted(digest for digest, _ in rows))
    if task.fingerprint not in (None, hashlib.sha256(digests.encode()).hexdigest()):
        logger.warning("the sentences of %s are not the released ones, so the split is not the usual one", name)


def _warn_of_repeated(name: str, rows: Digests) -> None:
    """Warn where sentences stand in several classes."""
    labels = defaultdict(set)
    for digest, row in rows:
        labels[digest].add(row.label)
    if differing := sum(len(given) > 1 for given in labels.values()):
        logger.warning("note: %s holds %d sentences in more than one class; they are kept", name, differing)
