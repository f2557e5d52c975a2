"""Pre-train a SpikeGPT language model on plain text, on whatever processor there is.

Trains a BPE tokenizer, leaves out the documents that quote the evaluation tasks, trains with a warm-up/stable/decay
schedule, and leaves a folder that from_pretrained, generate.py and subj_finetune.py --model take. Stop it whenever you
like, with Ctrl-C or SIGTERM: it saves, and the same command goes on where it was. A finished run is made longer with a
larger --steps. --model trains a model that exists further, on any text; --pairs adds a second task, which of many
sentences comes next.

The card of the embedded model has the command that made it.
"""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: see "A busy machine" in README.md

import numpy as np
import torch

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM, record_spikes
from spikegpt_lora.checkpoint import load_language_model
from spikegpt_lora.config import MATRIX_SPIKES, SPIKING, TOKEN_SHIFTS
from spikegpt_lora.convert.calibrate import centre
from spikegpt_lora.observe.books import totals
from spikegpt_lora.observe.matrix_inputs import HEAD, MatrixInput, by_kind, cells, matrix_inputs
from spikegpt_lora.observe.operations import count_operations
from spikegpt_lora.ops.backend import use_extension
from spikegpt_lora.ops.dropout import set_dropout
from spikegpt_lora.pretrain.corpus import Corpus, add_left_out, evaluation_sentences, prepare_corpus
from spikegpt_lora.pretrain.kneser_ney import KneserNey
from spikegpt_lora.pretrain.loop import (
    Pretraining,
    PretrainOptions,
    bf16_of,
    save_rounded,
    write_log,
)
from spikegpt_lora.pretrain.perplexity import per_token_word_character, perplexity
from spikegpt_lora.pretrain.progress import STOPPED, bar, train
from spikegpt_lora.report.markdown import table
from spikegpt_lora.utils import command_line
from spikegpt_lora.utils.files import locked, whole_files, write_json, write_text
from spikegpt_lora.utils.precision import name_of, resolve

SIZES = {"n_layer": (4, "blocks"), "n_embd": (256, "width"), "vocab_size": (8192, "tokens of the BPE")}
PAIRS = "; beside it, each step tells {pairs} pairs of neighbouring sentences from one another"
KNESER_NEY_TOKENS = 50_000_000  # it keeps all n-grams in memory, about 100 bytes a token


def main() -> int:
    args = parse_arguments()
    command_line.set_up()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve(args.precision, device, bf16_of(args.output_dir))
    options, config = settings(args, precision.bf16)  # these two first: a wrong value is told before minutes of reading
    print(precision)
    model, tokenizer = load_language_model(args.model) if args.model else (None, config.vocab_size)
    sentences = evaluation_sentences(args.decontaminate, args.data_dir)
    with locked(args.output_dir):
        corpus = prepare_corpus(args.text, args.output_dir / "corpus", tokenizer, sentences, bar)
        describe(corpus)
        use_extension("auto", device)  # built now: no log line breaks a progress bar
        model = model or new(config, corpus, options.seed)
        run = start(options, model.to(device), corpus, args)
        train(run, args.output_dir, 60 * args.save_minutes)
        finish(run, corpus, args)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    add = parser.add_argument
    add("text", help="a file (a document a line; .xz too), a folder of them, or a hub dataset's id")
    add("--output-dir", default=Path("runs/pretrain"), type=Path, help="everything goes here")
    add_left_out(add)
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        help="embedded, a folder or a hub id, to be trained further (default: a new one)",
    )
    for name, (size, help) in SIZES.items():
        add(f"--{name.replace('_', '-')}", type=int, help=f"{help} of a new model (default: {size})")
    add("--matrix-spikes", choices=MATRIX_SPIKES, help="what the matrices of a new model read (default: none)")
    add("--spike-levels", type=int, metavar="K", help="the largest integer spike (default: 3)")
    add("--token-shift", choices=TOKEN_SHIFTS, help="before the matrices, or after (default with integer spikes: rows)")
    add("--wkv-powers-of-two", action="store_true", default=None, help="no exp in WKV")
    add("--dropout", default=0.0, type=command_line.number("in [0, 1)"), help="after each block")
    add = parser.add_argument_group("training").add_argument
    defaults = PretrainOptions(steps=10000)
    add("--steps", default=defaults.steps, type=int, help="how many; the last fifth is the decay")
    add("--batch-size", default=defaults.batch_size, type=int, help="streams of text read side by side")
    add("--length", default=defaults.length, type=int, help="tokens a step and stream")
    add("--pairs", default=defaults.pairs, type=int, help="of neighbouring sentences a step, to be told from others")
    add("--learning-rate", default=defaults.learning_rate, type=float, help="of the stable stretch")
    add("--seed", default=defaults.seed, type=command_line.seed, help="of initial values, order and dropout")
    add("--save-minutes", default=5.0, type=command_line.number(">= 0"), help="between saves")
    command_line.add_precision(add)
    return parser.parse_args()


