"""Full fine-tuning vs LoRA vs SpikeLoRA (and `score` alone) on Subj, or on any text with classes, and spike traces.

    python recipes/subj_finetune.py --data-dir FOLDER_WITH_SUBJ
    python recipes/subj_finetune.py --task reviews.csv

--task takes a name (subj, subj-mini, cola, rte), a .csv, .tsv, .json, .jsonl or .parquet file, a folder with such files
called train, validation (or dev) and test, or a data set of the Hugging Face hub (owner/name, owner/name:config); with
two or more classes, and columns that are found or named. A test split of the data's own is kept; else 20 % of the
sentences are tested and 10 % judge epochs, by a hash of their letters. Two texts, of rte or of several text columns,
are joined by " -- ".

All methods start from the SpikeGPT that comes with the package, or from --model. It leaves in --output-dir:

    report.html  results.md  accuracy.png      the comparison; report.html is one page with everything, for a browser
    results.json  results.csv                  its figures (schema: spikegpt_lora/report/results.py); a row a run
    base/seed0/                                the model that all methods of seed 0 start from, and its tokenizer
    full/seed0/  head/seed0/  scratch/seed0/   fine-tuned models, each with its predictions.tsv of the test sentences
    lora/seed0/  spikelora/seed0/              adapters in peft's format
    traces/spikelora-seed0.npz, .png           spikes of the first test sentences (spikegpt_lora/observe/traces.py)
    teacher/answers.npz                        with --teacher: what it answers to the training sentences

python -m spikegpt_lora.report FOLDER makes the page again; --trace-text TEXT adds the spikes of a sentence of yours.

Ctrl-C and SIGTERM save the step that is being trained (a second one stops at once) and leave what is finished
readable; the same command goes on from there, to the same numbers. One run works in a folder at a time. Adding methods
or seeds to a finished comparison runs only what is new. --tune N runs N trials a method instead, on the first seed and
judged on the validation split (with --folds on folds of train and validation), and leaves trials.md. --intermediate
film trains each method on another task before Subj (is it of a critic or of a plot? Subj's labels are made of that); a
file does so for any task. --teacher adds the answers of an encoder; results.md says so on top. --parity gives adapters
the SpikeLoRA authors' settings: "library", as in their code (20 epochs, padding read as text, another 90/10 split for
each seed, the last epoch tested), or "paper", as far as it says. --config
OUTPUT_DIR/options.json repeats a comparison that was run, with every setting that its results depend on, in a folder of
its own (a task of your own is named again). --report-to tensorboard draws learning curves in OUTPUT_DIR/curves.
"""

import argparse
import contextlib
import os
import shutil
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: see "A busy machine" in README.md

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.integrations import get_available_reporting_integrations

from spikegpt_lora import (
    SpikeGPTConfig,
    SpikeGPTForSequenceClassification,
    embedded_checkpoint,
    load_task,
    load_upstream_checkpoint,
    record_spikes,
)
from spikegpt_lora.checkpoint import UPSTREAM_TOKENIZERS, load_model, load_tokenizer, require_same_tokens
from spikegpt_lora.config import POOLINGS, read_config
from spikegpt_lora.convert import calibrate, spiking
from spikegpt_lora.finetune.experiment import (
    Comparison,
    Plan,
    begin,
    bf16_of,
    counted,
    read_options,
    require_same,
    run_missing,
    run_trials,
    sha256_of_labels,
    sha256_of_text,
    sha256_of_weights,
    take_up,
    write_results,
)
from spikegpt_lora.finetune.intermediate import Source, options_of_source, train_first, without_shared
from spikegpt_lora.finetune.merge import take_runs
from spikegpt_lora.finetune.methods import METHODS, MODELS, resolve_options
from spikegpt_lora.finetune.options import PARITY, FinetuneOptions
from spikegpt_lora.finetune.run import adapt, finetune
from spikegpt_lora.finetune.teacher import Teacher, teach
from spikegpt_lora.ops.backend import use_extension
from spikegpt_lora.pretrain.tokenizer import train_tokenizer
from spikegpt_lora.report.cards import model_card
from spikegpt_lora.report.plots import draw_raster
from spikegpt_lora.report.predictions import write_predictions
from spikegpt_lora.report.results import folder_of, read_runs
from spikegpt_lora.tasks.labelled import load_labelled
from spikegpt_lora.tasks.registry import MAX_LENGTH, TASKS, labels_of, task_name
from spikegpt_lora.tasks.splits import BY_SEED, ONE_SPLIT, folds
from spikegpt_lora.utils import command_line
from spikegpt_lora.utils.files import locked, whole_files, write_json, write_text
from spikegpt_lora.utils.machine import made_by
from spikegpt_lora.utils.precision import name_of, resolve

