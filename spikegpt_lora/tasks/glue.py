"""CoLA: the Corpus of Linguistic Acceptability of Warstadt et al. 2019, as GLUE has it; label 1 is acceptable."""

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def load_cola(folder: Path | None = None, holdout: bool = False) -> "DatasetDict":
    """Splits train and dev, with columns `text` and `label`.

    Args:
        folder: with train.tsv and dev.tsv, or a folder cola/ with them; else the one in SPIKEGPT_LORA_DATA, else
            nyu-mll/glue on the Hugging Face hub.
        holdout: dev is a tenth of the training set, for choosing settings; GLUE's own is not touched.

    Raises:
        ValueError: a file that is not UTF-8, or a line that is not GLUE's (file, line, rule).
    """
    from datasets import DatasetDict, load_dataset

    if folder is None and os.environ.get("SPIKEGPT_LORA_DATA"):
        folder = Path(os.environ["SPIKEGPT_LORA_DATA"])
    if folder is None:
        hub = load_dataset("nyu-mll/glue", "cola").rename_columns({"sentence": "text"})
        data = DatasetDict(train=hub["train"], dev=hub["validation"])
    else:
        folder = folder / "cola" if (folder / "cola").is_dir() else folder
        data = DatasetDict({name: _read_tsv(folder / f"{name}.tsv") for name in ("train", "dev")})
    if holdout:
        parts = data["train"].train_test_split(0.1, seed=0)
        data = DatasetDict(train=parts["train"], dev=parts["test"])
    return data


def _read_tsv(path: Path) -> "Dataset":
    from datasets import Dataset

    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} must be UTF-8 text, a sentence a line: {error}") from error
    wrong = next((n for n, row in enumerate(rows, 1) if len(row) != 4 or row[1] not in ("0", "1")), None)
    if wrong is not None or not rows:
        raise ValueError(f"{path} line {wrong or 1} must be source, 0 or 1, mark and sentence, parted by tabs")
    return Dataset.from_dict({"text": [row[3] for row in rows], "label": [int(row[1]) for row in rows]})
