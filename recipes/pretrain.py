"""Pre-train a SpikeGPT language model on plain text, on whatever processor there is.

Trains a BPE tokenizer, leaves out the documents that quote the evaluation tasks, trains with a warm-up/stable/decay
schedule, and leaves a folder that from_pretrained, generate.py and subj_finetune.py --model take. Stop it whenever you
like, with Ctrl-C or SIGTERM: it saves, and the same command goes on where it was. A finished run is made longer with a
larger --steps. Several texts, each TEXT=N, are read side by side, N streams each, and measured one by one.

--model trains a model that exists further, on any text. With --token-shift rows --matrix-spikes integer its matrices
read integer spikes from then on, and --teacher keeps it near what the model of real numbers says. --pairs adds a second
task, which of many sentences comes next.

The card of the embedded model has the commands that made it.
"""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: see "A busy machine" in README.md

import numpy as np
import torch
from transformers import set_seed

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM, record_spikes
from spikegpt_lora.checkpoint import load_language_model, require_same_tokens
from spikegpt_lora.config import MATRIX_SPIKES, SPIKING, TOKEN_SHIFTS
from spikegpt_lora.convert.calibrate import calibrate, centre
from spikegpt_lora.convert.rows import mix_rows
from spikegpt_lora.convert.spiking import prepare
from spikegpt_lora.observe.books import totals
from spikegpt_lora.observe.matrix_inputs import by_kind, matrix_inputs
from spikegpt_lora.observe.operations import count_operations
from spikegpt_lora.ops.backend import use_extension
from spikegpt_lora.ops.dropout import set_dropout
from spikegpt_lora.pretrain.corpus import Corpus, add_left_out, evaluation_sentences, prepare_corpora
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
from spikegpt_lora.report.cards import language_model_card
from spikegpt_lora.report.plots import draw_loss
from spikegpt_lora.utils import command_line
from spikegpt_lora.utils.files import locked, whole_files, write_json, write_text
from spikegpt_lora.utils.hub import hub_id
from spikegpt_lora.utils.precision import name_of, resolve

SIZES = {"n_layer": (4, "blocks"), "n_embd": (256, "width"), "vocab_size": (8192, "tokens of the BPE")}
KNESER_NEY_TOKENS = 50_000_000  # it keeps all n-grams in memory, about 100 bytes a token
SAMPLES, SAMPLE_TOKENS = 10, 40
Read = dict[str, tuple[Corpus, int]]  # of each text its tokens, and how many of the streams read it


def main() -> int:
    args = parse_arguments()
    command_line.set_up()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve(args.precision, device, bf16_of(args.output_dir))
    texts = streams_of(args.text)
    options, config = settings(args, texts, precision.bf16)  # first: a wrong value is told before minutes of reading
    print(precision)
    model, tokenizer = load_language_model(args.model) if args.model else (None, config.vocab_size)
    if model is not None:
        require_possible(model.config, args)
    teacher = load_language_model(args.teacher)[0].to(device) if args.teacher else None
    sentences = evaluation_sentences(args.decontaminate, args.data_dir)
    with locked(args.output_dir):
        sources = {name: source for name, (source, _) in texts.items()}
        corpora = prepare_corpora(sources, args.output_dir / "corpus", tokenizer, sentences, bar)
        describe(corpora)
        use_extension("auto", device)  # built now: no log line breaks a progress bar
        first = next(iter(corpora.values()))
        model = new(config, first, options.seed) if model is None else changed(model.to(device), first, args)
        read = {name: (corpora[name], number or options.batch_size) for name, (_, number) in texts.items()}
        run = start(options, model.to(device), read, teacher, args)
        train(run, args.output_dir, 60 * args.save_minutes)
        finish(run, read, args)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    add = parser.add_argument
    add(
        "text",
        nargs="+",
        help="a file (a document a line; .xz too), a folder of them, or a hub dataset's id; several as TEXT=N, each "
        "read by N of the streams",
    )
    add("--output-dir", default=Path("runs/pretrain"), type=Path, help="everything goes here")
    add_left_out(add)
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        help="embedded, a folder or a hub id, to be trained further (default: a new one)",
    )
    for name, (size, help) in SIZES.items():
        add(f"--{name.replace('_', '-')}", type=int, help=f"{help} of a new model (default: {size})")
    add("--matrix-spikes", choices=MATRIX_SPIKES, help="what the matrices read (default: none, or as --model has it)")
    add("--spike-levels", type=int, metavar="K", help="the largest integer spike (default: 3)")
    add("--token-shift", choices=TOKEN_SHIFTS, help="before the matrices, or after (default with integer spikes: rows)")
    add("--wkv-powers-of-two", action="store_true", default=None, help="no exp in WKV")
    add("--dropout", default=0.0, type=command_line.number("in [0, 1)"), help="after each block")
    add = parser.add_argument_group("training").add_argument
    defaults = PretrainOptions(steps=10000)
    add("--steps", default=defaults.steps, type=int, help="how many")
    add("--batch-size", type=int, help=f"streams of one text read side by side (default: {defaults.batch_size})")
    add("--length", default=defaults.length, type=int, help="tokens a step and stream")
    add("--teacher", help="a model of the same tokens, to whose answers it is trained, not to the text")
    add("--pairs", default=defaults.pairs, type=int, help="of neighbouring sentences a step, to be told from others")
    add("--learning-rate", default=defaults.learning_rate, type=float, help="of the stable stretch")
    add("--decay", default=defaults.decay, type=float, help="share of the steps, the last ones, in which it falls to 0")
    add("--seed", default=defaults.seed, type=command_line.seed, help="of initial values, order and dropout")
    add("--save-minutes", default=5.0, type=command_line.number(">= 0"), help="between saves")
    command_line.add_precision(add)
    return parser.parse_args()


