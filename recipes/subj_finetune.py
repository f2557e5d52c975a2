"""Full fine-tuning vs LoRA vs SpikeLoRA (and `score` alone) on Subj, and the spike traces of the result.

    python recipes/subj_finetune.py --data-dir FOLDER_WITH_SUBJ

All methods start from the SpikeGPT that comes with the package, or from --model. It leaves in --output-dir:

    results.md  results.json  accuracy.png     the comparison (results.json's schema: spikegpt_lora/report.py)
    base/seed0/                                the model that all methods of seed 0 start from, and its tokenizer
    full/seed0/  head/seed0/  scratch/seed0/   fine-tuned models
    lora/seed0/  spikelora/seed0/              adapters in peft's format
    traces/spikelora-seed0.npz, .png           spikes of the first test sentences (spikegpt_lora/trace.py)

Ctrl-C leaves what is finished readable; the same command goes on from there. Adding methods or seeds to a finished
comparison runs only what is new. --tune N runs N trials a method instead, on the first seed and judged on the
validation split, and leaves trials.md. --parity gives adapters the SpikeLoRA authors' settings: "library", as in their
code (20 epochs, padding read as text, another 90/10 split for each seed, the last epoch tested), or "paper", as far as
it says.
"""

import argparse
import hashlib
import importlib.metadata
import json
import shutil
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed

from spikegpt_lora import (
    SpikeGPTConfig,
    SpikeGPTForSequenceClassification,
    command_line,
    embedded_checkpoint,
    extension,
    load_task,
    load_upstream_checkpoint,
    record_spikes,
    report,
)
from spikegpt_lora.baselines import bag_of_words_baselines
from spikegpt_lora.config import POOLINGS
from spikegpt_lora.data import LABELS, resplit
from spikegpt_lora.files import write_json, write_text
from spikegpt_lora.settings import METHODS, PARITY, SETTINGS, choose, drawn
from spikegpt_lora.tokenizer import train_tokenizer
from spikegpt_lora.training import adapt, adapter_config, finetune, tokenize

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
RANDOM_SIZES = {"n_layer": 2, "n_embd": 128, "vocab_size": 4096}
UPSTREAM_TOKENIZERS = {"ridger/SpikeGPT-OpenWebText-216M": "EleutherAI/gpt-neox-20b"}
PACKAGES = ("spikegpt_lora", "torch", "transformers", "peft", "spikingjelly")


def main() -> int:
    args = parse_arguments()
    command_line.set_up()
    PartialState(cpu=not torch.cuda.is_available())  # one process, or what torchrun started
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # peft's
    try:
        comparison = prepare(args)
        extension.use_extension("auto", PartialState().device)  # what it has to say, it says before any progress bar
        return tune(comparison) if args.tune else run_all(comparison)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here.")
        return 130


def parse_arguments() -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    add, positive = parser.add_argument, command_line.positive
    add(
        "--task",
        choices=["subj", "subj-mini"],
        help="default: subj, or the built-in subj-mini where it is not found",
    )
    add("--data-dir", type=Path, help="folder with Subj; else SPIKEGPT_LORA_DATA, else the Hugging Face hub")
    add("--output-dir", type=Path, help="results go here (default: runs/ and the task's name)")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", default=list(METHODS[:4]), help="which to compare")
    add("--seeds", nargs="+", type=int, metavar="SEED", default=[0], help="one run a method and seed")
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
    values = {method: getattr(options, name) for method, options in choose("embedded").items()}
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
    kind = args.model if args.model in SETTINGS else "embedded" if is_small(args.model) else "other"
    changes = {name: getattr(args, name) or [] for name in ADJUSTABLE}
    args.settings = choose(kind, args.parity, args.bf16, changes)
    adapter_config("spikelora", args.settings["spikelora"])  # what it refuses is refused before anything is trained


def is_small(model: str) -> bool:
    """Whether `model` is a folder with a model of the embedded one's kind of size."""
    file = Path(model) / "config.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("n_embd", 0) <= 512


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
    """What all runs share: settings, the data, and the results so far (see report.py)."""

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


