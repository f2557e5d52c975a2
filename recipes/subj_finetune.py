"""Full fine-tuning vs LoRA vs SpikeLoRA (and `score` alone) on Subj, and the spike traces of the result.

    python recipes/subj_finetune.py --data-dir FOLDER_WITH_SUBJ

All methods start from the SpikeGPT that comes with the package, or from --model. It leaves in --output-dir:

    results.md  results.json  accuracy.png     the comparison (results.json's schema: spikegpt_lora/report/results.py)
    base/seed0/                                the model that all methods of seed 0 start from, and its tokenizer
    full/seed0/  head/seed0/  scratch/seed0/   fine-tuned models
    lora/seed0/  spikelora/seed0/              adapters in peft's format
    traces/spikelora-seed0.npz, .png           spikes of the first test sentences (spikegpt_lora/observe/traces.py)

Ctrl-C and SIGTERM save the step that is being trained (a second one stops at once) and leave what is finished
readable; the same command goes on from there, to the same numbers. One run works in a folder at a time. Adding methods
or seeds to a finished comparison runs only what is new. --tune N runs N trials a method instead, on the first seed and
judged on the validation split, and leaves trials.md. --parity gives adapters the SpikeLoRA authors' settings:
"library", as in their code (20 epochs, padding read as text, another 90/10 split for each seed, the last epoch tested),
or "paper", as far as it says.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase, set_seed

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
from spikegpt_lora.finetune.methods import METHODS, MODELS, resolve_options
from spikegpt_lora.finetune.options import PARITY, sample_trial
from spikegpt_lora.finetune.run import adapt, finetune, tokenize
from spikegpt_lora.ops.backend import use_extension
from spikegpt_lora.pretrain.tokenizer import train_tokenizer
from spikegpt_lora.report.cards import model_card
from spikegpt_lora.report.markdown import markdown, trials_table
from spikegpt_lora.report.plots import draw_accuracy, draw_raster
from spikegpt_lora.report.results import SCHEMA, TRIAL_KEYS, compare, read_runs, summarize
from spikegpt_lora.tasks.baselines import bag_of_words_baselines
from spikegpt_lora.tasks.registry import TASKS
from spikegpt_lora.tasks.splits import resplit
from spikegpt_lora.utils import command_line
from spikegpt_lora.utils.errors import read_json
from spikegpt_lora.utils.files import locked, whole_files, write_json, write_text

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
    "gate": (str, "of SpikeLoRA: graded or binary"),
    "learn": (str, "of SpikeLoRA's gate: none, threshold, tau or both"),
    "target_sparsity": (float, "of SpikeLoRA's gate, held while training"),
}
COMPARED = ["full", "lora", "spikelora", "head"]
RANDOM_SIZES = {"n_layer": 2, "n_embd": 128, "vocab_size": 4096}
PACKAGES = ("spikegpt_lora", "torch", "transformers", "peft", "spikingjelly")
STOPPED = "stopped. What is finished stands in results.md; the same command goes on from here."


def main() -> int:
    args = parse_arguments()
    command_line.set_up()
    PartialState(cpu=not torch.cuda.is_available())  # one process, or what torchrun started
    task, data = load_data(args)
    args.output_dir = (args.output_dir or Path("runs") / task).resolve()  # adapters keep the path to their base model
    with locked(args.output_dir) if PartialState().is_main_process else contextlib.nullcontext():
        comparison = prepare(args, task, data)
        use_extension("auto", PartialState().device)  # built now: no log line breaks a progress bar
        return tune(comparison) if args.tune else run_all(comparison)


def parse_arguments() -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    add, positive = parser.add_argument, command_line.positive
    add("--task", choices=TASKS, help="default: subj, or the built-in subj-mini where it is not found")
    add("--data-dir", type=Path, help="folder with Subj; else SPIKEGPT_LORA_DATA, else the Hugging Face hub")
    add("--output-dir", type=Path, help="results go here (default: runs/ and the task's name)")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", default=COMPARED, help="which to compare")
    add("--seeds", nargs="+", type=command_line.seed, metavar="SEED", default=[0], help="one run a method and seed")
    add("--trace-sentences", type=positive, default=32, help="test sentences whose spikes are recorded")
    add("--tune", type=positive, metavar="N", help="N trials a method instead, on the validation split")
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        default="embedded",
        help="embedded, random, a folder, an upstream .pth file, or a hub id",
    )
    add("--tokenizer", help="folder or hub id, where the model does not bring its own")
    add("--pooling", choices=POOLINGS, help="what the classifier reads (default: last_mean)")
    for name, size in RANDOM_SIZES.items():
        add(f"--{name.replace('_', '-')}", type=positive, help=f"of a random model (default: {size})")
    add = parser.add_argument_group("training", "one VALUE for all methods, or METHOD=VALUE ...").add_argument
    for name, (kind, help) in ADJUSTABLE.items():
        add(f"--{name.replace('_', '-')}", nargs="+", metavar="VALUE", type=per_method(kind), help=help + usual(name))
    add("--parity", choices=list(PARITY), help="the SpikeLoRA authors' settings")
    add("--max-length", type=positive, default=128, help="tokens a sentence")
    add("--max-train-samples", type=positive, help="use only so many training sentences (a quick try)")
    add("--bf16", action="store_true", help="bfloat16 mixed precision")
    args = parser.parse_args()
    args.seeds = list(dict.fromkeys(args.seeds))
    try:
        resolve(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def usual(name: str) -> str:
    """What a setting is for the embedded model if nothing is said, as the help shows it."""
    values = {method: getattr(options, name) for method, options in resolve_options("embedded").items()}
    shown = [str(values["full"])] if len(set(values.values())) == 1 else [f"{m}={v:g}" for m, v in values.items()]
    return f" (default, embedded model: {' '.join(shown)})"


def resolve(args) -> None:
    """What follows from several arguments together, and which of them exclude each other."""
    if args.tune and args.parity:
        raise ValueError("--tune searches for settings and --parity fixes them: give one of the two")
    if args.parity == "library" and (args.max_train_samples or args.pooling):
        raise ValueError("--parity library fixes --pooling (last) and takes no --max-train-samples")
    sizes = [name for name in RANDOM_SIZES if getattr(args, name) is not None]
    if sizes and args.model != "random":
        raise ValueError(f"--{sizes[0].replace('_', '-')} is for --model random; {args.model} has its own")
    for name, size in RANDOM_SIZES.items():
        setattr(args, name, getattr(args, name) or size)
    args.pooling = args.pooling or ("last" if args.parity == "library" else "last_mean")
    args.source = embedded_checkpoint() if args.model == "embedded" else args.model
    kind = args.model if args.model in MODELS else "embedded" if is_small(args.model) else "other"
    changes = {name: getattr(args, name) or [] for name in ADJUSTABLE}
    args.settings = resolve_options(kind, args.parity, args.bf16, changes)
    for name, method in METHODS.items():
        if method.adapter is not None:
            method.adapter(args.settings[name])  # what it refuses is refused before anything is trained


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


@dataclass
class Comparison:
    """What all runs share: settings, the data, and the results so far (see report/results.py)."""

    args: argparse.Namespace
    data: DatasetDict
    tokens: DatasetDict
    tokenizer: PreTrainedTokenizerBase
    results: dict

    def data_of(self, seed: int) -> tuple[DatasetDict, DatasetDict]:
        """Text and tokens: the one split, or with --parity library the seed's own."""
        if self.args.parity != "library":
            return self.data, self.tokens
        data = resplit(self.data, seed)
        return data, tokenize(data, self.tokenizer, self.args.max_length)[0]