# What the command line may change, for all methods or for one.
ADJUSTABLE = {
    "learning_rate": (float, "at its highest"),
    "epochs": (int, "the best on validation is kept"),
    "batch_size": (int, "sentences a step and device"),
    "warmup": (float, "share of the steps"),
    "dropout": (float, "after each block"),
    "word_dropout": (float, "share of the tokens that a training step leaves out"),
    "rank": (int, "of adapters; alpha is the same"),
    "v_threshold": (float, "of SpikeLoRA's gate"),
    "time": (str, "of SpikeLoRA's gate: pointwise or token"),
    "gate": (str, "of SpikeLoRA: graded, binary or integer; with integer spikes integer unless it is said"),
    "learn": (str, "of SpikeLoRA's gate: none, threshold, tau or both"),
    "target_sparsity": (float, "of SpikeLoRA's gate, held while training"),
    "spike_penalty": (float, "price of what matrices read, where they read integer spikes"),
}
CALIBRATION, ROW = 16384, 64  # tokens of training sentences that integer spikes are fitted on; tokens a row of them
PROTOCOLS = ["holdout", "cv10", "authors"]
COMPARED = ["full", "lora", "spikelora", "head"]
CONFIGURED = ("task", "model", "tokenizer", "pooling", "parity", "max_length", "max_train_samples", "matrix_spikes")
CONFIGURED += ("spike_levels", "folds", "intermediate", "teacher")  # options that results depend on, with ADJUSTABLE
RANDOM_SIZES = {"n_layer": 2, "n_embd": 128, "vocab_size": 4096}
STOPPED = "stopped. What is finished stands in results.md; the same command goes on from here."


def main() -> int:
    args = parse_arguments()
    command_line.set_up()
    PartialState(cpu=not torch.cuda.is_available())  # one process, or what torchrun started
    task, data = load_data(args)
    out = (args.output_dir or Path("runs") / task).resolve()  # adapters keep the path to their base model
    precision = resolve(args.precision, PartialState().device, bf16_of(out))
    say(str(precision))
    source = source_of(args, task, data)
    plan = plan_of(args, task, data, source, out, precision.bf16)
    if args.config:
        require_same(plan, args.config, read_options(args.config))
    with locked(plan.output_dir) if PartialState().is_main_process else contextlib.nullcontext():
        comparison = prepare(plan, data, source, baselines=not args.tune)
        use_extension("auto", PartialState().device)  # built now: no log line breaks a progress bar
        return tune(comparison, args.tune) if args.tune else run_all(comparison, args.shard, args.merge, args.jobs)