def streams_of(texts: list[str]) -> dict[str, tuple[str, int | None]]:
    """Of each text, by its name in folders and tables, where it is and how many streams read it (None: all)."""
    found: dict[str, tuple[str, int | None]] = {}
    for text in texts:
        source, _, number = text.rpartition("=")
        if not (source and number.isdecimal()):
            source, number = text, ""
        if len(texts) > 1 and not (number and int(number)):
            raise ValueError(f"of several texts each must be TEXT=N, read by N >= 1 of the streams; got {text!r}")
        name = Path(source).name.split(".")[0] or "text"
        if name in found:
            raise ValueError(f"texts must have names of their own, got {name} twice: rename one")
        found[name] = source, int(number) if number else None
    return found


def settings(args, texts: dict, bf16: bool) -> tuple[PretrainOptions, SpikeGPTConfig]:
    names = ("steps", "length", "learning_rate", "decay", "seed", "pairs")
    counted = [number for _, number in texts.values() if number]
    if counted and args.batch_size is not None:
        raise ValueError("--batch-size is for one text: of texts as TEXT=N, it is the sum of all N")
    values = {name: getattr(args, name) for name in names}
    if counted:
        values["batch_size"] = sum(counted)
    elif args.batch_size is not None:
        values["batch_size"] = args.batch_size
    options = PretrainOptions(bf16=bf16, **values)
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    if given and args.model:
        raise ValueError(f"{', '.join(given)}: sizes are for a new model; {args.model} has its own")
    spikes = spikes_of(args)
    if spikes.get("matrix_spikes") == "integer":
        spikes = {"token_shift": "rows"} | spikes
    sizes = {name: size for name, (size, _) in SIZES.items()} | given | spikes
    return options, SpikeGPTConfig(context_length=args.length, **sizes)


def spikes_of(args) -> dict:
    """What is said of what the matrices read."""
    return {name: getattr(args, name) for name in SPIKING if getattr(args, name) is not None}


def describe(corpora: dict[str, Corpus]) -> None:
    for text, corpus in corpora.items():
        facts = corpus.facts
        print(
            f"{text}: {facts['documents']:,} documents, without {facts['duplicates']:,} duplicates and "
            f"{facts['left_out']:,} that share 8 words in a row with an evaluation sentence"
        )
        for name in ("train", "validation"):
            print(f"{text}, {name}: {facts[name]['documents']:,} documents, {facts[name]['tokens']:,} tokens")


def new(config: SpikeGPTConfig, corpus: Corpus, seed: int) -> SpikeGPTForCausalLM:
    config.vocab_size = len(corpus.tokenizer)  # a small text may give fewer tokens than were asked for
    config.pad_token_id, config.eos_token_id = corpus.tokenizer.pad_token_id, corpus.tokenizer.eos_token_id
    torch.manual_seed(seed)
    return SpikeGPTForCausalLM(config)


def require_possible(config: SpikeGPTConfig, args) -> None:
    """Raise ValueError where what the matrices of --model read is not to be changed as it is said."""
    wanted = {name: value for name, value in spikes_of(args).items() if value != getattr(config, name)}
    possible = config.matrix_spikes == "none" and wanted.get("token_shift") != "channels"
    if wanted and not (possible and (args.matrix_spikes == "integer" or wanted.keys() == {"token_shift"})):
        asked = ", ".join(f"{name} {value}" for name, value in wanted.items())
        raise ValueError(
            f"{args.model} reads {'integer spikes' if config.matrix_spikes == 'integer' else 'real numbers'} with the "
            f"token shift of {config.token_shift}: --token-shift rows and --matrix-spikes integer (with levels and "
            f"powers of two) are how a model of real numbers is changed, got {asked}"
        )