def prepare(args: argparse.Namespace, task: str, data: DatasetDict) -> Comparison:
    with PartialState().main_process_first():  # on several devices: one writes, then all read
        options = check_options(args, task, data)
        tokenizer = get_tokenizer(args, data)
    tokens, cut = tokenize(data, tokenizer, args.max_length)
    used = resplit(data, args.seeds[0]) if args.parity == "library" else data
    sizes = {split: len(rows) for split, rows in used.items()}
    say(f"{task}: " + ", ".join(f"{split} {size:,}" for split, size in sizes.items()) + " sentences")
    if cut:
        say(f"note: {cut} sentences are cut to --max-length {args.max_length} tokens")
    results = {
        "schema": SCHEMA,
        "task": task,
        "model": args.model,
        "complete": False,
        "options": options,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "data": sizes | {"cut_short": cut},
        # Under --parity library each seed tests other sentences, so there is no one row for these.
        "baselines": [] if args.parity == "library" or args.tune else bag_of_words_baselines(data),
        "published": list(TASKS[task].published),
    }
    return Comparison(args, data, tokens, tokenizer, results)


def load_data(args) -> tuple[str, DatasetDict]:
    """The task's name and its sentences, of the training ones as many as are asked for."""
    task = args.task or ("subj" if args.data_dir is not None else None)
    if task is not None:
        data = load_task(task, args.data_dir)
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
            raise ValueError(f"--max-train-samples must leave sentences of both classes, got {args.max_train_samples}")
    return task, data


