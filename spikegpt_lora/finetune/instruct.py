"""Instruction tuning on trl's SFTTrainer: how it is stopped, resumed, shown and measured as other fine-tuning here is.

trl is no requirement of the package (extra "instruct"), so it is imported where it is used.
"""

import json
import math
import shutil
import warnings
from pathlib import Path

from datasets import DatasetDict
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..adapters.gate import gates_of
from ..observe.adapters import observe_adapters
from ..utils.errors import read_json, writing
from ..utils.files import write_json
from ..utils.stopping import deferred
from .experiment import differences
from .run import require_trained
from .trainer import Finite, Progress, Resumption, Stopwatch, last_whole_checkpoint


def begun(folder: Path) -> dict | None:
    """The options of the run in `folder`, finished or with a checkpoint to go on from; None where there is none."""
    held = [*folder.glob("run.json"), *folder.glob("training/checkpoint-*")]
    return read_json(folder / "options.json") if held and (folder / "options.json").is_file() else None


def bf16_of(folder: Path) -> bool | None:
    before = begun(folder)
    return None if before is None else bool(before.get("bf16"))


def take_up(folder: Path, options: dict) -> dict:
    """Make `folder` that of a run with `options`, which it returns; ValueError where it holds one with others."""
    now, before = json.loads(json.dumps(options)), begun(folder)
    if before and (changes := differences(before, now)):
        raise ValueError(f"{folder} holds a run of other settings ({changes}): give another --output-dir, or delete it")
    write_json(folder / "options.json", now)
    return now


def instruction_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
    adapter: PeftConfig,
    description: str = "",
    **settings,
) -> Trainer:
    """trl's trainer of `adapter` on `model`; its loss falls on completions where rows have them.

    Args:
        tokenizer: with a chat template, where rows are conversations.
        data: from `tasks.instructions`. The trainer's own `train_dataset` and `eval_dataset` hold it as tokens, cut to
            `max_length`, without the rows whose completion is cut off whole.
        description: the progress bar's text.
        settings: of `trl.SFTConfig`; what must be so to be resumed is set here.
    """
    from trl import SFTConfig, SFTTrainer

    with warnings.catch_warnings():  # its own default has a name that transformers has renamed
        warnings.filterwarnings("ignore", message=".gradient_checkpointing. is deprecated", category=FutureWarning)
        arguments = SFTConfig(
            eval_strategy="steps" if "validation" in data else "no",
            save_strategy="steps",
            save_total_limit=2,
            logging_nan_inf_filter=False,
            restore_callback_states_from_checkpoint=True,
            report_to="none",
            **settings,
        )
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=[Stopwatch(), Finite()],
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Progress(description, judged="eval_loss"))
    return trainer


def train(trainer: Trainer) -> None:
    """Train from the last whole checkpoint in the trainer's folder, or from the beginning, to the end.

    A first Ctrl-C or SIGTERM is obeyed after the step, which is saved; a second one at once.

    Raises:
        FloatingPointError: loss, gradient or weights are not finite; the folder is then removed.
        KeyboardInterrupt, errors.Stopped: Ctrl-C, SIGTERM.
    """
    folder = Path(trainer.args.output_dir)
    try:
        with writing(folder), deferred() as stop:
            trainer.add_callback(Resumption(stop))
            trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
        require_trained(trainer.model)
    except FloatingPointError as error:
        shutil.rmtree(folder, ignore_errors=True)  # whoever went on from there would come here again
        rate = trainer.args.learning_rate
        raise FloatingPointError(f"it diverged: {error}. Nothing of it is kept: give a rate below {rate:g}") from error


def validation(trainer: Trainer) -> dict[str, float | None]:
    """Loss on the validation rows, nats a token (the mean over rows of their batch's mean), its perplexity, and the
    share of silent gate outputs, None without gates; nothing where there are no such rows."""
    if trainer.eval_dataset is None:
        return {}
    loss, sparsity = trainer.evaluate()["eval_loss"], None
    if any(gates_of(trainer.model)):
        with observe_adapters(trainer.model) as seen:  # apart: in bfloat16 a layer that is looked at rounds otherwise
            trainer.evaluate()
        sparsity = seen.activity().sparsity
    return {"validation_loss": loss, "validation_perplexity": math.exp(loss), "sparsity": sparsity}
