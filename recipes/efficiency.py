"""Cheaper steps of LoRA fine-tuning against simply fewer steps: accuracy against time, on Subj or on plain text.

    python recipes/efficiency.py --data-dir FOLDER_WITH_SUBJ
    python recipes/efficiency.py --text FILE_WITH_A_DOCUMENT_A_LINE

Every way (SparseLoRA's channels, SLoRA's gate, dropped backwards, a cached trunk, their controls) is trained with every
seed; then, for each way, the dense step for as many steps as its time allows, its schedule fully decayed. Ways of one
seed start from the same values and read the same order. Time is the processor's, of all steps and of what is chosen or
computed before them. The same command goes on. It leaves in --output-dir:

    results.md  results.json  frontier.png      the comparison: schema, task, model, complete, precision, options,
                                                versions, runs
    svd/seed0/run.json                          one of its runs: method, seed, seconds (of the processor), steps,
                                                updates, loss (validation, nats), before (of plain text, the same
                                                before training), accuracy, test_correct (of sentences, test split)
"""

import argparse
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: see "A busy machine" in README.md

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from peft import get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from spikegpt_lora import SpikeGPTForCausalLM, SpikeGPTForSequenceClassification, embedded_checkpoint, load_task
from spikegpt_lora.checkpoint import load_model, load_tokenizer
from spikegpt_lora.finetune.efficient import CachedTrunk, CountsCollator, SkipBatches, cached_trunk
from spikegpt_lora.finetune.efficient.measure import Novelties, choices, spearman
from spikegpt_lora.finetune.efficient.ways import WAYS, Way, short, way
from spikegpt_lora.finetune.experiment import (
    aside,
    bf16_of,
    counted,
    header,
    run_missing,
    sha256_of_text,
    sha256_of_weights,
    take_up,
)
from spikegpt_lora.finetune.methods import METHODS, resolve_options
from spikegpt_lora.finetune.options import FinetuneOptions
from spikegpt_lora.finetune.run import require_trained, tokenize
from spikegpt_lora.finetune.trainer import PairedTrainer, Progress, training_arguments
from spikegpt_lora.ops.backend import use_extension
from spikegpt_lora.ops.dropout import set_dropout
from spikegpt_lora.pretrain.corpus import read_documents
from spikegpt_lora.report.markdown import intervals, table
from spikegpt_lora.report.paired import paired_difference
from spikegpt_lora.report.plots import draw_frontier
from spikegpt_lora.report.results import folder_of, read_runs
from spikegpt_lora.tasks.registry import TASKS
from spikegpt_lora.utils import command_line
from spikegpt_lora.utils.files import locked, write_json, write_text
from spikegpt_lora.utils.precision import resolve

SCHEMA = "spikegpt_lora/efficiency/1"
RUN_KEYS = ("method", "seed", "seconds", "steps", "updates", "loss", "before")
PIECE = 128  # tokens of plain text that are read at a time
VALIDATION, LEAST = 200, 32  # pieces to validate on; to train on at least
SKIPPED, CORRELATED = 20, 10  # batches: the first ones of an epoch, whose novelty is that of an empty sketch; the rest
STOPPED = "stopped; the same command goes on from the runs that are finished."


@dataclass(frozen=True)
class Plan:
    """What is run; results depend on all fields but those that stand aside."""

    task: str
    model: str
    adapter: str
    epochs: int
    max_train_samples: int | None
    bf16: bool
    model_sha256: str | None
    text_sha256: str
    options: FinetuneOptions
    source: str = aside()
    output_dir: Path = aside()
    ways: list[str] = aside()
    seeds: list[int] = aside()


@dataclass(frozen=True)
class Task:
    """What a plan trains on. tokens: train, validation, and of sentences test."""

    tokens: DatasetDict
    tokenizer: PreTrainedTokenizerBase
    labels: list[str] | None  # None: a language model