def check_options(args, task: str, data: DatasetDict) -> dict:
    """The settings that results depend on; raises if the output folder holds results of other ones. A method that has
    nothing there yet may have any."""
    not_results = {
        "source",
        "output_dir",
        "data_dir",
        "methods",
        "seeds",
        "trace_sentences",
        "tune",
        "bf16",
        *ADJUSTABLE,
    }
    options = {key: value for key, value in vars(args).items() if key not in not_results} | {"task": task}
    options["model_sha256"] = fingerprint(Path(args.source))
    options["settings"] = {method: asdict(of_method) for method, of_method in args.settings.items()}
    texts = "\n".join(text for split in data.values() for text in split["text"])
    options["text_sha256"] = hashlib.sha256(texts.encode()).hexdigest()
    if PartialState().is_main_process:
        out = args.output_dir
        begun = {file.parents[1].name for file in [*out.glob("*/seed*/*"), *out.glob("trials/*/seed*/*")]}
        if begun:  # else a false start, which is forgotten
            refuse_other_settings(out, options, begun)
        else:
            shutil.rmtree(out / "tokenizer", ignore_errors=True)
        write_json(out / "options.json", options)
    return options


def refuse_other_settings(out: Path, options: dict, begun: set[str]) -> None:
    """Raise where `out` holds results of other settings; of a method's own, only those in `begun` count."""
    results = out / "results.json"
    if (out / "options.json").is_file():
        before = read_json(out / "options.json")
    elif results.is_file():
        before = read_json(results, keys=("options",))["options"]
    elif not any(out.glob("*/seed*/*.json")):  # nothing that was finished
        return
    else:
        raise ValueError(f"{out} holds results, but no options.json says of which settings: give another --output-dir")
    settings = before.get("settings")
    finished = {run["method"]: run["settings"] for run in read_runs(out)}
    before["settings"] = (settings if isinstance(settings, dict) else {}) | finished
    old, new = flat(before), flat(options)
    others = tuple(f"settings.{method}." for method in set(METHODS) - begun)
    if differing := [key for key in new if old.get(key) != new[key] and not key.startswith(others)]:
        changes = "; ".join(f"{key} was {old.get(key)!r}, is {new[key]!r}" for key in differing)
        raise ValueError(
            f"{out} holds results of other settings ({changes}): give another --output-dir, or delete this one"
        )


def fingerprint(source: Path) -> str | None:
    """sha256 of the weights that a run starts from; None for random ones and for a hub id."""
    file = source / "model.safetensors" if source.is_dir() else source
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def flat(options: dict, prefix: str = "") -> dict:
    """Nested dicts as one, with dotted keys."""
    pairs = {}
    for key, value in options.items():
        pairs |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return pairs


def get_tokenizer(args, data: DatasetDict) -> PreTrainedTokenizerBase:
    if args.model == "random":
        folder = args.output_dir / "tokenizer"
        if not (folder / "tokenizer_config.json").is_file():
            with whole_files(folder, last="tokenizer_config.json") as temporary:
                train_tokenizer(data["train"]["text"], args.vocab_size).save_pretrained(temporary)
        return load_tokenizer(folder)
    try:
        tokenizer = load_tokenizer(args.tokenizer or UPSTREAM_TOKENIZERS.get(args.source, args.source))
    except ValueError as error:
        raise ValueError(f"{error}: name its folder or hub id with --tokenizer") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = "<|padding|>" if "<|padding|>" in tokenizer.get_vocab() else tokenizer.eos_token
    return tokenizer


def tune(comparison: Comparison) -> int:
    """--tune trials of each method on the first seed, judged on validation: the test labels are not used."""
    if PartialState().num_processes > 1:
        raise ValueError("--tune runs in one process: start it without torchrun")
    args, seed = comparison.args, comparison.args.seeds[0]
    trials = [(trial, method) for trial in range(args.tune) for method in args.methods]
    tokens = DatasetDict({split: comparison.tokens[split] for split in ("train", "validation")})
    records = []
    for number, (trial, method) in enumerate(trials, 1):
        folder = args.output_dir / "trials" / method / f"seed{seed}-trial{trial}"
        if not (folder / "trial.json").is_file():
            options = sample_trial(args.settings[method], trial)
            model = adapt(get_base(comparison, seed), method, options, seed)
            description = f"{number}/{len(trials)} {method} trial {trial}"
            _, record = finetune(
                model, method, tokens, comparison.tokenizer, folder / "training", seed, options, description
            )
            write_json(folder / "trial.json", record)
        shutil.rmtree(folder / "training", ignore_errors=True)
        records.append(read_json(folder / "trial.json", keys=TRIAL_KEYS))
    write_text(args.output_dir / "trials.md", table := trials_table(records))
    print(f"\n{table}\nWritten to {args.output_dir / 'trials.md'}.")
    return 0


