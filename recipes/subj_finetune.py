"""Full fine-tuning vs LoRA vs SpikeLoRA (and `score` alone) on Subj, and the spike traces of the result.

    python recipes/subj_finetune.py --data-dir FOLDER_WITH_SUBJ

With the default sizes two CPU cores need about MINUTES minutes for 4 methods x 3 seeds. It leaves in --output-dir:

    results.md  results.json  accuracy.png     the comparison (results.json's schema: spikegpt_lora/report.py)
    base/seed0/                                the model that all methods of seed 0 start from, and its tokenizer
    full/seed0/  head/seed0/                   fine-tuned models
    lora/seed0/  spikelora/seed0/              adapters in peft's format
    traces/spikelora-seed0.npz, .png           spikes of the first test sentences (spikegpt_lora/trace.py)

Ctrl-C leaves what is finished readable; the same command goes on from there. Adding methods or seeds to a finished
comparison runs only what is new.
"""

import argparse
import importlib.metadata
import json
import shutil
import sys
import time
import warnings
from pathlib import Path

import transformers
from transformers import AutoTokenizer, set_seed

from spikegpt_lora import (
    SpikeGPTConfig,
    SpikeGPTForSequenceClassification,
    load_task,
    load_upstream_checkpoint,
    record_spikes,
    report,
)
from spikegpt_lora.baselines import bag_of_words_baselines
from spikegpt_lora.config import POOLINGS
from spikegpt_lora.files import write_json, write_text
from spikegpt_lora.tokenizer import train_tokenizer
from spikegpt_lora.training import METHODS, FinetuneOptions, adapt, finetune, tokenize

LEARNING_RATES = {"full": 1e-3, "lora": 2e-3, "spikelora": 2e-3, "head": 5e-3}
NEOX_TOKENIZER = {"ridger/SpikeGPT-OpenWebText-216M": "EleutherAI/gpt-neox-20b"}


def main() -> int:
    args = parse_arguments()
    quieten_libraries()
    try:
        return compare_methods(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse_arguments() -> argparse.Namespace:
    description, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--task", choices=["subj", "subj-mini"], help="default: subj, or the built-in subj-mini where subj is not found"
    )
    add("--data-dir", type=Path, help="folder with Subj (default: SPIKEGPT_LORA_DATA, then the Hugging Face hub)")
    add("--output-dir", type=Path, default=Path("runs/subj"), help="default: %(default)s")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help="default: %(default)s")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="default: %(default)s")

    model = parser.add_argument_group("model")
    model.add_argument("--model", default="random", help='"random", a saved model, an upstream .pth file or a hub id')
    model.add_argument("--tokenizer", help="folder or hub id, where the model does not bring its own")
    model.add_argument("--pooling", choices=POOLINGS, default="last_mean", help="default: %(default)s")
    model.add_argument("--dropout", type=float, default=0.2, help="after each block; default: %(default)s")
    model.add_argument("--n-layer", type=int, default=2, help="of a random model; default: %(default)s")
    model.add_argument("--n-embd", type=int, default=128, help="of a random model; default: %(default)s")
    model.add_argument("--vocab-size", type=int, default=4096, help="of a random model's BPE; default: %(default)s")

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, default=5, help="default: %(default)s")
    training.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    training.add_argument(
        "--learning-rate",
        nargs="+",
        default=[],
        metavar="RATE",
        help="one for all methods, or METHOD=RATE ...; default: "
        + " ".join(f"{k}={v:g}" for k, v in LEARNING_RATES.items()),
    )
    training.add_argument(
        "--rank", type=int, default=16, help="of LoRA and SpikeLoRA (alpha is the same); default: %(default)s"
    )
    training.add_argument("--v-threshold", type=float, default=0.1, help="of SpikeLoRA's gate; default: %(default)s")
    training.add_argument("--max-length", type=int, default=128, help="tokens a sentence; default: %(default)s")
    training.add_argument("--max-train-samples", type=int, help="use only so many training sentences (a quick try)")
    training.add_argument("--bf16", action="store_true", help="bfloat16 mixed precision")
    add("--trace-sentences", type=int, default=32, help="test sentences to record per run; default: %(default)s")
    args = parser.parse_args()
    try:
        args.learning_rate = learning_rates(args.learning_rate)
    except ValueError as error:
        parser.error(f"--learning-rate takes one number, or METHOD=NUMBER for {', '.join(METHODS)}: {error}")
    return args


