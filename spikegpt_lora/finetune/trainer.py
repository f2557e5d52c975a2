"""transformers' Trainer for fine-tuning: paired data order, resumable after any step, an error at the first NaN.

A run may be stopped after any step and goes on to the same numbers: checkpoints hold every random generator, and the
order of sentences is a function of seed and epoch.
"""

import logging
import math
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import reduce
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from tqdm import tqdm
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, ProgressCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..adapters.gate import gates_of
from ..observe.adapters import observe_adapters
from ..utils.errors import DamagedFile, read_json
from ..utils.saved import safetensors_shapes
from ..utils.stopping import Request
from .options import FinetuneOptions
from .spike_penalty import seeing_reads

logger = logging.getLogger(__name__)

ANSWERS = "answers"  # a column: what a teacher gives to each class, see teacher.py


class PaddingAsText(DataCollatorWithPadding):
    """Batches whose padding the model reads as text, so that an answer depends on the batch: the authors' setting."""

    def __call__(self, features):
        batch = super().__call__(features)
        return batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}


class PairedTrainer(Trainer):
    """Trainer whose order of sentences depends on seed and epoch alone, and which stops where it diverges.

    Trainer's own length-grouped order draws from the global generator, which by then differs between methods. Trainer's
    own way with a loss of NaN is to leave it out of the log.
    """

    group_by_length, word_dropout, spike_penalty, teacher_share, temperature = True, 0.0, 0.0, 0.0, 1.0

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Of labels; where a batch has a teacher's answers, of both in their shares; and the price of what is read."""
        answers = inputs.pop(ANSWERS, None)
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with seeing_reads(model, inputs["attention_mask"]) if self.spike_penalty else nullcontext() as reads:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if answers is not None:
            T, least = self.temperature, torch.finfo(torch.half).tiny  # as they are kept
            wanted = (answers.clamp(min=least).log() / T).softmax(dim=-1)
            taught = T * T * nn.functional.cross_entropy(outputs.logits.float() / T, wanted)
            loss = (1 - self.teacher_share) * loss + self.teacher_share * taught
        return loss + self.spike_penalty * reads.share() if self.spike_penalty else loss

    def evaluate(self, *args, **kwargs):
        """Also logs eval_sparsity, the share of silent gate outputs."""
        if not any(gates_of(self.model)):
            return super().evaluate(*args, **kwargs)
        with observe_adapters(self.model, contributions=False) as seen:
            metrics = super().evaluate(*args, **kwargs)
        self.state.log_history[-1]["eval_sparsity"] = seen.activity().sparsity
        return metrics

    def training_step(self, model, inputs, *args, **kwargs):
        if self.word_dropout:
            mask = inputs["attention_mask"]
            kept = mask * (torch.rand(mask.shape, device=mask.device) >= self.word_dropout)
            some = kept.any(dim=1, keepdim=True)  # a sentence that would lose all its tokens loses none
            inputs["attention_mask"] = torch.where(some, kept, mask)
        loss = super().training_step(model, inputs, *args, **kwargs)
        value = float(loss)
        _require_finite("loss", value, self.state.global_step + 1)
        for losses in (one for one in self.callback_handler.callbacks if isinstance(one, Losses)):
            losses.by_step.append(value if self.args.world_size == 1 else float(reduce(loss, "mean")))
        return loss

    def log(self, logs, *args, **kwargs):
        _require_finite("gradient's norm", logs.get("grad_norm", 0.0), self.state.global_step)
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        if not self.group_by_length:
            return SeededSampler(len(self.train_dataset), self.args.data_seed)
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        together = self.args.train_batch_size * self.args.world_size  # sentences of one step
        return SeededLengthSampler(together, lengths=lengths, seed=self.args.data_seed)


def longest_first(rows: Dataset) -> np.ndarray:
    """The order of tokenized `rows` in which batches have the least padding."""
    return np.argsort([-len(ids) for ids in rows["input_ids"]], kind="stable")


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


class Losses(TrainerCallback, ExportableState):
    """The training loss of every step, over all the stretches of an interrupted run; of all devices, their mean."""

    def __init__(self):
        self.by_step: list[float] = []

    def state(self) -> dict:
        return {"args": {}, "attributes": {"by_step": self.by_step}}