def describe(corpus: Corpus) -> None:
    facts = corpus.facts
    print(
        f"{facts['documents']:,} documents, without {facts['duplicates']:,} duplicates and {facts['left_out']:,} that "
        "share 8 words in a row with an evaluation sentence"
    )
    for name in ("train", "validation"):
        print(f"{name}: {facts[name]['documents']:,} documents, {facts[name]['tokens']:,} tokens")


def settings(args, bf16: bool) -> tuple[PretrainOptions, SpikeGPTConfig]:
    names = ("steps", "batch_size", "length", "learning_rate", "seed", "pairs")
    options = PretrainOptions(bf16=bf16, **{name: getattr(args, name) for name in names})
    given = {name: getattr(args, name) for name in (*SIZES, *SPIKING) if getattr(args, name) is not None}
    if given and args.model:
        raise ValueError(
            f"{', '.join(given)}: sizes are for a new model; {args.model} has its own, and what its matrices read is "
            "changed by convert.py"
        )
    if given.get("matrix_spikes") == "integer":
        given = {"token_shift": "rows"} | given
    sizes = {name: size for name, (size, _) in SIZES.items()} | given
    return options, SpikeGPTConfig(context_length=args.length, **sizes)


def new(config: SpikeGPTConfig, corpus: Corpus, seed: int) -> SpikeGPTForCausalLM:
    config.vocab_size = len(corpus.tokenizer)  # a small text may give fewer tokens than were asked for
    config.pad_token_id, config.eos_token_id = corpus.tokenizer.pad_token_id, corpus.tokenizer.eos_token_id
    torch.manual_seed(seed)
    return SpikeGPTForCausalLM(config)


def start(options: PretrainOptions, model: SpikeGPTForCausalLM, corpus: Corpus, args) -> Pretraining:
    run = Pretraining(set_dropout(model, args.dropout), corpus.train, options, corpus.tokenizer)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.2f} M parameters; an epoch is {run.streams.per_epoch:,} steps")
    if run.resume(args.output_dir):
        print(f"going on from step {run.step:,}")
    return run


def finish(run: Pretraining, corpus: Corpus, args) -> None:
    """The model, rounded to bfloat16, with its tokenizer, what was measured, the loss curve and a card."""
    folder = args.output_dir / "model"
    if run.model.config.matrix_spikes == "integer":
        centre(run.model, rows_of(corpus.train, run.model.device))
    with whole_files(folder, last="pretraining.json") as temporary:
        rounded = save_rounded(run.model, temporary)
        corpus.tokenizer.save_pretrained(temporary)
        print("measuring on the validation text, beside a Kneser-Ney model of the training tokens ...")
        record = measured(run, rounded, corpus, args.model)
        write_json(temporary / "pretraining.json", record)
        write_log(run.log, temporary / "loss.csv")
        write_text(temporary / "README.md", card := model_card(record))
    print(f"\n{card}\nThe model is in {folder}:")
    print(f'  python recipes/generate.py --model {folder} --prompt "this film"')
    print(f"  python recipes/subj_finetune.py --model {folder}")


def measured(run: Pretraining, rounded: SpikeGPTForCausalLM, corpus: Corpus, started_from: str | None) -> dict:
    """What pretraining.json holds of a run and its rounded model."""
    facts, ids = corpus.facts["validation"], rows_of(corpus.validation, rounded.device)
    counted = KneserNey(corpus.train[:KNESER_NEY_TOKENS], rounded.config.vocab_size).nats(corpus.validation)
    return {
        "options": vars(run.options),
        "precision": name_of(run.options.bf16),  # of the training; what follows was measured in float32
        "config": {key: getattr(rounded.config, key) for key in ("vocab_size", "n_layer", "n_embd")},
        "started_from": started_from,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "tokens": run.step * run.options.batch_size * run.options.length,
        "hours": run.seconds / 3600,
        "corpus": corpus.facts,
        "model": perplexity(rounded, corpus.validation, facts),
        "kneser_ney": per_token_word_character(float(counted.mean()), facts),
        "firing": firing(rounded, ids),
        **matrices(rounded, ids),
        "log": run.log,
    }