def run_all(comparison: Comparison) -> int:
    args, out, devices = comparison.args, comparison.args.output_dir, PartialState()
    runs = [(seed, method) for seed in args.seeds for method in args.methods]
    missing = [run for run in runs if not run_folder(out, *run).joinpath("run.json").is_file()]
    if devices.is_main_process:
        for finished in out.glob("*/seed*/run.json"):  # whose process may have been killed just after it
            shutil.rmtree(finished.with_name("training"), ignore_errors=True)
    started = time.perf_counter()
    for seed, method in missing:
        if devices.is_main_process:
            write_results(comparison.results, out, complete=False)
        run(comparison, method, seed, f"{runs.index((seed, method)) + 1}/{len(runs)} {method} seed {seed}")
        devices.wait_for_everyone()
    if not devices.is_main_process:
        return 0
    write_results(comparison.results, out, complete=True)
    print("\n" + (out / "results.md").read_text(encoding="utf-8"))
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes. Written to {out}:")
    print(
        "results.md, results.json, accuracy.png; models and adapters by method and seed; traces/ with a picture each."
    )
    return 0


def run_folder(out: Path, seed: int, method: str) -> Path:
    return out / method / f"seed{seed}"


def run(comparison: Comparison, method: str, seed: int, description: str) -> None:
    """Train one method on one seed, save the model, its card and its spikes; `run.json`, last, says it is finished."""
    args, tokenizer = comparison.args, comparison.tokenizer
    folder = run_folder(args.output_dir, seed, method)
    options = args.settings[method]
    data, tokens = comparison.data_of(seed)
    model = adapt(get_base(comparison, seed), method, options, seed)
    model, record = finetune(model, method, tokens, tokenizer, folder / "training", seed, options, description)
    if not PartialState().is_main_process:
        return
    record = {"task": comparison.results["task"], **record}
    record_traces(comparison, model, data["test"], f"{method}-seed{seed}")
    with whole_files(folder, last="run.json") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_text(temporary / "README.md", model_card(comparison.results, record))
        write_json(temporary / "run.json", record)
    shutil.rmtree(folder / "training")


def get_base(comparison: Comparison, seed: int) -> SpikeGPTForSequenceClassification:
    """The model that every method of this seed starts from, its initial `score` included; made once, then read."""
    folder = comparison.args.output_dir / "base" / f"seed{seed}"
    with PartialState().main_process_first():  # on several devices: one writes, then all read
        if not (folder / "config.json").is_file():
            make_base(comparison, seed, folder)
    return load_model(SpikeGPTForSequenceClassification, folder)


def make_base(comparison: Comparison, seed: int, folder: Path) -> None:
    args, source, tokenizer = comparison.args, comparison.args.source, comparison.tokenizer
    set_seed(seed)
    labels = TASKS[comparison.results["task"]].labels
    changes = {"pooling": args.pooling, "id2label": dict(enumerate(labels))}
    changes |= {"label2id": {name: i for i, name in enumerate(labels)}}
    changes |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if args.model == "random":
        sizes = {"vocab_size": len(tokenizer), "n_embd": args.n_embd, "n_layer": args.n_layer}
        model = SpikeGPTForSequenceClassification(SpikeGPTConfig(**sizes, **changes))
    elif Path(source).is_dir():
        model = load_model(SpikeGPTForSequenceClassification, source, new_head=True, **changes)
    else:
        lm = load_upstream_checkpoint(source)
        model = SpikeGPTForSequenceClassification.from_language_model(lm, **changes)
    require_same_tokens(tokenizer, model.config, source)
    for method in args.methods:
        METHODS[method].require(model.config, args.settings[method])
    with whole_files(folder, last="config.json") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def record_traces(comparison: Comparison, model, test: Dataset, name: str) -> None:
    args = comparison.args
    rows = test[: args.trace_sentences]
    batch = comparison.tokenizer(
        rows["text"], padding=True, truncation=True, max_length=args.max_length, return_tensors="pt"
    )
    batch["labels"] = rows["label"]
    task = comparison.results["task"]
    title = f"{task}: {name}"
    trace = record_spikes(model, batch, comparison.tokenizer, note=f"{title}, first test sentences")
    folder = args.output_dir / "traces"
    folder.mkdir(exist_ok=True)
    trace.save(folder / f"{name}.npz")
    draw_raster(
        trace, folder / f"{name}.png", title=f"{title}, first test sentence ({TASKS[task].labels[trace.labels[0]]})"
    )


def write_results(results: dict, out: Path, complete: bool) -> None:
    """results.json, results.md and accuracy.png from every finished run in the folder."""
    runs = read_runs(out)
    # Under --parity library each seed tests other sentences: no interval over sentences and seeds.
    comparisons = [] if results["options"]["parity"] == "library" else compare(runs)
    results |= {"runs": runs, "summary": summarize(runs), "comparisons": comparisons}
    results["complete"] = complete and len({tuple(row["seeds"]) for row in results["summary"]}) == 1
    write_json(out / "results.json", results)
    write_text(out / "results.md", markdown(results))
    draw_accuracy(results, out / "accuracy.png")


if __name__ == "__main__":
    sys.exit(command_line.run(main, STOPPED))