def learning_rates(given: list[str]) -> dict[str, float]:
    if len(given) == 1 and "=" not in given[0]:
        return dict.fromkeys(METHODS, float(given[0]))
    named = dict(item.split("=", 1) if "=" in item else (item, "") for item in given)
    unknown = [name for name in named if name not in METHODS]
    if unknown:
        raise ValueError(f"no method {', '.join(unknown)}")
    return LEARNING_RATES | {name: float(rate) for name, rate in named.items()}


def compare_methods(args: argparse.Namespace) -> int:
    task, data = load_data(args)
    if args.max_train_samples:
        data["train"] = data["train"].select(range(min(args.max_train_samples, len(data["train"]))))
    out = args.output_dir
    out.mkdir(parents=True, exist_ok=True)
    options = check_options(args, task)
    tokenizer = get_tokenizer(args, data, out)
    tokens, cut = tokenize(data, tokenizer, args.max_length)
    results = {
        "schema": report.SCHEMA,
        "task": task,
        "model": args.model,
        "complete": False,
        "options": options,
        "versions": {
            n: importlib.metadata.version(n) for n in ("spikegpt_lora", "torch", "transformers", "peft", "spikingjelly")
        },
        "data": {split: len(rows) for split, rows in data.items()} | {"cut_short": cut},
        "baselines": bag_of_words_baselines(data),
        "published": report.PUBLISHED.get(task, []),
    }
    print_data(task, data, cut, args)

    runs = [(seed, method) for seed in args.seeds for method in args.methods]
    started = time.perf_counter()
    try:
        for number, (seed, method) in enumerate(runs, 1):
            run_directory = out / method / f"seed{seed}"
            if not (run_directory / "run.json").is_file():
                description = f"{number}/{len(runs)} {method} seed {seed}"
                run(args, method, seed, tokens, data, tokenizer, out, run_directory, description)
            write_results(results, out, complete=number == len(runs))
    except KeyboardInterrupt:
        write_results(results, out, complete=False)
        print(f"\nstopped. What is finished stands in {out / 'results.md'}; the same command goes on from here.")
        return 130
    print("\n" + (out / "results.md").read_text(encoding="utf-8"))
    print(
        f"{(time.perf_counter() - started) / 60:.1f} minutes. Written to {out}: results.md, results.json, accuracy.png,"
    )
    print(
        "models and adapters by method and seed, traces/ (spikes of test sentences, with a picture of the first one)."
    )
    return 0


def load_data(args):
    if args.task is not None or args.data_dir is not None:
        task = args.task or "subj"
        return task, load_task(task, args.data_dir)
    try:
        return "subj", load_task("subj")
    except FileNotFoundError as error:
        rule = "!" * 100
        print(
            f"{rule}\n{error}\n\nGoing on with subj-mini: 600 sentences, good for a try, useless as a result.\n{rule}"
        )
        return "subj-mini", load_task("subj-mini")


def check_options(args, task: str) -> dict:
    """The settings that results depend on; raises if the output folder holds results of other ones."""
    not_results = {"output_dir", "data_dir", "methods", "seeds"}
    options = {key: value for key, value in vars(args).items() if key not in not_results} | {"task": task}
    file = args.output_dir / "options.json"
    if not file.exists():
        write_json(file, options)
    before = json.loads(file.read_text(encoding="utf-8"))
    differing = [
        f"{key} was {before.get(key)!r}, is {options.get(key)!r}"
        for key in options
        if before.get(key) != options.get(key)
    ]
    if differing:
        raise ValueError(
            f"{args.output_dir} holds results of other settings ({'; '.join(differing)}): "
            "give another --output-dir, or delete this one"
        )
    return options


