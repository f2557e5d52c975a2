"""Fine-tuning a SpikeGPT classifier in five ways, on `transformers.Trainer`, so that the ways can be compared.

Methods are paired: for one seed they start from the same model (the same initial `score` included) and read the same
sentences in the same order. The epoch is picked on the validation split; the test split is read once, at the end.
Settings of the SpikeLoRA authors, for comparison with their figures, are options: see `settings.PARITY`.
"""

import json
import logging
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from .adapters import SparsityCallback, SpikeGate, SpikeLoraConfig, observe_adapters
from .adapters.config import PRESETS
from .model import SpikeGPTForSequenceClassification
from .settings import METHODS, FinetuneOptions
from .trace import adapter_activity

logger = logging.getLogger(__name__)


def adapt(model: SpikeGPTForSequenceClassification, method: str, options: FinetuneOptions, seed: int) -> nn.Module:
    """`model` made ready for `method`: "full" trains everything, "head" only `score`, "lora" and "spikelora" adapters
    (`options.targets`) and `score`, "scratch" everything, from new initial values but for `score`'s.

    Raises:
        ValueError: unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    set_seed(seed)
    set_dropout(model, options.dropout)
    if method == "full":
        return model
    if method == "scratch":
        new = SpikeGPTForSequenceClassification(model.config)
        new.score.load_state_dict(model.score.state_dict())
        return new
    if method == "head":
        model.spikegpt.requires_grad_(False)
        return model
    return get_peft_model(model, adapter_config(method, options))


def adapter_config(method: str, options: FinetuneOptions) -> LoraConfig:
    """The adapter of "lora" or "spikelora".

    Raises:
        ValueError: settings of the gate that it does not have.
    """
    shared = {
        "task_type": "SEQ_CLS",
        "r": options.rank,
        "lora_alpha": options.rank,
        "target_modules": PRESETS.get(options.targets, options.targets),
    }
    if method == "lora":
        return LoraConfig(**shared)
    names = ("v_threshold", "time", "gate", "learn", "target_sparsity")
    return SpikeLoraConfig(**shared, **{f"spikelora_{name}": getattr(options, name) for name in names})


def set_dropout(model: nn.Module, dropout: float) -> nn.Module:
    """`model` with another dropout probability after each block; changed in place."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    model.config.dropout = dropout
    return model


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
) -> tuple[nn.Module, dict]:
    """Train `model` (from `adapt`) on data["train"], keep the epoch best on data["validation"], read data["test"] once.

    Args:
        data: from `tokenize`. Without "test" (while settings are tuned) nothing is tested; "validation" may be missing
            where `options.keep` is "last".
        directory: where checkpoints go; a run that was interrupted there goes on from its last whole one.
        description: the progress bar's text.

    Returns:
        The model of the best epoch in evaluation mode, and the run's record (see `report`).
    """
    trainer = PairedTrainer(
        model=model,
        args=_training_arguments(directory, seed, options),
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        data_collator=PaddingAsText(tokenizer) if options.read_padding else DataCollatorWithPadding(tokenizer),
        compute_metrics=_accuracy,
        callbacks=[Stopwatch(), *([SparsityCallback()] if method == "spikelora" and options.target_sparsity else [])],
    )
    trainer.group_by_length, trainer.word_dropout = options.group_by_length, options.word_dropout
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Progress(description))
    trainer.train(resume_from_checkpoint=_last_whole_checkpoint(directory))
    record = {"method": method, "seed": seed, "settings": asdict(options), **_record(trainer)}
    if "test" in data:
        record |= _test(trainer, data["test"])
    else:
        record["adapters"] = _activity(trainer, data["validation"])
    return model.eval(), record


def _record(trainer: Trainer) -> dict:
    evaluations = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    best = max(evaluations, key=lambda entry: entry["eval_accuracy"], default=None)
    parameters = list(trainer.model.parameters())
    return {
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters),
        "seconds": next(c for c in trainer.callback_handler.callbacks if isinstance(c, Stopwatch)).seconds,
        "best_epoch": round(best["epoch"]) if best else round(trainer.state.epoch),
        "validation_accuracy": best["eval_accuracy"] if best else None,
        "validation_by_epoch": [entry["eval_accuracy"] for entry in evaluations],
        "sparsity_by_epoch": [entry["eval_sparsity"] for entry in evaluations if "eval_sparsity" in entry],
        "sparsity_by_step": {
            entry["step"]: entry["train_sparsity"] for entry in trainer.state.log_history if "train_sparsity" in entry
        },
    }


def _test(trainer: Trainer, rows: Dataset) -> dict:
    """Accuracy on `rows`, and what the adapters do there: the only time that the test labels are read."""
    correct = _correct(trainer, rows)
    return {
        "test_accuracy": float(correct.mean()),
        "test_correct": "".join(str(int(right)) for right in correct),
        "adapters": _activity(trainer, rows),
    }