def prepare(args: argparse.Namespace) -> Comparison:
    task, data = load_data(args)
    if args.max_train_samples:
        data["train"] = data["train"].select(range(min(args.max_train_samples, len(data["train"]))))
    args.output_dir = (args.output_dir or Path("runs") / task).resolve()  # adapters keep the path to their base model
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
        "schema": report.SCHEMA,
        "task": task,
        "model": args.model,
        "complete": False,
        "options": options,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "data": sizes | {"cut_short": cut},
        # Under --parity library each seed tests other sentences, so there is no one row for these.
        "baselines": [] if args.parity == "library" or args.tune else bag_of_words_baselines(data),
        "published": report.PUBLISHED.get(task, []),
    }
    return Comparison(args, data, tokens, tokenizer, results)


def load_data(args) -> tuple[str, DatasetDict]:
    if args.task is not None or args.data_dir is not None:
        task = args.task or "subj"
        return task, load_task(task, args.data_dir)
    try:
        return "subj", load_task("subj")
    except FileNotFoundError as error:
        rule = "!" * 100
        say(f"{rule}\n{error}\n\nGoing on with subj-mini: 600 sentences, good for a try, useless as a result.\n{rule}")
        return "subj-mini", load_task("subj-mini")


def check_options(args, task: str, data: DatasetDict) -> dict:
    """The settings that results depend on; raises if the output folder holds results of other ones."""
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
    args.output_dir.mkdir(parents=True, exist_ok=True)
    file = args.output_dir / "options.json"
    finished = any(args.output_dir.glob("*/seed*/*")) or any(args.output_dir.glob("trials/*/*"))
    if PartialState().is_main_process and not (file.exists() and finished):  # a false start is forgotten
        shutil.rmtree(args.output_dir / "tokenizer", ignore_errors=True)
        write_json(file, options)
    before = json.loads(file.read_text(encoding="utf-8"))
    old, new = flat(before), flat(options)
    if differing := [key for key in new if old.get(key) != new[key]]:
        changes = "; ".join(f"{key} was {old.get(key)!r}, is {new[key]!r}" for key in differing)
        raise ValueError(
            f"{args.output_dir} holds results of other settings ({changes}): "
            "give another --output-dir, or delete this one"
        )
    return options


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
            train_tokenizer(data["train"]["text"], args.vocab_size).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)
    source = args.tokenizer or UPSTREAM_TOKENIZERS.get(args.source, args.source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer at {source!r}: name its folder or hub id with --tokenizer ({error})") from error
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
            options = drawn(args.settings[method], trial)
            model = adapt(get_base(comparison, seed), method, options, seed)
            description = f"{number}/{len(trials)} {method} trial {trial}"
            _, record = finetune(
                model, method, tokens, comparison.tokenizer, folder / "training", seed, options, description
            )
            write_json(folder / "trial.json", record)
            shutil.rmtree(folder / "training")
        records.append(json.loads((folder / "trial.json").read_text(encoding="utf-8")))
    write_text(args.output_dir / "trials.md", table := report.trials(records))
    print(f"\n{table}\nWritten to {args.output_dir / 'trials.md'}.")
    return 0


def run_all(comparison: Comparison) -> int:
    args, out, devices = comparison.args, comparison.args.output_dir, PartialState()
    runs = [(seed, method) for seed in args.seeds for method in args.methods]
    started = time.perf_counter()
    try:
        for number, (seed, method) in enumerate(runs, 1):
            if (out / method / f"seed{seed}" / "run.json").is_file():
                continue
            run(comparison, method, seed, f"{number}/{len(runs)} {method} seed {seed}")
            devices.wait_for_everyone()
            if devices.is_main_process:
                write_results(comparison.results, out, complete=False)
    except KeyboardInterrupt:
        if devices.is_main_process:
            write_results(comparison.results, out, complete=False)
            print(f"\nstopped. What is finished stands in {out / 'results.md'}; the same command goes on from here.")
        return 130
    if not devices.is_main_process:
        return 0
    write_results(comparison.results, out, complete=True)
    print("\n" + (out / "results.md").read_text(encoding="utf-8"))
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes. Written to {out}:")
    print(
        "results.md, results.json, accuracy.png; models and adapters by method and seed; traces/ with a picture each."
    )
    return 0


def run(comparison: Comparison, method: str, seed: int, description: str) -> None:
    """Train one method on one seed, save the model, its card and its spikes; `run.json`, last, says it is finished."""
    args, tokenizer = comparison.args, comparison.tokenizer
    folder = args.output_dir / method / f"seed{seed}"
    options = args.settings[method]
    data, tokens = comparison.data_of(seed)
    model = adapt(get_base(comparison, seed), method, options, seed)
    model, record = finetune(model, method, tokens, tokenizer, folder / "training", seed, options, description)
    if not PartialState().is_main_process:
        return
    record = {"task": comparison.results["task"], **record}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_text(folder / "README.md", report.model_card(comparison.results, record))
    record_traces(comparison, model, data["test"], f"{method}-seed{seed}")
    write_json(folder / "run.json", record)
    shutil.rmtree(folder / "training")


def get_base(comparison: Comparison, seed: int) -> SpikeGPTForSequenceClassification:
    """The model that every method of this seed starts from, its initial `score` included; made once, then read."""
    folder = comparison.args.output_dir / "base" / f"seed{seed}"
    with PartialState().main_process_first():  # on several devices: one writes, then all read
        if not folder.is_dir():
            make_base(comparison, seed, folder)
    return SpikeGPTForSequenceClassification.from_pretrained(folder)


def make_base(comparison: Comparison, seed: int, folder: Path) -> None:
    args, source, tokenizer = comparison.args, comparison.args.source, comparison.tokenizer
    set_seed(seed)
    changes = {"pooling": args.pooling, "id2label": dict(enumerate(LABELS))}
    changes |= {"label2id": {name: i for i, name in enumerate(LABELS)}}
    changes |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if args.model == "random":
        sizes = {"vocab_size": len(tokenizer), "n_embd": args.n_embd, "n_layer": args.n_layer}
        model = SpikeGPTForSequenceClassification(SpikeGPTConfig(**sizes, **changes))
    elif Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise ValueError(f"{source} holds no config.json: give a whole model (an adapter is none)")
        model = SpikeGPTForSequenceClassification.from_pretrained(source, dtype=torch.float32, **changes)
    else:
        lm = load_upstream_checkpoint(source)
        model = SpikeGPTForSequenceClassification.from_language_model(lm, **changes)
    largest = max(max(ids) for split in comparison.tokens.values() for ids in split["input_ids"])
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer gives token {largest}, the model knows {model.config.vocab_size} tokens: they do not "
            "belong together; name the model's own with --tokenizer"
        )
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def record_traces(comparison: Comparison, model, test: Dataset, name: str) -> None:
    args = comparison.args
    rows = test[: args.trace_sentences]
    batch = comparison.tokenizer(
        rows["text"], padding=True, truncation=True, max_length=args.max_length, return_tensors="pt"
    )
    batch["labels"] = rows["label"]
    title = f"{comparison.results['task']}: {name}"
    trace = record_spikes(model, batch, comparison.tokenizer, note=f"{title}, first test sentences")
    folder = args.output_dir / "traces"
    folder.mkdir(exist_ok=True)
    trace.save(folder / f"{name}.npz")
    report.draw_raster(trace, folder / f"{name}.png", title=f"{title}, first test sentence ({LABELS[trace.labels[0]]})")


def write_results(results: dict, out: Path, complete: bool) -> None:
    """results.json, results.md and accuracy.png from every finished run in the folder."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*/seed*/run.json"))]
    # Under --parity library each seed tests other sentences: no interval over sentences and seeds.
    comparisons = [] if results["options"]["parity"] == "library" else report.compare(runs)
    results |= {"runs": runs, "summary": report.summarize(runs), "comparisons": comparisons}
    results["complete"] = complete and len({tuple(row["seeds"]) for row in results["summary"]}) == 1
    write_json(out / "results.json", results)
    write_text(out / "results.md", report.markdown(results))
    report.draw_accuracy(results, out / "accuracy.png")


if __name__ == "__main__":
    sys.exit(main())