def main() -> int:
    args = parse_arguments()
    command_line.set_up()
    PartialState(cpu=not torch.cuda.is_available())
    source = embedded_checkpoint() if args.model == "embedded" else args.model
    tokenizer = load_tokenizer(source)
    task, text = sentences(args, tokenizer) if args.text is None else plain_text(args, tokenizer)
    precision = resolve(args.precision, PartialState().device, bf16_of(args.output_dir))
    print(precision)
    options = resolve_options("embedded", bf16=precision.bf16)[args.adapter]
    plan = Plan(
        task=args.task if args.text is None else Path(args.text).name,
        bf16=precision.bf16,
        model_sha256=sha256_of_weights(Path(source)),
        text_sha256=text,
        options=options,
        source=str(source),
        ways=list(dict.fromkeys(["dense", *args.ways])),
        **{name: getattr(args, name) for name in ("model", "adapter", "epochs", "max_train_samples", "seeds")},
        output_dir=args.output_dir,
    )
    print(", ".join(f"{name} {len(rows):,}" for name, rows in task.tokens.items()))
    with locked(plan.output_dir):
        if args.checks:
            return write_checks(plan, task)
        take_up(plan.output_dir, counted(plan), finished(plan))
        use_extension("auto", PartialState().device)  # built now: no log line breaks a progress bar
        one, write = partial(train, plan, task), partial(write_results, plan)
        run_missing(plan.output_dir, runs_of(plan, plan.ways), one, write)
        rivals = sorted({short(row["time"]) for row in summary(finished(plan)) if row["method"] in plan.ways[1:]})
        run_missing(plan.output_dir, runs_of(plan, list(dict.fromkeys([*plan.ways, *rivals]))), one, write)
    print("\n" + (plan.output_dir / "results.md").read_text(encoding="utf-8"))
    print(f"{len(finished(plan))} runs. Written to {plan.output_dir}.")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    add = parser.add_argument
    add("--task", choices=TASKS, default="subj", help="which sentences are told apart (default: subj)")
    add("--data-dir", type=Path, help="folder with Subj; else SPIKEGPT_LORA_DATA, else the hub")
    add("--text", help="a file (a document a line; .xz too), a folder, or a hub dataset: the language model's task")
    add("--model", default="embedded", help="embedded, or a folder")
    adapters = [name for name, method in METHODS.items() if method.adapter is not None]
    add("--adapter", choices=adapters, default="lora", help="which one is trained")
    add("--ways", nargs="+", choices=WAYS, metavar="WAY", default=list(WAYS), help="of " + " ".join(WAYS))
    add("--seeds", nargs="+", type=command_line.seed, default=[0, 1, 2, 3, 4], help="one run a way and seed")
    add("--epochs", type=command_line.positive, default=4, help="of the dense way")
    add("--checks", action="store_true", help="measure instead what choosing is worth: checks.md")
    add("--max-train-samples", type=command_line.positive, help="sentences, or pieces of 128 tokens, that are read")
    command_line.add_precision(add)
    add("--output-dir", type=Path, default=Path("runs/efficiency"), help="results go here")
    return parser.parse_args()


def sentences(args, tokenizer: PreTrainedTokenizerBase) -> tuple[Task, str]:
    """The sentences of a task, and the hash of their text."""
    data = load_task(args.task, args.data_dir)
    if args.max_train_samples:
        data["train"] = data["train"].select(range(min(args.max_train_samples, len(data["train"]))))
    return Task(tokenize(data, tokenizer, PIECE)[0], tokenizer, data["train"].features["label"].names), sha256_of_text(
        data
    )


def plain_text(args, tokenizer: PreTrainedTokenizerBase) -> tuple[Task, str]:
    """Pieces of PIECE tokens: the first ones for validation, the next for training; and the hash of their text."""
    wanted = (args.max_train_samples or 2000) + VALIDATION
    ids: list[int] = []
    texts = []
    for document in read_documents(args.text):
        texts.append(document)
        ids += [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= wanted * PIECE:
            break
    pieces = [ids[start : start + PIECE] for start in range(0, len(ids) - PIECE + 1, PIECE)][:wanted]
    least = VALIDATION + LEAST
    if len(pieces) < least:
        raise ValueError(f"--text must hold {least * PIECE:,} tokens or more, {args.text} has {len(ids):,}")
    rows = [{"input_ids": piece, "labels": piece} for piece in pieces]
    parts = {"train": rows[VALIDATION:], "validation": rows[:VALIDATION]}
    tokens = DatasetDict({name: Dataset.from_list(part) for name, part in parts.items()})
    return Task(tokens, tokenizer, None), sha256_of_text(DatasetDict(train=Dataset.from_dict({"text": texts})))


def runs_of(plan: Plan, names: list[str]) -> list[dict]:
    return [{"method": name, "seed": seed} for seed in plan.seeds for name in names]


def train(plan: Plan, task: Task, run: dict, description: str) -> None:
    """Train and measure one way with one seed; its record is run.json."""
    chosen, seed, folder = way(run["method"]), run["seed"], plan.output_dir / folder_of(run)
    set_seed(seed)
    model = adapted(plan, task, chosen)
    set_dropout(model.get_base_model(), plan.options.dropout)
    steps = plan.epochs * -(-len(task.tokens["train"]) // plan.options.batch_size)
    steps = max(1, round(chosen.steps * steps))
    clock = Clock()
    with clock.counting():
        data, changes = task.tokens["train"], [] if chosen.change is None else [chosen.change()]
        if chosen.cached:
            data, changes = cached_trunk(model, data, half(model)), [CachedTrunk(half(model))]
    trainer = trainer_of(plan, task, model, data, [clock, *changes], folder, seed, steps, description)
    before = trainer.evaluate()["eval_loss"] if task.labels is None else None
    trainer.train()
    require_trained(trainer.model)  # a table of what diverged would show an accuracy
    gate = next((change for change in changes if isinstance(change, SkipBatches)), None)
    record = run | {
        "title": chosen.title,
        "seconds": clock.seconds,
        "steps": steps,
        "updates": steps if gate is None else gate.accepted,
        "loss": trainer.evaluate()["eval_loss"],
        "before": before,
    }
    if "test" in task.tokens:
        predicted = trainer.predict(task.tokens["test"])
        right = predicted.predictions.argmax(axis=-1) == predicted.label_ids
        record |= {"accuracy": float(right.mean()), "test_correct": "".join(str(int(one)) for one in right)}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", record)


def trainer_of(plan: Plan, task: Task, model, data, callbacks, folder: Path, seed: int, steps: int, description: str):
    """A Trainer of so many steps, which saves nothing and shows one bar."""
    arguments = training_arguments(folder / "training", seed, plan.options)
    arguments.save_strategy = arguments.eval_strategy = "no"
    arguments.load_best_model_at_end, arguments.max_steps = False, steps
    trainer = PairedTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=task.tokens["validation"],
        processing_class=task.tokenizer,
        data_collator=CountsCollator(task.tokenizer),
        callbacks=callbacks,
    )
    for name in ("group_by_length", "word_dropout"):
        setattr(trainer, name, getattr(plan.options, name))
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Progress(description))
    return trainer


