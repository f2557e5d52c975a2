"""Subj: subjectivity dataset v1.0 of Pang and Lee 2004, https://www.cs.cornell.edu/people/pabo/movie-review-data/"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..utils.hub import fetch
from .splits import Row, lines_of

LABELS = ["objective", "subjective"]

MINI_FILE = Path(__file__).parent.parent / "assets" / "subj-mini.tsv"

SUBJ_FILES = {"plot.tok.gt9.5000": 0, "quote.tok.gt9.5000": 1}  # file: label

# SpikeGPT-216M on a GPU, in percent: SpikeGPT's own figures for the first two, SpikeLoRA's for the others.
PUBLISHED = [
    {"method": "SpikeGPT from scratch", "accuracy": 89.10},
    {"method": "full fine-tuning", "accuracy": 95.30},
    {"method": "LoRA", "accuracy": 90.70},
    {"method": "SpikeLoRA", "accuracy": 91.10},
]

SUBJ_ARCHIVE = "https://www.cs.cornell.edu/people/pabo/movie-review-data/rotten_imdb.tar.gz"

HUB_ID, HUB_REVISION = "SetFit/subj", "f3c1162e678417f664d76b21864fdb87b0615fcf"

HUB_FILES = ["train.jsonl", "test.jsonl"]

SUBJ_FINGERPRINT = "c3bc137015a7a41455ae248b0cc81d625caaac25e35a365d4a13769008584b11"

_CAT_V = re.compile(r"M-(?: (?=[?{]))?(\^?)([ -~])")


def read_mini(data_dir: str | Path | None) -> Iterator[Row]:
    if data_dir is not None:
        raise ValueError(f"data_dir must be None for the built-in task subj-mini, got {str(data_dir)!r}")
    for where, line in lines_of(MINI_FILE, "utf-8"):
        label, _, text = line.partition("\t")
        if label not in LABELS:
            raise ValueError(f"{where} must be {' or '.join(LABELS)}, a tab and a sentence, found {line!r}")
        yield Row(where, text, LABELS.index(label))


def read_subj(data_dir: str | Path | None) -> Iterator[Row]:
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
        yield from (Row(where, text, label) for where, text in lines_of(folder / name, "cp1252"))


def _read_hub(paths: list[Path]) -> Iterator[Row]:
    for where, line in (pair for path in paths for pair in lines_of(path, "utf-8")):
        try:
            record = json.loads(line)
            text, label, label_text = _CAT_V.sub(_undo_cat_v, record["text"]), record["label"], record.get("label_text")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{where} must be a JSON object with text and label, found {line!r}") from error
        if label not in (0, 1) or label_text not in (None, LABELS[label]):
            raise ValueError(f"{where} must be 0 {LABELS[0]} or 1 {LABELS[1]}, found {label!r} {label_text!r}")
        yield Row(where, text, label)


def _undo_cat_v(match: re.Match) -> str:
    """The cp1252 character for which `cat -v` wrote "M-i" or "M-^E" (SentEval did, so SetFit/subj has these)."""
    code = ord(match[2]) ^ (64 if match[1] else 0) | 128
    return bytes([code]).decode("cp1252", "ignore")