def _activity(trainer: Trainer, rows: Dataset) -> dict | None:
    """What the adapters do on `rows`, and the accuracy there without them; None if there are none."""
    batches = DataLoader(rows, trainer.args.eval_batch_size, collate_fn=trainer.data_collator)
    activity = adapter_activity(trainer.model, batches)  # on several devices each reads it all: the counts are the same
    if activity is None:
        return None
    with adapters_off(trainer.model):
        return {**vars(activity), "accuracy_without": float(_correct(trainer, rows).mean())}


def _correct(trainer: Trainer, rows: Dataset) -> np.ndarray:
    predicted = trainer.predict(rows)
    return predicted.predictions.argmax(axis=-1) == predicted.label_ids


@contextmanager
def adapters_off(model: nn.Module):
    """Within it, adapters add nothing; a trained `score` stays, which peft's own `disable_adapter` would take away."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


class PaddingAsText(DataCollatorWithPadding):
    """Batches whose padding the model reads as text, so that an answer depends on the batch: the authors' setting."""

    def __call__(self, features):
        batch = super().__call__(features)
        return batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}


class PairedTrainer(Trainer):
    """Trainer whose order of sentences depends on seed and epoch alone.

    Trainer's own length-grouped order draws from the global generator, which by then differs between methods.
    """

    group_by_length, word_dropout = True, 0.0

    def evaluate(self, *args, **kwargs):
        """As ever; and how silent gates are on what it reads goes into the log history ("eval_sparsity")."""
        if not any(isinstance(module, SpikeGate) for module in self.model.modules()):
            return super().evaluate(*args, **kwargs)
        with observe_adapters(self.model) as seen:
            metrics = super().evaluate(*args, **kwargs)
        self.state.log_history[-1]["eval_sparsity"] = seen.activity().sparsity
        return metrics

    def training_step(self, model, inputs, *args, **kwargs):
        if self.word_dropout:
            mask = inputs["attention_mask"]
            kept = mask * (torch.rand(mask.shape, device=mask.device) >= self.word_dropout)
            some = kept.any(dim=1, keepdim=True)  # a sentence that would lose all its tokens loses none
            inputs["attention_mask"] = torch.where(some, kept, mask)
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        if not self.group_by_length:
            return SeededSampler(len(self.train_dataset), self.args.data_seed)
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        return SeededLengthSampler(self.args.train_batch_size, lengths=lengths, seed=self.args.data_seed)


class SeededLengthSampler(LengthGroupedSampler):
    """Batches of similar length in an order given by (seed, epoch)."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __iter__(self):
        self.generator.manual_seed(1_000_003 * self.seed + self.epoch)
        return super().__iter__()


class SeededSampler(Sampler):
    """All sentences in an order given by (seed, epoch)."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self):
        return self.size

    def __iter__(self):
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())


class Stopwatch(TrainerCallback, ExportableState):
    """Seconds spent in training and validation, over all the stretches of an interrupted run."""

    def __init__(self):
        self.seconds = 0.0
        self._started = None

    def _tick(self, *args, **kwargs):
        now = time.perf_counter()
        self.seconds += now - self._started
        self._started = now

    def on_train_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    on_step_end = on_evaluate = on_train_end = _tick

    def state(self) -> dict:
        return {"args": {}, "attributes": {"seconds": self.seconds}}


class Progress(ProgressCallback):
    """One bar a run with the remaining time, the training loss and the newest validation accuracy; no raw log lines."""

    def __init__(self, description: str = ""):
        super().__init__()
        self.description, self.shown = description, {}

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step = state.global_step
        if self.training_bar is not None:  # only the first process shows a bar
            self.training_bar.set_description(self.description)
            self.training_bar.update(state.global_step)

    def on_prediction_step(self, args, state, control, **kwargs):
        pass  # a bar for a second or two of validation would only flicker

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = {"loss": "loss", "eval_accuracy": "val. accuracy"}
        self.shown |= {names[key]: f"{float(value):.3f}" for key, value in (logs or {}).items() if key in names}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown)


def _training_arguments(directory: Path, seed: int, options: FinetuneOptions) -> TrainingArguments:
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=2 * options.batch_size,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=options.bf16,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        eval_strategy="epoch" if options.keep == "best" else "no",
        save_strategy="epoch",
        save_total_limit=1,  # the best and the last
        load_best_model_at_end=options.keep == "best",
        metric_for_best_model="accuracy",
        logging_steps=10,
        restore_callback_states_from_checkpoint=True,
        report_to="none",
        seed=seed,
        data_seed=seed,
    )


def _accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(axis=-1) == prediction.label_ids))}


def _last_whole_checkpoint(directory: Path) -> str | None:
    """Trainer writes straight into checkpoint-N, its state file last: without a readable one N is half-written."""
    folders = sorted(directory.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]), reverse=True)
    for folder in folders:
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            return str(folder)
        except (OSError, ValueError):
            logger.warning("%s is not a whole checkpoint (the run was stopped while writing it): ignored", folder)
    return None
