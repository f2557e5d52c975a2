"""Fine-tuning a SpikeGPT classifier by any of `METHODS`, on `transformers.Trainer`, so that they can be compared.

Methods are paired: for one seed they start from the same model (the same initial `score` included) and read the same
sentences in the same order. The epoch is picked on the validation split; the test split is read once, at the end.
Settings of the SpikeLoRA authors, for comparison with their figures, are options: see `options.PARITY`.
"""

import shutil
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np
from datasets import Dataset, DatasetDict
from peft.tuners.tuners_utils import BaseTunerLayer
from scipy.special import softmax
from sklearn.metrics import matthews_corrcoef
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, Trainer, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.training_args import ParallelMode

from ..forward import run
from ..model import SpikeGPTForSequenceClassification
from ..observe.adapters import observe_adapters
from ..observe.books import totals
from ..observe.operations import count_operations
from ..ops.dropout import set_dropout
from ..ops.spike_linear import SpikeLinear
from ..utils.errors import writing
from ..utils.inputs import require_finite
from ..utils.stopping import deferred
from .methods import METHODS
from .options import FinetuneOptions
from .trainer import (
    Losses,
    PaddingAsText,
    PairedTrainer,
    Progress,
    Resumption,
    Stopwatch,
    last_whole_checkpoint,
    longest_first,
    training_arguments,
)

T = TypeVar("T")

COUNTED = 256  # sentences, of which weight reads are counted
REMEMBERED = (
    1000  # training sentences, the first ones, that it is tested on too: see `train_accuracy` in report/results.py
)


