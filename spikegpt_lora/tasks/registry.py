"""Classification tasks as `datasets.DatasetDict`, in splits that do not depend on where the text came from.

    u = sha256(ASCII letters and digits of the sentence as read, lower-cased) / 2^256
    train: u < 0.7, validation: 0.7 <= u < 0.8, test: 0.8 <= u; inside a split sentences are ordered by u

Subj: subjectivity dataset v1.0 of Pang and Lee 2004, https://www.cs.cornell.edu/people/pabo/movie-review-data/
"""

import hashlib
import html
import json
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..utils.hub import fetch

if TYPE_CHECKING:
    from datasets import DatasetDict

LABELS = ["objective", "subjective"]
MINI_FILE = Path(__file__).parent.parent / "assets" / "subj-mini.tsv"
SUBJ_FILES = {"plot.tok.gt9.5000": 0, "quote.tok.gt9.5000": 1}  # file: label
SUBJ_ARCHIVE = "https://www.cs.cornell.edu/people/pabo/movie-review-data/rotten_imdb.tar.gz"
HUB_ID, HUB_REVISION = "SetFit/subj", "f3c1162e678417f664d76b21864fdb87b0615fcf"
HUB_FILES = ["train.jsonl", "test.jsonl"]

# Subj's tokeniser makes dashes and ellipses words of their own; 0x80-0x9f read as latin-1 are cp1252 characters.
_ASCII = {"'": "‘’‚‛´′‹›", '"': "“”„‟″«»", "-": "‐−", " -- ": "–—", " . . . ": "…", "/": "⁄", "ae": "æÆ", "oe": "œŒ"}
_ASCII |= {"o": "øØ", "ss": "ß"}
_FOLD = {ord(character): ascii_form for ascii_form, characters in _ASCII.items() for character in characters}
_FOLD |= {code: bytes([code]).decode("cp1252", "ignore").translate(_FOLD) for code in range(0x80, 0xA0)}
_ENTITY = re.compile(r"(\^ ?)?& ?(?:# ?(\d+)|([a-z](?:acute|grave|circ|uml|tilde|cedil))) ?;")
_CAT_V = re.compile(r"M-(?: (?=[?{]))?(\^?)([ -~])")

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """One sentence as read; `where` is its file and line, `label` indexes LABELS."""

    where: str
    text: str
    label: int


class Task(NamedTuple):
    """How to read a task; `fingerprint` is the sha256 of its sorted digests, None where no text was released."""

    read: Callable[[str | Path | None], Iterable[Row]]
    per_class: int
    fingerprint: str | None = None


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
    read, per_class, fingerprint = TASKS[name]
    rows = [(_digest(row), row) for row in read(data_dir)]
    _check(name, rows, per_class)
    digests = "".join(sorted(digest for digest, _ in rows))
    if fingerprint not in (None, hashlib.sha256(digests.encode()).hexdigest()):
        logger.warning("the sentences of %s are not the released ones, so the split is not the usual one", name)
    return _split(rows)


def resplit(data: "DatasetDict", seed: int) -> "DatasetDict":
    """All sentences of `data`, split 90/10 into train and test by `seed`, stratified: what the SpikeLoRA authors do."""
    from datasets import concatenate_datasets

    return concatenate_datasets(list(data.values())).train_test_split(0.1, stratify_by_column="label", seed=seed)


def to_ascii(text: str) -> str:
    """`text` in lower-case ASCII with single spaces, so that neither encoding nor HTML entities give the class away.

    UTF-8 read as cp1252 and entities (tokenised ones too: "&#233 ;") are decoded, cp1252 punctuation becomes what Subj
    writes for it, accents are dropped (NFKD). A character without an ASCII form is left out: a placeholder would mark
    the class, as Subj has such characters in one class only. A word that an entity broke in two stays broken.
    """
    try:
        text = text.encode("cp1252").decode("utf-8")
    except UnicodeError:
        pass  # not UTF-8 read as cp1252
    text = _ENTITY.sub(_entity, text).translate(_FOLD)
    text = unicodedata.normalize("NFKD", text).translate(_FOLD)
    return " ".join(text.encode("ascii", "ignore").decode().lower().split())


def _entity(match: re.Match) -> str:
    caret, code, name = match.groups()  # "^&#197 ;" is caret notation: byte 197 - 64
    return html.unescape(f"&#{int(code) - 64 * bool(caret)};" if code else f"&{name};")


def _undo_cat_v(match: re.Match) -> str:
    """The cp1252 character for which `cat -v` wrote "M-i" or "M-^E" (SentEval did, so SetFit/subj has these)."""
    code = ord(match[2]) ^ (64 if match[1] else 0) | 128
    return bytes([code]).decode("cp1252", "ignore")


def _digest(row: Row) -> str:
    """Hexadecimal sha256 of the sentence that splits and orders it, the same in every encoding of the text."""
    key = re.sub(r"[^a-z0-9]", "", row.text.encode("ascii", "ignore").decode().lower())
    if not key:
        raise ValueError(f"{row.where} must hold a sentence (letters or digits), found {row.text!r}")
    return hashlib.sha256(key.encode()).hexdigest()