def rows_of(tokens: np.ndarray, device: torch.device) -> torch.Tensor:
    """Up to 16,384 tokens in stretches of 128."""
    rows = min(128, len(tokens) // 128)
    return torch.from_numpy(tokens[: rows * 128].astype(int)).view(rows, 128).to(device)


def matrices(model: SpikeGPTForCausalLM, ids: torch.Tensor) -> dict:
    """What each kind of matrix reads, and the share of the blocks' weights that a token reads."""
    batches = [{"input_ids": part} for part in ids.split(8)]
    reads = totals(count_operations(model, batches), blocks=True)["weight_reads_share"]
    return {"matrices": [asdict(row) for row in by_kind(matrix_inputs(model, batches))], "weight_reads": reads}


def firing(model: SpikeGPTForCausalLM, ids: torch.Tensor) -> dict[str, dict[str, float]]:
    """Of each population."""
    trace = record_spikes(model, {"input_ids": ids})
    return {
        name: {"rate": trace.firing_rate(name), "dead": trace.dead(name), "saturated": trace.saturated(name)}
        for name in trace.spikes
    }


def model_card(record: dict) -> str:
    options, config, facts = record["options"], record["config"], record["corpus"]
    measures = {"this model": record["model"], "5-gram Kneser-Ney": record["kneser_ney"]}
    stride = max(1, len(record["log"]) // 12)
    sections = [
        f"# SpikeGPT language model, {record['parameters'] / 1e6:.1f} M parameters",
        f"{config['n_layer']} layers, width {config['n_embd']}, {config['vocab_size']:,} tokens (lower-case BPE); "
        "tau 2, threshold 1, reset to 0; weights in bfloat16. Made by recipes/pretrain.py: settings and measures are "
        "in pretraining.json, the loss of every 50 steps is in loss.csv.",
        f"- training text: {facts['train']['documents']:,} documents, {facts['train']['tokens']:,} tokens; left out: "
        f"{facts['duplicates']:,} duplicates and {facts['left_out']:,} documents that share 8 words in a row with an "
        "evaluation sentence\n"
        f"- training: {options['steps']:,} steps of {options['batch_size']} x {options['length']} tokens "
        f"({record['tokens'] / 1e6:.1f} M) in {record['hours']:.2f} hours; AdamW, rate {options['learning_rate']:g}, "
        f"in {record['precision']}, "
        f"the last {options['decay']:.0%} of the steps decay{PAIRS.format(**options) if options['pairs'] else ''}",
        f"Validation ({facts['validation']['documents']:,} documents that were not trained on). A sign counts as a "
        "word, and so does a document's end; 5-grams are of the same tokens:",
        table(
            ["", "nats a token", "perplexity a token", "perplexity a word", "bits a character"],
            [
                [name, *(f"{value:.3f}" if value < 10 else f"{value:.1f}" for value in values.values())]
                for name, values in measures.items()
            ],
        ),
        "Firing on validation text: spikes a neuron and token; dead neurons never fire, saturated ones always do.",
        table(
            ["population", "rate", "dead %", "saturated %"],
            [
                [name, f"{row['rate']:.3f}", f"{100 * row['dead']:.1f}", f"{100 * row['saturated']:.1f}"]
                for name, row in record["firing"].items()
            ],
        ),
        f"What matrices read on validation text; a token reads {record['weight_reads']:.1%} of the blocks' weights:",
        table(HEAD, cells([MatrixInput(**row) for row in record["matrices"]])),
        "Training loss, mean of 50 steps:",
        table(
            ["step", "nats a token", *["nats a pair"] * bool(options["pairs"]), "hours"],
            [
                [f"{step:,}", *(f"{loss:.3f}" for loss in losses), f"{seconds / 3600:.2f}"]
                for step, *losses, seconds in record["log"][stride - 1 :: stride]
            ],
        ),
    ]
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    sys.exit(command_line.run(main, STOPPED))
