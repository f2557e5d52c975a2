"""Text to learn answers from, as trl's SFTTrainer takes it: a file, or a dataset on the Hugging Face hub.

    messages                       a conversation: a list of {"role", "content"}; what the assistant says is learned
    prompt, completion             text; the completion is learned
    instruction, (input,) output   Alpaca's: a conversation of one question and its answer
    text                           all of it is learned

The first of these forms whose columns there are is that of every row. Each answer of a conversation becomes a row,
whose prompt is all that was said before it: trl's loss on completions then falls on answers alone, whatever the chat
template. So a conversation of many answers is read once for each.
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..utils.errors import DamagedFile, first_line
from ..utils.hub import require_reachable

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

# For a tokenizer without one of its own: "user: a question", a line feed, "assistant: an answer", the end of text.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def load_instructions(source: str, validation: float = 0, seed: int = 0) -> "DatasetDict":
    """Splits train and, with `validation`, validation; their columns are `prompt` and `completion`, or `text`.

    Args:
        source: a .json, .jsonl, .csv or .parquet file, or the id of a dataset with a split train.
        validation: rows that are drawn for the second split: how many, or below 1 which share of all.
        seed: of the draw. A conversation is in one split.

    Raises:
        FileNotFoundError: no such file, and no such dataset within reach.
        DamagedFile: it cannot be read.
        ValueError: no row, none of the forms, a row that is not of the form (source and row), or no row left to train
            on.
    """
    from datasets import Dataset, DatasetDict

    rows = _read(source)
    columns, form = _form_of(source, rows.column_names)
    learned = []
    for number, row in enumerate(rows, 1):
        try:
            learned.append(form(row))
        except ValueError as error:
            raise ValueError(f"{source} row {number}: {error} (rows of {', '.join(columns)})") from error
    held = int(validation) if validation >= 1 else int(np.ceil(validation * len(learned)))
    if held >= len(learned):
        raise ValueError(f"{source} must have a row left to train on, has {len(learned)}, {held} for validation")
    order = np.random.default_rng(seed).permutation(len(learned))
    splits = {"train": np.sort(order[held:]), "validation": np.sort(order[:held])}
    return DatasetDict(
        {name: Dataset.from_list([one for place in places for one in learned[place]])
         for name, places in splits.items() if len(places)}
    )  # fmt: skip


def _read(source: str) -> "Dataset":
    from datasets import Dataset, load_dataset

    path = Path(source)
    try:
        if path.is_file() and path.suffix == ".csv":  # datasets would make numbers of what looks like one
            with path.open(encoding="utf-8", newline="") as file:
                return Dataset.from_list(list(csv.DictReader(file)))
        if path.is_file() and path.suffix in FILES:
            return load_dataset(FILES[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # a damaged file can fail anywhere in the readers
        reason = first_line(error.__cause__ or error) or "nothing in it"
        raise DamagedFile(f"{path} is no whole {path.suffix} file ({reason})") from error
    if path.exists() or path.suffix in FILES:
        rule = f"a {', '.join(FILES)} file, or the id of a dataset on the hub"
        raise FileNotFoundError(f"the data must be {rule}, got {source}{'' if path.exists() else ': no such file'}")
    try:
        require_reachable(f"https://huggingface.co/datasets/{source}")
        return load_dataset(source, split="train")
    except Exception as error:  # the HTTP library's own kinds are no OSError
        raise FileNotFoundError(f"{source!r} is no file, nor a dataset within reach: {first_line(error)}") from error


def _form_of(source: str, columns: list[str]) -> tuple[tuple[str, ...], Callable[[dict], list[dict]]]:
    for needed, form in FORMS.items():
        if set(needed) <= set(columns):
            return needed, form
    forms = "; ".join(", ".join(needed) for needed in FORMS)
    raise ValueError(f"{source} must have the columns of one form ({forms}), has {', '.join(columns) or 'no row'}")


def _conversation(row: dict) -> list[dict]:
    messages = row["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"messages must be a list of role and content, got {_shown(messages)}")
    said = [{key: _text(message, key) for key in ("role", "content")} for message in messages]
    answers = [place for place, message in enumerate(said) if place and message["role"] == "assistant"]
    if not answers:
        raise ValueError(f"an assistant must answer, the roles are {[message['role'] for message in said]}")
    return [{"prompt": said[:place], "completion": [said[place]]} for place in answers]


def _completion(row: dict) -> list[dict]:
    return [{name: _text(row, name) for name in ("prompt", "completion")}]


def _instruction(row: dict) -> list[dict]:
    given = row.get("input") or ""
    question = _text(row, "instruction") + (f"\n\n{_text(row, 'input')}" if given else "")
    said = {"user": question, "assistant": _text(row, "output")}
    return _conversation({"messages": [{"role": role, "content": content} for role, content in said.items()]})


def _plain(row: dict) -> list[dict]:
    return [{"text": _text(row, "text")}]


FORMS: dict[tuple[str, ...], Callable[[dict], list[dict]]] = {
    ("messages",): _conversation,
    ("prompt", "completion"): _completion,
    ("instruction", "output"): _instruction,
    ("text",): _plain,
}


def _text(row: dict, name: str) -> str:
    value: Any = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be text and not blank, got {_shown(value)}")
    return value


def _shown(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