def changed(model: SpikeGPTForCausalLM, corpus: Corpus, args) -> SpikeGPTForCausalLM:
    """`model` as the arguments say; scales of spikes are fitted on training text."""
    if args.token_shift == "rows" and model.config.token_shift != "rows":
        model = mix_rows(model)
    if args.matrix_spikes == "integer" and model.config.matrix_spikes == "none":
        ids, levels = rows_of(corpus.train, model.device), args.spike_levels or model.config.spike_levels
        model = calibrate(prepare(model, levels, wkv_powers_of_two=bool(args.wkv_powers_of_two), tokens=ids), ids)
    return model


def start(
    options: PretrainOptions, model: SpikeGPTForCausalLM, read: Read, teacher: SpikeGPTForCausalLM | None, args
) -> Pretraining:
    tokens = [(corpus.train, number) for corpus, number in read.values()]
    tokenizer = next(iter(read.values()))[0].tokenizer
    if teacher is not None:
        require_same_tokens(tokenizer, teacher.config, args.teacher)
    run = Pretraining(set_dropout(model, args.dropout), tokens, options, tokenizer, teacher)
    size = sum(p.numel() for p in model.parameters())
    epochs = ", ".join(f"{streams.per_epoch:,} of {name}" for name, streams in zip(read, run.streams))
    print(f"{size / 1e6:.2f} M parameters; an epoch is so many steps: {epochs}")
    if run.resume(args.output_dir):
        print(f"going on from step {run.step:,}")
    return run


def finish(run: Pretraining, read: Read, args) -> None:
    """The model, rounded to bfloat16, with its tokenizer, what was measured, the loss curve and a card."""
    folder, tokenizer = args.output_dir / "model", next(iter(read.values()))[0].tokenizer
    if run.model.config.matrix_spikes == "integer":
        centre(run.model, rows_of(some_of([corpus.train for corpus, _ in read.values()]), run.model.device))
    with whole_files(folder, last="pretraining.json") as temporary:
        rounded = save_rounded(run.model, temporary)
        tokenizer.save_pretrained(temporary)
        print("measuring on the validation text, beside a Kneser-Ney model of the training tokens ...")
        record = measured(run, rounded, read, args) | {"samples": samples(rounded, tokenizer)}
        write_json(temporary / "pretraining.json", record)
        write_log(run.log, temporary / "loss.csv")
        draw_loss(run.log, temporary / "loss.png")
        write_text(temporary / "README.md", card := language_model_card(record))
    print(f"\n{card}\nThe model is in {folder}:")
    print(f'  python recipes/generate.py --model {folder} --prompt "this film"')
    print(f"  python recipes/subj_finetune.py --model {folder}")


def measured(run: Pretraining, rounded: SpikeGPTForCausalLM, read: Read, args) -> dict:
    """What pretraining.json holds of a run and its rounded model."""
    ids = rows_of(some_of([corpus.validation for corpus, _ in read.values()]), rounded.device)
    everything = np.concatenate([corpus.train for corpus, _ in read.values()])[:KNESER_NEY_TOKENS]
    counted = KneserNey(everything, rounded.config.vocab_size)
    texts = {}
    for name, (corpus, number) in read.items():
        facts = corpus.facts["validation"]
        texts[name] = corpus.facts | {
            "streams": number,
            "model": perplexity(rounded, corpus.validation, facts),
            "kneser_ney": per_token_word_character(float(counted.nats(corpus.validation).mean()), facts),
        }
    return {
        "options": vars(run.options),
        "precision": name_of(run.options.bf16),  # of the training; what follows was measured in float32
        "config": {key: getattr(rounded.config, key) for key in ("vocab_size", "n_layer", "n_embd", *SPIKING)},
        "started_from": args.model,
        "datasets": [source for source, _ in streams_of(args.text).values() if hub_id(source)],
        "teacher": args.teacher,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "tokens": run.step * run.options.batch_size * run.options.length,
        "hours": run.seconds / 3600,
        "texts": texts,
        "firing": firing(rounded, ids),
        **matrices(rounded, ids),
        "log": run.log,
    }


def some_of(texts: list[np.ndarray]) -> np.ndarray:
    """As much of each text as of the others, 16,384 tokens or fewer in all."""
    return np.concatenate([tokens[: 16384 // len(texts)] for tokens in texts])


def samples(model: SpikeGPTForCausalLM, tokenizer) -> list[str]:
    """What the model writes after a document's end, one text a seed from 0 on."""
    written = []
    for seed in range(SAMPLES):
        set_seed(seed)
        prompt = torch.tensor([[tokenizer.eos_token_id]], device=model.device)
        sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": SAMPLE_TOKENS}
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), **sampling)
        written.append(tokenizer.decode(ids[0], skip_special_tokens=True).strip())
    return written


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


if __name__ == "__main__":
    sys.exit(command_line.run(main, STOPPED))