def parse_arguments() -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    add, positive = parser.add_argument, command_line.positive
    named = f"{', '.join(TASKS)}, a file, a folder or a hub id (default: subj, or the built-in subj-mini without it)"
    add("--task", type=command_line.utf8, help=named)
    add("--text-column", nargs="+", metavar="NAME", help="of your own task, if it is not found; of a pair, both")
    add("--label-column", metavar="NAME", help="of your own task, if it is not found")
    add("--data-dir", type=Path, help="folder with Subj, CoLA or RTE; else SPIKEGPT_LORA_DATA, else the hub")
    add("--output-dir", type=Path, help="results go here (default: runs/ and the task's name)")
    add("--config", type=Path, metavar="FILE", help="the options.json of a comparison, which is repeated")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", default=COMPARED, help="which to compare")
    add("--seeds", nargs="+", type=command_line.seed, metavar="SEED", help="one run a method and seed (default: 0)")
    add_either = parser.add_mutually_exclusive_group().add_argument
    words = "cv10: the same as --folds 10; authors: another 90/10 split a seed, as the SpikeLoRA authors have it"
    add_either("--protocol", choices=PROTOCOLS, help=f"holdout: one test split (default); {words}")
    text = "test each sentence once in N folds, whose numbers are the seeds"
    add_either("--folds", type=positive, metavar="N", help=text)
    add("--intermediate", metavar="TASK", help="film, or a file of label, tab and sentence: trained on first")
    add("--intermediate-sentences", type=positive, metavar="N", help="of them, drawn by a fixed seed (default: all)")
    add("--teacher", help="folder or package of an encoder, whose answers are learned from too; or its answers.npz")
    command_line.add_sharing(add)
    add("--trace-sentences", type=positive, default=32, help="test sentences whose spikes are recorded")
    add("--tune", type=positive, metavar="N", help="N trials a method instead, on the validation split")
    add("--report-to", nargs="+", default=[], metavar="NAME", help="tensorboard, or another that transformers knows")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="embedded", help="embedded, random, a folder, an upstream .pth file, or a hub id")
    add("--tokenizer", help="folder or hub id, where the model does not bring its own")
    add("--pooling", choices=POOLINGS, help="what the classifier reads (default: last_mean)")
    add(
        "--matrix-spikes",
        choices=["integer"],
        help="make every matrix read integer spikes: a model that exists is converted",
    )
    add("--spike-levels", type=positive, metavar="K", help="the largest integer spike (default: 3)")
    for name, size in RANDOM_SIZES.items():
        add(f"--{name.replace('_', '-')}", type=positive, help=f"of a random model (default: {size})")
    add = parser.add_argument_group("training", "one VALUE for all methods, or METHOD=VALUE ...").add_argument
    for name, (kind, help) in ADJUSTABLE.items():
        add(f"--{name.replace('_', '-')}", nargs="+", metavar="VALUE", type=per_method(kind), help=help + usual(name))
    add("--parity", choices=list(PARITY), help="the SpikeLoRA authors' settings")
    add(
        "--max-length", type=positive, help=f"tokens a sentence (default: {MAX_LENGTH}; rte: {TASKS['rte'].max_length})"
    )
    add("--max-train-samples", type=positive, help="use only so many training sentences (a quick try)")
    command_line.add_precision(add)
    args = parser.parse_args()
    try:
        args = configured(parser, args)
        settle_protocol(args)
        args.seeds = args.seeds or (list(range(args.folds)) if args.folds else [0])
        require_consistent(args)
        settings_of(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def configured(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """`args` with all that the file of --config says; raises ValueError where the command line says some of it too."""
    args.settings = None
    if args.config is None:
        return args
    if not args.config.is_file():
        raise ValueError(
            f"--config must be the options.json of a comparison's folder, and there is no file {args.config}"
        )
    content = read_options(args.config)
    known = [name for name in CONFIGURED if name != "task" or content["task"] in TASKS]  # one's own is named again
    names = [*known, *RANDOM_SIZES, *ADJUSTABLE, "protocol", "precision"]
    if given := [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) != parser.get_default(name)]:
        raise ValueError(f"--config says what results depend on: leave out {', '.join(given)}, or --config")
    said = [*known, *(RANDOM_SIZES if content["model"] == "random" else ())]
    options = {name: content.get(name) for name in said if name != "pooling" or content["parity"] != "library"}
    options["precision"] = name_of(any(of_method.bf16 for of_method in content["settings"].values()))
    options["protocol"] = "authors" if content.get("by_seed") else None
    args.settings = content["settings"]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    return parser.parse_args(flags, args)  # so that a wrong value is named as one of the command line is


def usual(name: str) -> str:
    """What a setting is for the embedded model if nothing is said, as the help shows it."""
    values = {method: getattr(options, name) for method, options in resolve_options("embedded").items()}
    shown = [str(values["full"])] if len(set(values.values())) == 1 else [f"{m}={v:g}" for m, v in values.items()]
    return f" (default, embedded model: {' '.join(shown)})"


def settle_protocol(args: argparse.Namespace) -> None:
    """Say in `args.folds` and `args.protocol` what --protocol and --parity stand for; ValueError where they differ."""
    if args.protocol == "cv10":
        args.folds = 10
    if args.parity == "library":
        if args.protocol not in (None, "authors"):
            raise ValueError(f"--parity library splits as its authors do: leave --protocol {args.protocol} out")
        args.protocol = "authors"


def require_consistent(args: argparse.Namespace) -> None:
    """Raise ValueError for arguments that exclude each other, and for a program of --report-to that is not here."""
    if unknown := set(args.report_to) - set(known := get_available_reporting_integrations()):
        names = ", ".join(known) or "none: pip install tensorboard"
        raise ValueError(f"--report-to must name what is installed ({names}), got {', '.join(sorted(unknown))}")
    if args.tune and args.parity:
        raise ValueError("--tune searches for settings and --parity fixes them: give one of the two")
    by_seed = args.protocol == "authors"
    if args.teacher and (args.folds or by_seed):
        raise ValueError("--teacher reads the training sentences of the fixed split: no --folds or --protocol authors")
    if args.folds and (by_seed or args.folds < 2):
        raise ValueError("--folds must be 2 or more, and not with --parity library, which splits in its own way")
    if args.tune and by_seed:
        raise ValueError("--tune judges on validation, which --protocol authors has not: leave one of them out")
    if args.intermediate_sentences and not args.intermediate:
        raise ValueError("--intermediate-sentences counts those of --intermediate: give it too")
    if args.tune and (args.intermediate or args.teacher or args.report_to):
        raise ValueError("--tune searches for settings without --intermediate, --teacher and --report-to")
    if args.tune and (args.shard or args.merge or args.jobs > 1):
        raise ValueError("--shard, --merge and --jobs share out a comparison's runs, and --tune has none: leave it out")
    if args.spike_levels and (not args.matrix_spikes or has_spikes(args)):
        raise ValueError("--spike-levels is for --matrix-spikes integer: a model that has integer spikes has its own")
    if args.spike_penalty and not reads_spikes(args):
        raise ValueError("--spike-penalty is a price of integer spikes: give --matrix-spikes integer too")
    if args.parity == "library" and args.pooling:
        raise ValueError("--parity library fixes --pooling (last)")
    if by_seed and args.max_train_samples:
        raise ValueError("--protocol authors, and so --parity library, splits all sentences: no --max-train-samples")
    sizes = [name for name in RANDOM_SIZES if getattr(args, name) is not None]
    if sizes and args.model != "random":
        raise ValueError(f"--{sizes[0].replace('_', '-')} is for --model random; {args.model} has its own")


def settings_of(args: argparse.Namespace, bf16: bool = False) -> dict[str, FinetuneOptions]:
    """Of every method; raises ValueError, before anything is trained, for what an adapter refuses."""
    settings = args.settings or chosen_settings(args, bf16)
    for name, method in METHODS.items():
        if method.adapter is not None:
            method.adapter(settings[name])
    return settings


def chosen_settings(args: argparse.Namespace, bf16: bool) -> dict[str, FinetuneOptions]:
    """What the command line asks for."""
    kind = args.model if args.model in MODELS else "embedded" if is_small(args.model) else "other"
    changes = {name: getattr(args, name) or [] for name in ADJUSTABLE}
    if reads_spikes(args) and not changes["gate"]:
        changes["gate"] = [{"spikelora": "integer"}]  # so that B reads spikes too
    settings = resolve_options(kind, args.parity, bf16, changes, intermediate=args.intermediate is not None)
    if args.folds or args.protocol == "authors":  # there is no validation split to pick an epoch on
        settings = {name: replace(options, keep="last") for name, options in settings.items()}
    return settings


def reads_spikes(args: argparse.Namespace) -> bool:
    """Whether the matrices of what is trained read integer spikes."""
    return args.matrix_spikes == "integer" or has_spikes(args)


def has_spikes(args: argparse.Namespace) -> bool:
    """Whether those of the saved model do already."""
    folder = Path(place_of(args.model))
    return (folder / "config.json").is_file() and read_config(folder).matrix_spikes == "integer"


def place_of(model: str) -> str:
    """Where the weights of --model are."""
    return embedded_checkpoint() if model == "embedded" else model


def source_of(args: argparse.Namespace, task: str, data: DatasetDict) -> Source | None:
    """The sentences of the intermediate task, where one is asked for."""
    if args.intermediate is None:
        return None
    text = load_labelled(args.intermediate, labels_of(data), args.data_dir)
    source = without_shared(Path(args.intermediate).stem, text, data)
    if args.intermediate_sentences:
        source = source.drawn(args.intermediate_sentences)
    say(
        f"{source.name}: {len(source.text):,} sentences, without {source.left_out:,} that share 8 words in a row with "
        f"one of {task}"
    )
    return source


def plan_of(
    args: argparse.Namespace, task: str, data: DatasetDict, source: Source | None, out: Path, bf16: bool
) -> Plan:
    by_seed = args.protocol == "authors"
    protocol = folds(args.folds, with_test=True) if args.folds else BY_SEED if by_seed else ONE_SPLIT
    started = place_of(args.model)
    same = {*CONFIGURED, "trace_sentences", "report_to"} - {"task", "pooling", "max_length"}
    return Plan(
        task=task,
        pooling=args.pooling or ("last" if args.parity == "library" else "last_mean"),
        settings=settings_of(args, bf16),
        model_sha256=sha256_of_weights(Path(started)),
        text_sha256=sha256_of_text(data),
        labels_sha256=None if task in TASKS else sha256_of_labels(data),
        by_seed=True if by_seed and args.parity != "library" else None,
        intermediate_sha256=None if source is None else sha256_of_text(DatasetDict(train=source.text)),
        max_length=args.max_length or (TASKS[task].max_length if task in TASKS else MAX_LENGTH),
        source=started,
        output_dir=out,
        methods=list(dict.fromkeys(args.methods)),
        seeds=list(dict.fromkeys(args.seeds)),
        protocol=protocol,
        **{name: getattr(args, name) or size for name, size in RANDOM_SIZES.items()},
        **{name: getattr(args, name) for name in same},
    )


def is_small(model: str) -> bool:
    """Whether `model` is a folder with a model of the embedded one's kind of size."""
    return (Path(model) / "config.json").is_file() and read_config(model).n_embd <= 512


def say(text: str) -> None:
    if PartialState().is_main_process:
        print(text)


def per_method(kind: type):
    def parse(text: str) -> dict:
        method, _, value = text.rpartition("=")
        if method and method not in METHODS:
            raise argparse.ArgumentTypeError(f"no method {method}; there are {', '.join(METHODS)}")
        return {name: kind(value) for name in ([method] if method else METHODS)}

    parse.__name__ = f"{kind.__name__}, or METHOD={kind.__name__}"  # what argparse calls it in its message
    return parse


def prepare(plan: Plan, data: DatasetDict, source: Source | None, baselines: bool) -> Comparison:
    with PartialState().main_process_first():  # on several devices: one writes, then all read
        if PartialState().is_main_process:
            take_up(plan.output_dir, counted(plan), read_runs(plan.output_dir))
        tokenizer = get_tokenizer(plan, data)
        teacher = get_teacher(plan, data, source)
    comparison = begin(plan, data, tokenizer, baselines, source, teacher)
    sizes = dict(comparison.results["data"])
    cut = sizes.pop("cut_short")
    say(f"{plan.task}: " + ", ".join(f"{split} {size:,}" for split, size in sizes.items()) + " sentences")
    if cut:
        say(f"note: {cut} sentences lose their end, after --max-length {plan.max_length} tokens")
    return comparison


def load_data(args) -> tuple[str, DatasetDict]:
    """The task's name and its sentences, of the training ones as many as are asked for."""
    asked = args.task or ("subj" if args.data_dir is not None or args.text_column or args.label_column else None)
    if asked is not None:
        pooled = args.folds is not None and not args.tune  # which never shows a trial a test sentence
        data = load_task(asked, args.data_dir, args.text_column or (), args.label_column, pooled)
        task = task_name(asked)
    else:
        try:
            task, data = "subj", load_task("subj")
        except FileNotFoundError as error:
            rule = "!" * 100
            say(f"{rule}\n{error}\n\nGoing on with subj-mini: 600 sentences, good for a try, useless as a result.")
            say(rule)
            task, data = "subj-mini", load_task("subj-mini")
    if args.max_train_samples:
        data["train"] = data["train"].select(range(min(args.max_train_samples, len(data["train"]))))
        if len(set(data["train"]["label"])) < 2:
            raise ValueError(f"--max-train-samples must leave two classes or more, got {args.max_train_samples}")
    return task, data


def get_tokenizer(plan: Plan, data: DatasetDict) -> PreTrainedTokenizerBase:
    if plan.model == "random":
        folder = plan.output_dir / "tokenizer"
        if not (folder / "tokenizer_config.json").is_file():
            with whole_files(folder, last="tokenizer_config.json") as temporary:
                train_tokenizer(data["train"]["text"], plan.vocab_size).save_pretrained(temporary)
        return load_tokenizer(folder)
    try:
        tokenizer = load_tokenizer(plan.tokenizer or UPSTREAM_TOKENIZERS.get(plan.source, plan.source))
    except ValueError as error:
        raise ValueError(f"{error}: name its folder or hub id with --tokenizer") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = "<|padding|>" if "<|padding|>" in tokenizer.get_vocab() else tokenizer.eos_token
    return tokenizer


def get_teacher(plan: Plan, data: DatasetDict, source: Source | None) -> Teacher | None:
    if plan.teacher is None:
        return None
    text, classes = None if source is None else source.text, len(labels_of(data))
    return teach(plan.teacher, text, data, plan.output_dir / "teacher", plan.bf16, classes)


def tune(comparison: Comparison, trials: int) -> int:
    if PartialState().num_processes > 1:
        raise ValueError("--tune runs in one process: start it without torchrun")
    plan = comparison.plan
    table = run_trials(comparison, trials, lambda: get_base(comparison, plan.seeds[0]))
    print(f"\n{table}\nWritten to {plan.output_dir / 'trials.md'}.")
    return 0


def run_all(comparison: Comparison, part: tuple[int, int] | None, merge: list[Path], jobs: int) -> int:
    """Train what is missing of all runs, or of one `part` of them, when those of the folders `merge` are taken over;
    `jobs` at a time."""
    if jobs > 1 and PartialState().num_processes > 1:
        raise ValueError("--jobs and torchrun both start processes: give one of the two")
    plan, started = comparison.plan, time.perf_counter()
    runs = [{"method": method, "seed": seed} for seed in plan.seeds for method in plan.methods]
    if PartialState().is_main_process:
        for folder in merge:
            say(f"{folder}: {take_runs(plan.output_dir, folder, counted(plan))} runs taken")
    PartialState().wait_for_everyone()
    first, step = part or (1, 1)
    mine = runs[first - 1 :: step]
    for seed in sorted({run["seed"] for run in mine}) if jobs > 1 else ():
        get_base(comparison, seed)  # now: several processes would write it at once
    train_one, write = partial(train, comparison), partial(write_results, comparison)
    run_missing(plan.output_dir, mine, train_one, write, jobs)
    if PartialState().is_main_process:
        print("\n" + (plan.output_dir / "results.md").read_text(encoding="utf-8"))
        print(f"{(time.perf_counter() - started) / 60:.1f} minutes. Written to {plan.output_dir}:")
        left = "report.html, results.md, results.json, results.csv, accuracy.png; models and adapters by method and"
        print(f"{left} seed; traces/ with a picture each.")
    return 0


def train(comparison: Comparison, run: dict, description: str) -> None:
    """Train one method on one seed, save the model, its card and its spikes; `run.json`, last, says it is finished."""
    plan, tokenizer, method, seed = comparison.plan, comparison.tokenizer, run["method"], run["seed"]
    folder, options = plan.output_dir / folder_of(run), plan.settings[method]
    data, tokens = comparison.data_of(seed)
    model, before = adapt(get_base(comparison, seed), method, options, seed), None
    if comparison.source is not None:
        place, named = folder / "training" / "first", f"{description}, {comparison.source.name}"
        judged, first = tokens.get("validation"), options_of_source(options)
        before = train_first(model, method, comparison.first, judged, tokenizer, place, seed, first, named)
    if plan.report_to:  # transformers' own place for curves is deleted with training/
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(plan.output_dir / "curves" / f"{method}-seed{seed}")
    place = folder / "training"
    model, record = finetune(model, method, tokens, tokenizer, place, seed, options, description, plan.report_to)
    if not PartialState().is_main_process:
        return
    record = {"task": plan.task, "intermediate": before, "made": made_by(PartialState().device), **record}
    record_traces(comparison, model, data["test"], f"{method}-seed{seed}")
    with whole_files(folder, last="run.json") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        probabilities = record.pop("test_probabilities")
        rows, labels = data["test"], labels_of(data)
        write_predictions(temporary / "predictions.tsv", rows["text"], rows["label"], probabilities, labels)
        write_text(temporary / "README.md", model_card(comparison.results, record))
        write_json(temporary / "run.json", record)
    shutil.rmtree(folder / "training")


def get_base(comparison: Comparison, seed: int) -> SpikeGPTForSequenceClassification:
    """The model that every method of this seed starts from, its initial `score` included; made once, then read."""
    folder = comparison.plan.output_dir / "base" / f"seed{seed}"
    with PartialState().main_process_first():  # on several devices: one writes, then all read
        if not (folder / "config.json").is_file():
            make_base(comparison, seed, folder)
    return load_model(SpikeGPTForSequenceClassification, folder)


def make_base(comparison: Comparison, seed: int, folder: Path) -> None:
    plan, source, tokenizer = comparison.plan, comparison.plan.source, comparison.tokenizer
    set_seed(seed)
    labels = labels_of(comparison.data)
    changes = {"pooling": plan.pooling, "id2label": dict(enumerate(labels))}
    changes |= {"label2id": {name: i for i, name in enumerate(labels)}}
    changes |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if plan.model == "random":
        sizes = {"vocab_size": len(tokenizer), "n_embd": plan.n_embd, "n_layer": plan.n_layer}
        if plan.matrix_spikes == "integer":
            changes |= {"matrix_spikes": "integer", "token_shift": "rows", "spike_levels": plan.spike_levels or 3}
        model = SpikeGPTForSequenceClassification(SpikeGPTConfig(**sizes, **changes))
    elif Path(source).is_dir():
        model = load_model(SpikeGPTForSequenceClassification, source, new_head=True, **changes)
    else:
        lm = load_upstream_checkpoint(source)
        model = SpikeGPTForSequenceClassification.from_language_model(lm, **changes)
    require_same_tokens(tokenizer, model.config, source)
    if plan.matrix_spikes == "integer" and model.config.matrix_spikes == "none":
        model = with_spikes(model, comparison)
    for method in plan.methods:
        METHODS[method].require(model.config, plan.settings[method])
    with whole_files(folder, last="config.json") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def with_spikes(model: SpikeGPTForSequenceClassification, comparison: Comparison) -> SpikeGPTForSequenceClassification:
    """`model` converted, its neurons' scales fitted on training sentences."""
    tokens = [token for ids in comparison.tokens["train"]["input_ids"] for token in ids][:CALIBRATION]
    ids = torch.tensor(tokens[: len(tokens) // ROW * ROW]).view(-1, ROW)
    return calibrate.calibrate(spiking.prepare(model, comparison.plan.spike_levels or 3, tokens=ids), ids)


def record_traces(comparison: Comparison, model, test: Dataset, name: str) -> None:
    plan, tokenizer, folder = comparison.plan, comparison.tokenizer, comparison.plan.output_dir / "traces"
    rows, title = test[: plan.trace_sentences], f"{plan.task}: {name}"
    batch = tokenizer(rows["text"], padding=True, truncation=True, max_length=plan.max_length, return_tensors="pt")
    batch["labels"] = rows["label"]
    trace = record_spikes(model, batch, tokenizer, note=f"{title}, first test sentences")
    folder.mkdir(exist_ok=True)
    trace.save(folder / f"{name}.npz")
    label = labels_of(comparison.data)[trace.labels[0]]
    draw_raster(trace, folder / f"{name}.png", title=f"{title}, first test sentence ({label})")


if __name__ == "__main__":
    sys.exit(command_line.run(main, STOPPED))