def write_checks(plan: Plan, task: Task) -> int:
    """checks.md: how near each choice of channels comes to the best, before training, and in the first epoch whether
    novelty of the head's gradient is that of the adapters' (of sentences)."""
    seed, batch = plan.seeds[0], plan.options.batch_size
    least = (SKIPPED + CORRELATED) * batch
    if task.labels is not None and len(task.tokens["train"]) < least:
        raise ValueError(
            f"--checks needs {least:,} training sentences or more, so that {CORRELATED} batches are left to correlate; "
            f"there are {len(task.tokens['train']):,}"
        )
    set_seed(seed)
    model, collate = adapted(plan, task, way("dense")), CountsCollator(task.tokenizer)
    parts = {}
    for name, number in (("train", 10), ("validation", 12)):
        loader = DataLoader(task.tokens[name], batch, collate_fn=collate)
        parts[name] = [dict(one) for one in islice(loader, number)]
    lines = []
    for keep in (0.5, 0.25, 0.1):
        for name, row in choices(model, parts["validation"], parts["train"], keep).items():
            lines.append([name, f"{100 * keep:.0f}", *(f"{row[key]:.3f}" for key in ("overlap", "energy", "error"))])
    text = table(["chosen by", "kept %", "of the best", "squares of h kept", "error of the output"], lines)
    if task.labels is not None:
        text += f"\n\n{proxy(plan, task, model)}"
    write_text(plan.output_dir / "checks.md", text + "\n")
    print(f"\n{text}\n\nWritten to {plan.output_dir / 'checks.md'}.")
    return 0