def adapt(model: SpikeGPTForSequenceClassification, method: str, options: FinetuneOptions, seed: int) -> nn.Module:
    """`model` made ready for `method`, one of `METHODS`.

    Raises:
        ValueError: unknown method, or a rank larger than any of the model's matrices.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    set_seed(seed)
    set_dropout(model, options.dropout)
    return METHODS[method].ready(model, options)


def tokenize(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[DatasetDict, int]:
    """`data` with columns input_ids and labels in place of text and label, and how many sentences were cut short.

    Raises:
        ValueError: a sentence without a single token.
    """
    tokenized, cut = DatasetDict(), 0
    for split, rows in data.items():
        ids = tokenizer(list(rows["text"]))["input_ids"]
        if not all(ids):
            raise ValueError(
                f"{split} holds a sentence without tokens: {rows['text'][[len(i) for i in ids].index(0)]!r}"
            )
        cut += sum(len(i) > max_length for i in ids)
        tokenized[split] = Dataset.from_dict({"input_ids": [i[:max_length] for i in ids], "labels": rows["label"]})
    return tokenized, cut


def finetune(
    model: nn.Module,
    method: str,
    data: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    seed: int,
    options: FinetuneOptions,
    description: str = "",
    report_to: Sequence[str] = (),
) -> tuple[nn.Module, dict]:
    """Train `model` (from `adapt`) on data["train"], keep the epoch best on data["validation"], read data["test"] once.

    Args:
        data: from `tokenize`. Without "test" (while settings are tuned) nothing is tested; "validation" may be missing
            where `options.keep` is "last".
        directory: where checkpoints go; a run that was interrupted there goes on from its last whole one.
        description: the progress bar's text.
        report_to: programs that draw learning curves, as transformers' TrainingArguments name them.

    A first Ctrl-C or SIGTERM while it trains is obeyed after the step, which is saved; a second one at once.

    Returns:
        The model of the best epoch in evaluation mode, and the run's record (see `report`).

    Raises:
        FloatingPointError: loss, gradient, weights or answers are not finite; `directory` is then removed.
        KeyboardInterrupt, errors.Stopped: Ctrl-C, SIGTERM.
    """
    try:
        with writing(directory):
            trainer = trained(model, method, data, tokenizer, directory, seed, options, description, report_to)
        require_trained(trainer.model)
        named = {"method": method, "title": METHODS[method].title, **METHODS[method].record}
        record = named | {"seed": seed, "settings": asdict(options), **_record(trainer)}
        record["weight_reads"] = _weight_reads(trainer, data.get("validation", data["train"]))
        if "test" in data:
            first = (
                data["train"].select_columns(["input_ids", "labels"]).select(range(min(REMEMBERED, len(data["train"]))))
            )
            record["train_accuracy"] = float(_predicted(trainer, first)[1].mean())
            record |= _test(trainer, data["test"])
        else:
            record["adapters"] = _with_adapters(trainer, data["validation"])[-1] if adapters_of(trainer.model) else None
    except FloatingPointError as error:
        shutil.rmtree(directory, ignore_errors=True)  # whoever went on from there would come here again
        raise FloatingPointError(
            f"{method} with seed {seed} diverged: {error}. Nothing of it is kept. Give it a learning rate below "
            f"{options.learning_rate:g} (--learning-rate {method}=...)"
        ) from error
    return model.eval(), record


def trained(
    model: nn.Module,
    method: str | None,
    data: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    seed: int,
    options: FinetuneOptions,
    description: str = "",
    report_to: Sequence[str] = (),
) -> Trainer:
    """The Trainer that has trained `model`; arguments as of `finetune`, without a method none of its callbacks."""
    callbacks = [] if method is None else METHODS[method].callbacks(options)
    judged = data.get("validation")
    if judged is not None and not options.read_padding:  # else an answer depends on the batch
        judged = judged.select(longest_first(judged))
    with deferred() as stop:
        trainer = PairedTrainer(
            model=model,
            args=training_arguments(directory, seed, options, report_to),
            train_dataset=data["train"],
            eval_dataset=judged,
            processing_class=tokenizer,
            data_collator=PaddingAsText(tokenizer) if options.read_padding else DataCollatorWithPadding(tokenizer),
            compute_metrics=_accuracy,
            callbacks=[Stopwatch(), Losses(), Resumption(stop), *callbacks],
        )
        for name in ("group_by_length", "word_dropout", "spike_penalty", "teacher_share", "temperature"):
            setattr(trainer, name, getattr(options, name))
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(Progress(description))
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(directory))
    return trainer


def require_trained(model: nn.Module) -> None:
    """Raise FloatingPointError where training left a parameter that is not finite."""
    try:
        require_finite(dict(model.named_parameters()), "the trained weights")
    except ValueError as error:
        raise FloatingPointError(str(error)) from error


def seconds_of(trainer: Trainer) -> float:
    return _callback(trainer, Stopwatch).seconds


def _callback(trainer: Trainer, kind: type[T]) -> T:
    return next(one for one in trainer.callback_handler.callbacks if isinstance(one, kind))


def _by_epoch(losses: list[float], epochs: int) -> list[float]:
    return [float(part.mean()) for part in np.array_split(losses, epochs)]


def _record(trainer: Trainer) -> dict:
    evaluations = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    best = max(evaluations, key=lambda entry: entry["eval_accuracy"], default=None)
    parameters = list(trainer.model.parameters())
    return {
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters),
        "seconds": seconds_of(trainer),
        "best_epoch": round(best["epoch"]) if best else round(trainer.state.epoch),
        "validation_accuracy": best["eval_accuracy"] if best else None,
        "validation_by_epoch": [entry["eval_accuracy"] for entry in evaluations],
        "loss_by_epoch": _by_epoch(_callback(trainer, Losses).by_step, round(trainer.state.epoch)),
        "validation_loss_by_epoch": [entry["eval_loss"] for entry in evaluations],
        "sparsity_by_epoch": [entry["eval_sparsity"] for entry in evaluations if "eval_sparsity" in entry],
        "sparsity_by_step": {
            entry["step"]: entry["train_sparsity"] for entry in trainer.state.log_history if "train_sparsity" in entry
        },
    }


def _weight_reads(trainer: Trainer, rows: Dataset) -> float | None:
    """Share of the blocks' weights that a token of the first COUNTED `rows` reads; None without integer spikes."""
    if not any(isinstance(module, SpikeLinear) for module in trainer.model.modules()):
        return None
    some = rows.select(range(min(COUNTED, len(rows))))
    counted = count_operations(trainer.model, DataLoader(some, COUNTED // 8, collate_fn=trainer.data_collator))
    return totals(counted, blocks=True)["weight_reads_share"]


def _test(trainer: Trainer, rows: Dataset) -> dict:
    """Accuracy and MCC on `rows`, and what the adapters do there: the only time that the test labels are read."""
    probabilities, correct, adapters = _with_adapters(trainer, rows)
    return {
        "test_accuracy": float(correct.mean()),
        "test_mcc": float(matthews_corrcoef(list(rows["labels"]), probabilities.argmax(axis=-1))),
        "test_correct": "".join(str(int(right)) for right in correct),
        "test_probabilities": probabilities.tolist(),
        "adapters": adapters,
    }


def _with_adapters(trainer: Trainer, rows: Dataset) -> tuple[np.ndarray, np.ndarray, dict | None]:
    """As `_predicted`; and what the adapters do meanwhile, with the accuracy without them, None if there are none."""
    parts = trainer.args.parallel_mode != ParallelMode.NOT_PARALLEL  # no device predicts all rows: count on them apart
    if parts:
        predicted = _predicted(trainer, rows)
    with observe_adapters(trainer.model) as seen:
        if not parts:
            predicted = _predicted(trainer, rows)
        elif seen.adapted:
            for batch in DataLoader(rows, trainer.args.eval_batch_size, collate_fn=trainer.data_collator):
                run(trainer.model, batch)
    if not seen.adapted:
        return *predicted, None
    with adapters_off(trainer.model):
        without = float(_predicted(trainer, rows)[1].mean())
    return *predicted, {**vars(seen.activity()), "accuracy_without": without}


def _predicted(trainer: Trainer, rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """What the model gives to each class, `(sentences, classes)`, and whether the likeliest is right."""
    as_text = isinstance(trainer.data_collator, PaddingAsText)
    order = np.arange(len(rows)) if as_text else longest_first(rows)
    predicted, back = trainer.predict(rows.select(order)), np.argsort(order)
    right = _answers(predicted.predictions) == predicted.label_ids
    return softmax(predicted.predictions.astype(np.float64), axis=-1)[back], right[back]


def _answers(logits: np.ndarray) -> np.ndarray:
    if not np.isfinite(logits).all():  # of NaN the largest is the first
        raise FloatingPointError("the model's answers are not finite")
    return logits.argmax(axis=-1)


def adapters_of(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def adapters_off(model: nn.Module):
    """Within it, adapters add nothing; a trained `score` stays, which peft's own `disable_adapter` would take away."""
    layers = [layer for layer in adapters_of(model) if not layer.disable_adapters]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(_answers(prediction.predictions) == prediction.label_ids))}