def get_tokenizer(args, data, out: Path):
    if args.model == "random":
        if not (out / "tokenizer" / "tokenizer.json").is_file():
            train_tokenizer(data["train"]["text"], args.vocab_size).save_pretrained(out / "tokenizer")
        return AutoTokenizer.from_pretrained(out / "tokenizer")
    source = args.tokenizer or NEOX_TOKENIZER.get(args.model, args.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer at {source!r}: name its folder or hub id with --tokenizer ({error})") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = "<|padding|>" if "<|padding|>" in tokenizer.get_vocab() else tokenizer.eos_token
    return tokenizer


def get_base(args, tokenizer, out: Path, seed: int) -> SpikeGPTForSequenceClassification:
    """The model that every method of this seed starts from, its initial `score` included; made once, then read."""
    folder = out / "base" / f"seed{seed}"
    if not folder.is_dir():
        set_seed(seed)
        labels = {0: "objective", 1: "subjective"}
        changes = {"pooling": args.pooling, "dropout": args.dropout, "id2label": labels}
        changes |= {"label2id": {name: i for i, name in labels.items()}}
        changes |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        if args.model == "random":
            sizes = {"vocab_size": len(tokenizer), "n_embd": args.n_embd, "n_layer": args.n_layer}
            model = SpikeGPTForSequenceClassification(SpikeGPTConfig(**sizes, **changes))
        elif Path(args.model).is_dir():
            model = SpikeGPTForSequenceClassification.from_pretrained(args.model, **changes)
        else:
            model = SpikeGPTForSequenceClassification.from_language_model(
                load_upstream_checkpoint(args.model), **changes
            )
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)
    return SpikeGPTForSequenceClassification.from_pretrained(folder)


def run(args, method, seed, tokens, data, tokenizer, out: Path, directory: Path, description: str):
    shared = ("epochs", "batch_size", "rank", "v_threshold", "bf16")
    options = FinetuneOptions(
        learning_rate=args.learning_rate[method], alpha=args.rank, **{key: getattr(args, key) for key in shared}
    )
    model = adapt(get_base(args, tokenizer, out, seed), method, options, seed)
    model, record = finetune(model, method, tokens, tokenizer, directory / "training", seed, options, description)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    record_traces(
        args, model, tokens, data, tokenizer, out / "traces" / f"{method}-seed{seed}", f"{method}, seed {seed}"
    )
    write_json(directory / "run.json", record)  # last: it says that the run is finished
    shutil.rmtree(directory / "training")


def record_traces(args, model, tokens, data, tokenizer, path: Path, title: str):
    path.parent.mkdir(exist_ok=True)
    count = min(args.trace_sentences, len(data["test"]))
    batch = tokenizer(
        list(data["test"]["text"][:count]),
        padding=True,
        truncation=True,
        max_length=args.max_length,
        return_tensors="pt",
    )
    batch["labels"] = data["test"]["label"][:count]
    trace = record_spikes(model, batch, tokenizer)
    trace.save(path.with_suffix(".npz"))
    report.draw_raster(
        trace,
        path.with_suffix(".png"),
        title=f"{title}: test sentence 1 ({data['test'].features['label'].int2str(int(trace.labels[0]))})",
    )


def write_results(results: dict, out: Path, complete: bool):
    """results.json, results.md and accuracy.png from every finished run in the folder."""
    files = sorted(out.glob("*/seed*/run.json"))
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    results |= {"complete": complete, "runs": runs}
    results |= {"summary": report.summarize(runs), "comparisons": report.compare(runs)}
    write_json(out / "results.json", results)
    write_text(out / "results.md", report.markdown(results))
    report.draw_accuracy(results, out / "accuracy.png")


def print_data(task, data, cut, args):
    print(f"task {task}: " + ", ".join(f"{split} {len(rows):,}" for split, rows in data.items()) + " sentences")
    if cut:
        print(f"note: {cut} sentences are cut to --max-length {args.max_length} tokens")
    print(f"model {args.model}; methods {' '.join(args.methods)}; seeds {' '.join(map(str, args.seeds))}")


def quieten_libraries():
    transformers.utils.logging.disable_progress_bar()  # of files, within a second
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # peft's


if __name__ == "__main__":
    sys.exit(main())