def proxy(plan: Plan, task: Task, model: nn.Module) -> str:
    """Rank correlations over the first epoch's batches, all of which are accepted."""
    gate = SkipBatches(1.0, directions=16, decay=1.0)
    seen = Novelties(gate)
    data, seed = task.tokens["train"], plan.seeds[0]
    steps = -(-len(data) // plan.options.batch_size)
    named = "head's and adapters' gradients"
    trainer = trainer_of(plan, task, model, data, [gate, seen], plan.output_dir, seed, steps, named)
    trainer.train()
    pairs = {
        "novelty of the head's gradient and of the adapters'": ("head", "true"),
        "norm of the head's gradient and of the adapters'": ("norm", "true_norm"),
        "novelty and norm of the head's gradient": ("head", "norm"),
    }
    found = {title: spearman(seen.rows, *names, SKIPPED) for title, names in pairs.items()}
    rows = [[title, f"{value:+.2f}", f"{low:+.2f} … {high:+.2f}"] for title, (value, low, high) in found.items()]
    return table([f"Spearman, {len(seen.rows) - SKIPPED} batches", "", "95 %"], rows)


def adapted(plan: Plan, task: Task, chosen: Way) -> nn.Module:
    if task.labels is None:
        model = load_model(SpikeGPTForCausalLM, plan.source)
    else:
        names = dict(enumerate(task.labels))
        changes = {"pooling": "last_mean", "id2label": names, "label2id": {name: i for i, name in names.items()}}
        model = load_model(SpikeGPTForSequenceClassification, plan.source, new_head=True, **changes)
    places = {"task_type": "CAUSAL_LM"} if task.labels is None else {}
    if chosen.upper:
        above = "|".join(map(str, range(half(model), model.config.n_layer)))
        places["target_modules"] = rf".*blocks\.({above})\.(att|ffn)\.(receptance|key|value)"
    return get_peft_model(model, METHODS[plan.adapter].adapter(plan.options, **places))


def half(model: nn.Module) -> int:
    return model.config.n_layer // 2


class Clock(TrainerCallback):
    """Seconds of the processor, all threads together: of a training, and within `counting()`."""

    def __init__(self):
        self.seconds = 0.0

    @contextmanager
    def counting(self):
        began = time.process_time()
        yield
        self.seconds += time.process_time() - began

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.process_time()

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds += time.process_time() - self.began


def finished(plan: Plan) -> list[dict]:
    order = [*WAYS]
    runs = read_runs(plan.output_dir, keys=RUN_KEYS)
    place = {name: order.index(name) if name in WAYS else len(order) for name in {run["method"] for run in runs}}
    return sorted(runs, key=lambda run: (place[run["method"]], run["method"], run["seed"]))


def summary(runs: list[dict]) -> list[dict]:
    """Of each way: time as a share of the dense way's (median of the seeds' ratios), steps, updates, loss, accuracy."""
    by_way: dict[str, dict[int, dict]] = {}
    for run in runs:
        by_way.setdefault(run["method"], {})[run["seed"]] = run
    dense, rows = by_way.get("dense", {}), []
    for name, of_seed in by_way.items():
        ratios = [run["seconds"] / dense[seed]["seconds"] for seed, run in of_seed.items() if seed in dense]
        if not ratios:
            continue
        rows.append(
            {
                "method": name,
                "title": way(name).title,
                "time": float(np.median(ratios)),
                "runs": of_seed,
                **{key: mean_of(of_seed, key) for key in ("updates", "loss", "accuracy")},
            }
        )
    return rows


def mean_of(runs: dict[int, dict], key: str) -> float | None:
    values = [run[key] for run in runs.values() if key in run]
    return float(np.mean(values)) if values else None


def write_results(plan: Plan, complete: bool) -> None:
    runs = finished(plan)
    if not (rows := summary(runs)):
        return
    trained = {row["method"] for row in rows}
    complete = complete and all(short(row["time"]) in trained for row in rows if row["method"] in WAYS)
    results = header(SCHEMA, plan.task, plan.model, plan.bf16, counted(plan)) | {"complete": complete, "runs": runs}
    write_json(plan.output_dir / "results.json", results)
    seeds = ", ".join(map(str, sorted({run["seed"] for run in runs})))
    measured = f"{plan.adapter} on {plan.task}, seeds {seeds}, trained and measured in {results['precision']}."
    unit = "points of test accuracy" if rows[0]["accuracy"] is not None else "validation loss in nats"
    legend = (
        f"Time: of the processor, the dense way's is 1 (median over seeds). Differences: paired, {unit}, with a 95 % "
        "interval over seeds and sentences, or from the least to the largest of a seed; short: the dense step for as "
        "many steps as the way's time allows."
    )
    write_text(plan.output_dir / "results.md", f"{frontier(rows)}\n\n{legend} {measured}\n")
    draw_frontier(rows, plan.output_dir / "frontier.png", f"{plan.adapter} on {plan.task}")


def frontier(rows: list[dict]) -> str:
    by_name = {row["method"]: row for row in rows}
    lines = []
    for row in rows:
        rival = by_name.get(short(row["time"])) if row["method"] in WAYS and row["method"] != "dense" else None
        dense = None if row["method"] == "dense" else by_name["dense"]
        accuracy = "–" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f}"
        cells = [f"{row['time']:.2f}", f"{row['updates']:.0f}", f"{row['loss']:.4f}", accuracy]
        lines.append([row["title"], *cells, difference(row, dense), difference(row, rival)])
    names = ["way", "time", "updates", "validation loss", "test accuracy %", "minus dense", "minus short"]
    return table(names, lines)


def difference(row: dict, other: dict | None) -> str:
    """Of two ways, over the seeds that both have."""
    seeds = sorted(row["runs"].keys() & other["runs"].keys()) if other else []
    if not seeds:
        return "–"
    if row["accuracy"] is None:
        by_seed = [row["runs"][seed]["loss"] - other["runs"][seed]["loss"] for seed in seeds]
        return f"{np.mean(by_seed):+.4f} ({min(by_seed):+.4f} … {max(by_seed):+.4f})"
    correct = [[list(map(int, one["runs"][seed]["test_correct"])) for seed in seeds] for one in (row, other)]
    found = paired_difference(*correct)
    return f"{100 * found.difference:+.2f} ({intervals(found)})"


if __name__ == "__main__":
    sys.exit(command_line.run(main, STOPPED))