class Finite(TrainerCallback):
    """Ends where what is logged is not finite; for trainers that do not look at each step as `PairedTrainer` does."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "grad_norm", "eval_loss"):
            _require_finite(name, float((logs or {}).get(name, 0.0)), state.global_step)


class Resumption(TrainerCallback):
    """Saves after the step in which a stop was asked for, and ends there; tells whoever goes on where things are."""

    def __init__(self, stop: Request):
        self.stop = stop

    def on_train_begin(self, args, state, control, **kwargs):
        if state.best_global_step:  # the folder may have been moved since
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{state.best_global_step}")

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        # accelerate does not reach our sampler behind skipped batches on several devices
        sampler = train_dataloader.batch_sampler
        while not hasattr(sampler, "set_epoch"):
            sampler = getattr(sampler, "batch_sampler", None) or sampler.sampler
        sampler.set_epoch(int(state.epoch))

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:  # all processes save together
            asked = torch.tensor(float(self.stop.asked is not None), device=args.device)
            if reduce(asked) > 0 and self.stop.asked is None:
                self.stop.asked = KeyboardInterrupt()
        if self.stop.asked is not None and state.epoch % 1:  # an epoch's end is saved anyway, after its validation
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self.stop.asked is not None:
            raise self.stop.asked


class Progress(ProgressCallback):
    """One bar a run with the remaining time, the training loss and the newest of what is `judged` in validation; no raw
    log lines. Where stderr is no terminal, one line when it begins and one when it ends."""

    def __init__(self, description: str = "", judged: str = "eval_accuracy"):
        super().__init__()
        self.description, self.judged, self.shown = description, judged, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = state.global_step
        if state.is_world_process_zero:  # only the first process shows a bar
            sizes = {"total": state.max_steps, "initial": state.global_step, "dynamic_ncols": True, "disable": None}
            self.training_bar = tqdm(desc=self.description, **sizes)
            self._line(f"begins at step {state.global_step:,} of {state.max_steps:,}")

    def on_prediction_step(self, args, state, control, **kwargs):
        pass  # a bar for a second or two of validation would only flicker

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = {"loss": "loss", self.judged: f"val. {self.judged.removeprefix('eval_')}"}
        self.shown |= {names[key]: f"{float(value):.3f}" for key, value in (logs or {}).items() if key in names}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            self._line(", ".join([f"{state.global_step:,} steps", *(f"{k} {v}" for k, v in self.shown.items())]))
        super().on_train_end(args, state, control, **kwargs)

    def _line(self, text: str):
        if self.training_bar.disable:
            print(f"{self.description}: {text}", file=sys.stderr)


def training_arguments(
    directory: Path, seed: int, options: FinetuneOptions, report_to: Sequence[str] = ()
) -> TrainingArguments:
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
        remove_unused_columns=False,  # the data have what is read, and ANSWERS
        eval_strategy="epoch" if options.keep == "best" else "no",
        save_strategy="epoch",
        save_total_limit=2,  # the best and the last; with 1, Trainer deletes the last one before the run is tested
        load_best_model_at_end=options.keep == "best",
        metric_for_best_model="accuracy",
        logging_steps=10,
        logging_nan_inf_filter=False,
        restore_callback_states_from_checkpoint=True,
        report_to=list(report_to),
        seed=seed,
        data_seed=seed,
    )


def _require_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(f"the {name} was {value} at step {step}")


def last_whole_checkpoint(directory: Path) -> str | None:
    """The newest one; what was being written when its process was killed, newer than that, is deleted."""
    folders = sorted(directory.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]), reverse=True)
    for folder in folders:
        try:
            _require_whole(folder)
            return str(folder)
        except (OSError, DamagedFile) as error:
            logger.warning("%s is not a whole checkpoint (%s): deleted", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
    return None


def _require_whole(folder: Path) -> None:
    """Raise where `folder` is not a whole checkpoint; Trainer writes straight into it, the state file last."""
    read_json(folder / "trainer_state.json", keys=("global_step", "log_history"))
    for name in ("optimizer.pt", "scheduler.pt"):
        (folder / name).stat()
    weights = list(folder.glob("*.safetensors"))
    for file in weights:
        safetensors_shapes(file)
    if not weights:
        raise DamagedFile(f"{folder} holds no weights")