def _check(name: str, rows: list[tuple[str, Row]], per_class: int) -> None:
    first = {}
    for digest, row in rows:
        other = first.setdefault(digest, row)
        if other.label != row.label:
            raise ValueError(f"{row.where} must be in one class, found {row.text!r} in the other at {other.where}")
    counts = Counter(row.label for _, row in rows)
    files = ", ".join(dict.fromkeys(row.where.rpartition(" line ")[0] for _, row in rows))
    for label, label_name in enumerate(LABELS):
        if counts[label] != per_class:
            raise ValueError(f"{name} must hold {per_class} {label_name} sentences, found {counts[label]} in {files}")


def _split(rows: list[tuple[str, Row]]) -> "DatasetDict":
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    parts = {"train": [], "validation": [], "test": []}
    for digest, text, label in sorted((digest, to_ascii(row.text), row.label) for digest, row in rows):
        u = int(digest, 16) / 2**256
        parts["train" if u < 0.7 else "validation" if u < 0.8 else "test"].append({"text": text, "label": label})
    features = Features({"text": Value("string"), "label": ClassLabel(names=LABELS)})
    return DatasetDict({name: Dataset.from_list(part, features=features) for name, part in parts.items()})


def _lines(path: Path, encoding: str) -> Iterator[tuple[str, str]]:
    """Pairs (file and line number, text); only the byte \\n ends a line."""
    raw = path.read_bytes()
    if not raw:
        raise ValueError(f"{path} must hold one sentence a line, found an empty file")
    for number, line in enumerate(raw.removesuffix(b"\n").split(b"\n"), 1):
        where = f"{path} line {number}"
        try:
            yield where, line.decode(encoding)
        except UnicodeDecodeError as error:
            found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
            raise ValueError(f"{where} must be {encoding} text, found {found}") from error


def _read_mini(data_dir: str | Path | None) -> Iterator[Row]:
    if data_dir is not None:
        raise ValueError(f"data_dir must be None for the built-in task subj-mini, got {str(data_dir)!r}")
    for where, line in _lines(MINI_FILE, "utf-8"):
        label, _, text = line.partition("\t")
        if label not in LABELS:
            raise ValueError(f"{where} must be {' or '.join(LABELS)}, a tab and a sentence, found {line!r}")
        yield Row(where, text, LABELS.index(label))


def _read_subj(data_dir: str | Path | None) -> Iterator[Row]:
    if data_dir is not None:
        return _read_folder(Path(data_dir), "data_dir")
    if os.environ.get("SPIKEGPT_LORA_DATA"):
        return _read_folder(Path(os.environ["SPIKEGPT_LORA_DATA"]), "SPIKEGPT_LORA_DATA")
    try:
        return _read_hub(fetch(HUB_FILES, HUB_ID, "dataset", HUB_REVISION))
    except OSError as error:
        raise FileNotFoundError(
            "the data of task subj were not found. Do one of these:\n"
            f"1. --data-dir FOLDER (data_dir=FOLDER), not given: unpack {SUBJ_ARCHIVE} there;\n"
            f"   FOLDER must hold {' and '.join(SUBJ_FILES)}, or a folder subj/ with them\n"
            "2. SPIKEGPT_LORA_DATA=FOLDER in the environment, not set: the same folder\n"
            f"3. network to the Hugging Face hub, for {HUB_ID}: connect once, it is cached from then on. Now: {error}\n"
            "The built-in task subj-mini needs none of them."
        ) from error


def _read_folder(folder: Path, origin: str) -> Iterator[Row]:
    if (folder / "subj").is_dir():
        folder = folder / "subj"
    missing = [name for name in SUBJ_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{origin} must hold {' and '.join(SUBJ_FILES)}, found no {' and no '.join(missing)} in {folder}"
        )
    for name, label in SUBJ_FILES.items():
        yield from (Row(where, text, label) for where, text in _lines(folder / name, "cp1252"))


def _read_hub(paths: list[Path]) -> Iterator[Row]:
    for where, line in (pair for path in paths for pair in _lines(path, "utf-8")):
        try:
            record = json.loads(line)
            text, label, label_text = _CAT_V.sub(_undo_cat_v, record["text"]), record["label"], record.get("label_text")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{where} must be a JSON object with text and label, found {line!r}") from error
        if label not in (0, 1) or label_text not in (None, LABELS[label]):
            raise ValueError(f"{where} must be 0 {LABELS[0]} or 1 {LABELS[1]}, found {label!r} {label_text!r}")
        yield Row(where, text, label)


SUBJ_FINGERPRINT = "c3bc137015a7a41455ae248b0cc81d625caaac25e35a365d4a13769008584b11"
TASKS = {"subj": Task(_read_subj, 5000, SUBJ_FINGERPRINT), "subj-mini": Task(_read_mini, 300)}
