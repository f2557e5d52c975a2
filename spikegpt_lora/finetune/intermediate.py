"""An intermediate task: what a method trains is trained on another task's sentences first, then on its own.

Each method goes through both with what it trains (adapters stay on the same frozen weights), so methods can be compared
as before. Source: STILTs (Phang, Fevry & Bowman 2018, arXiv 1811.01088).
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..pretrain.corpus import word_sequences
from ..utils.errors import DamagedFile, read_json
from ..utils.files import whole_file, write_json
from .options import FinetuneOptions
from .run import require_trained, seconds_of, trained

WEIGHTS, RECORD = "trained.safetensors", "intermediate.json"


@dataclass(frozen=True)
class Source:
    """The sentences of an intermediate task. left_out: how many more shared 8 words in a row with the task's
    own, or were among these."""

    name: str
    text: Dataset
    left_out: int

    def drawn(self, most: int) -> "Source":
        """`most` of its sentences, or all if it has no more; the same ones whenever it is asked."""
        return replace(self, text=self.text.shuffle(seed=0).select(range(min(most, len(self.text)))))


def without_shared(name: str, text: Dataset, data: DatasetDict) -> Source:
    """`text` without what shares 8 words in a row with a sentence of `data`, of any split, or is one of these."""
    own = {sentence for rows in data.values() for sentence in rows["text"]}
    known = set().union(*map(word_sequences, own))
    kept = [
        row
        for row, sentence in enumerate(text["text"])
        if sentence not in own and known.isdisjoint(word_sequences(sentence))
    ]
    return Source(name, text.select(kept), len(text) - len(kept))


def options_of_source(options: FinetuneOptions) -> FinetuneOptions:
    """Of the intermediate task, for the `options` of the task after it: one pass in larger batches at a higher rate."""
    rate = 3 * options.learning_rate
    return replace(options, epochs=1, batch_size=2 * options.batch_size, learning_rate=rate, keep="last")


def train_first(
    model: nn.Module,
    method: str,
    source: Dataset,
    judged: Dataset | None,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    seed: int,
    options: FinetuneOptions,
    description: str = "",
) -> dict:
    """Train `model` (from `run.adapt`) in place on `source`, the tokens of the intermediate task.

    Args:
        judged: tokens of the task itself, of whose labels it has not seen one; None: it is not judged.
        directory: what was trained stays there, and whoever calls again finds it; an interrupted run goes on.
        options: see `options_of_source`.

    Returns:
        {sentences, seconds, accuracy on `judged` (or None)}.

    Raises:
        DamagedFile: what `directory` holds is none of `model`. Otherwise as `run.finetune`.
    """
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if (directory / RECORD).is_file():
        record = read_json(directory / RECORD, keys=("sentences", "seconds", "accuracy"))
        tensors = load_file(directory / WEIGHTS)
        if {name: p.shape for name, p in own.items()} != {name: tensor.shape for name, tensor in tensors.items()}:
            raise DamagedFile(f"{directory / WEIGHTS} holds other weights than {method} trains: delete {directory}")
        for name, p in own.items():
            p.data.copy_(tensors[name])
        return record
    data = DatasetDict({"train": source} | ({} if judged is None else {"validation": judged}))
    trainer = trained(model, method, data, tokenizer, directory, seed, options, description)
    require_trained(model)
    accuracy = None if judged is None else trainer.evaluate()["eval_accuracy"]
    with whole_file(directory / WEIGHTS) as temporary:
        save_file({name: p.detach().contiguous() for name, p in own.items()}, temporary)
    record = {"sentences": len(source), "seconds": seconds_of(trainer), "accuracy": accuracy}
    write_json(directory / RECORD, record)
    for folder in directory.glob("checkpoint-*"):
        shutil.rmtree(folder)
    return record
