"""Make a language model spike before every matrix: a SpikeGPT and some text in, one that reads integer spikes out.

Fits the scales of its neurons to the text, measures on other text what each part costs in nats a token, and leaves a
folder that from_pretrained, generate.py, pretrain.py --model and subj_finetune.py --model take, with its report in
convert.json and README.md. --steps trains it further, spikes on. Stop it whenever you like, with Ctrl-C or SIGTERM: the
same command goes on where it was.

How it works, and what it costs: spikegpt_lora/convert/README.md.
"""

import argparse
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: see "A busy machine" in README.md

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from spikegpt_lora import SpikeGPTForCausalLM, load_upstream_checkpoint
from spikegpt_lora.checkpoint import UPSTREAM_TOKENIZERS, load_language_model, load_tokenizer, require_same_tokens
from spikegpt_lora.convert.calibrate import TOKENS, calibrate, centre
from spikegpt_lora.convert.cost import cost, costs
from spikegpt_lora.convert.saliency import SCORES, binary_neurons, give_levels
from spikegpt_lora.convert.spiking import prepare, require_convertible
from spikegpt_lora.observe.books import totals
from spikegpt_lora.observe.operations import count_operations
from spikegpt_lora.ops.backend import use_extension
from spikegpt_lora.ops.dropout import set_dropout
from spikegpt_lora.pretrain.corpus import Corpus, add_left_out, evaluation_sentences, prepare_corpus
from spikegpt_lora.pretrain.loop import Pretraining, PretrainOptions, bf16_of
from spikegpt_lora.pretrain.perplexity import STREAMS, token_losses
from spikegpt_lora.pretrain.progress import STOPPED, bar, train
from spikegpt_lora.report.cards import USE, language_model_head
from spikegpt_lora.report.markdown import table
from spikegpt_lora.utils import command_line
from spikegpt_lora.utils.errors import read_json
from spikegpt_lora.utils.files import locked, whole_files, write_json, write_text
from spikegpt_lora.utils.precision import name_of, resolve
from spikegpt_lora.utils.saved import weights_digest

LENGTH = 256  # of the rows that scales are fitted on
COUNTED = 8192  # tokens that nonzero inputs are counted on
# What the conversion depends on, beside model and text.
OPTIONS = ("spike_levels", "ffn_levels", "wkv_powers_of_two", "saliency", "share", "factor", "tokens", "seed")


@dataclass
class Conversion:
    """A converted model, the loss of the float model on each measured token, and what convert.json says."""

    model: SpikeGPTForCausalLM
    of_float: torch.Tensor
    record: dict


def main() -> int:
    args = parse_arguments()
    command_line.set_up()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve(args.precision, device, bf16_of(args.output_dir))
    options = training(args, precision.bf16)
    model, tokenizer = load(args)
    require_convertible(model)
    sentences = evaluation_sentences(args.decontaminate, args.data_dir)
    with locked(args.output_dir):
        corpus = prepare_corpus(args.text, args.output_dir / "corpus", tokenizer, sentences, bar)
        use_extension("auto", device)  # built now: no log line breaks a progress bar
        conversion = convert(model.to(device), corpus, args)
        if options is not None:
            print(precision)
            teach(conversion, model if args.teacher else None, corpus, options, args)
    folder = args.output_dir / "model"
    print(f"\n{(folder / 'README.md').read_text(encoding='utf-8')}\nThe model is in {folder}:")
    print(f'  python recipes/generate.py --model {folder} --prompt "this film"')
    print(f"  python recipes/subj_finetune.py --model {folder}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    add = parser.add_argument
    add("model", help="embedded, the folder of a saved language model, an upstream .pth file, or a hub id")
    add("text", help="a file (a document a line; .xz too), a folder of them, or a hub dataset's id")
    add("--output-dir", default=Path("runs/convert"), type=Path, help="everything goes here")
    add("--tokenizer", help="of a .pth file: a folder or hub id (default: upstream's, for its published model)")
    add_left_out(add)
    add = parser.add_argument_group("spikes").add_argument
    add("--spike-levels", default=3, type=command_line.positive, metavar="K", help="the largest integer spike")
    add("--ffn-levels", type=command_line.positive, metavar="K", help="before ffn.value (default: as everywhere)")
    add("--wkv-powers-of-two", action="store_true", help="no exp in WKV")
    add("--saliency", choices=SCORES, help="some channels get more levels, chosen so (default: none does)")
    add("--share", default=0.1, type=command_line.number("in (0, 1]"), help="of the channels, with --saliency")
    add("--factor", default=2, type=command_line.positive, help="times the levels, with --saliency")
    add("--tokens", default=4 * TOKENS, type=command_line.positive, help="of training text that scales are fitted on")
    add("--measure-tokens", default=32768, type=int, help="of validation text; 0: all of it")
    add = parser.add_argument_group("training").add_argument
    add("--steps", default=0, type=int, help="how many, spikes on; the last half is the decay")
    add("--teacher", action="store_true", help="train towards what the float model gives to each next token")
    add("--batch-size", default=16, type=int, help="streams of text read side by side")
    add("--length", default=128, type=int, help="tokens a step and stream")
    add("--learning-rate", default=1e-3, type=float, help="before the decay")
    add("--dropout", default=0.0, type=command_line.number("in [0, 1)"), help="after each block")
    add("--seed", default=0, type=command_line.seed, help="of random channels, order and dropout")
    add("--save-minutes", default=5.0, type=command_line.number(">= 0"), help="between saves")
    command_line.add_precision(add)
    return parser.parse_args()


def training(args, bf16: bool) -> PretrainOptions | None:
    if args.measure_tokens < 0:
        raise ValueError(f"--measure-tokens must be >= 0, got {args.measure_tokens}")
    if args.steps == 0 and args.teacher:
        raise ValueError("--teacher needs --steps: without training there is nothing to be taught")
    if args.steps == 0:
        return None
    names = ("steps", "batch_size", "length", "learning_rate", "seed")
    return PretrainOptions(bf16=bf16, warmup=20, decay=0.5, **{name: getattr(args, name) for name in names})


def load(args) -> tuple[SpikeGPTForCausalLM, PreTrainedTokenizerBase]:
    """The float model and its tokenizer."""
    if not args.model.endswith(".pth") and args.model not in UPSTREAM_TOKENIZERS:
        if args.tokenizer:
            raise ValueError(f"--tokenizer is for a .pth file: {args.model} has its own")
        return load_language_model(args.model)
    if (source := args.tokenizer or UPSTREAM_TOKENIZERS.get(args.model)) is None:
        raise ValueError(f"{args.model} has no tokenizer: name its folder or hub id with --tokenizer")
    model, tokenizer = load_upstream_checkpoint(args.model), load_tokenizer(source)
    require_same_tokens(tokenizer, model.config, args.model)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {source} has no token for a document's end (eos_token): name another one")
    return model, tokenizer


def convert(model: SpikeGPTForCausalLM, corpus: Corpus, args) -> Conversion:
    """What `args.output_dir` holds of this conversion, or a new one, which is written there."""
    folder = args.output_dir / ("converted" if args.steps else "model")
    measured = corpus.validation[: args.measure_tokens or None]
    made_of = {"weights": weights_digest(model), "text": corpus.facts["key"]}
    made_of |= {name: getattr(args, name) for name in OPTIONS} | {"measured": len(measured)}
    if (folder / "convert.json").is_file():
        record = read_json(folder / "convert.json", keys=("made_of", "float"))
        if record["made_of"] == made_of and "training" not in record:
            print(f"converted already: {folder}")
            converted = load_language_model(str(folder))[0].to(model.device)
            return Conversion(converted, token_losses(model, measured) if args.steps else torch.empty(0), record)
    ids = rows_of(corpus.train[: args.tokens]).to(model.device)
    prepared = spiking(model, ids, args)
    converted = calibrate(spiking(model, ids, args), ids)
    of_float = token_losses(model, measured)
    found = costs(prepared, converted, measured, of_float, lambda rows: bar(rows, "measuring what parts cost"))
    record = {"made_of": made_of, "started_from": args.model, **facts_of(converted, corpus)}
    record |= {"float": float(of_float.double().mean()), "costs": [asdict(one) for one in found]}
    write(converted, corpus, record, folder)
    return Conversion(converted, of_float, record)


def rows_of(tokens: np.ndarray) -> torch.Tensor:
    length = min(LENGTH, len(tokens))
    return torch.from_numpy(tokens[: len(tokens) // length * length].astype(np.int64)).view(-1, length)


def spiking(model: SpikeGPTForCausalLM, ids: torch.Tensor, args) -> SpikeGPTForCausalLM:
    """`model` prepared, with levels for every channel."""
    prepared = prepare(model, args.spike_levels, args.ffn_levels, args.wkv_powers_of_two, ids)
    if args.saliency:
        give_levels(prepared, ids, args.saliency, args.share, args.factor, args.seed)
    return prepared


def facts_of(model: SpikeGPTForCausalLM, corpus: Corpus) -> dict:
    """What convert.json holds of the model itself: its size, and how many inputs of its matrices are not 0."""
    ids = rows_of(corpus.validation[:COUNTED]).to(model.device)
    counted = count_operations(model, [{"input_ids": part} for part in ids.split(8)])
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "binary_neurons": binary_neurons(model),
        "nonzero": {name: layer.input_density for name, layer in counted.layers.items()},
        "reads": totals(counted, blocks=True)["weight_reads_share"],
    }


def teach(conversion: Conversion, teacher: SpikeGPTForCausalLM | None, corpus: Corpus, options, args) -> None:
    """Train the converted model, spikes on, and write it with what was measured afterwards."""
    model = set_dropout(conversion.model, args.dropout).train()
    run = Pretraining(model, corpus.train, options, corpus.tokenizer, teacher)
    if run.resume(args.output_dir):
        print(f"going on from step {run.step:,}")
    train(run, args.output_dir, 60 * args.save_minutes)
    centre(run.model, rows_of(corpus.train[: args.tokens]))
    losses = token_losses(run.model, corpus.validation[: args.measure_tokens or None])
    of_training = {"options": asdict(options), "precision": name_of(options.bf16), "teacher": teacher is not None}
    of_training |= {"hours": run.seconds / 3600, "log": run.log}
    of_training |= asdict(cost("after training", losses, conversion.of_float))
    record = conversion.record | facts_of(run.model, corpus) | {"training": of_training}
    write(run.model.eval(), corpus, record, args.output_dir / "model")


def write(model: SpikeGPTForCausalLM, corpus: Corpus, record: dict, folder: Path) -> None:
    """The model in float32 with its tokenizer, what was measured, and a card; convert.json, last, says it is whole."""
    with whole_files(folder, last="convert.json") as temporary:
        model.save_pretrained(temporary)
        corpus.tokenizer.save_pretrained(temporary)
        write_text(temporary / "README.md", card(record))
        write_json(temporary / "convert.json", record)


def card(record: dict) -> str:
    made, rows = record["made_of"], record["costs"]
    levels = f"-{made['spike_levels']} ... {made['spike_levels']}"
    of_ffn = made["ffn_levels"] or made["spike_levels"]
    salient = f"; {made['share']:.0%} of the channels have {made['factor']} times as many, by {made['saliency']}"
    sections = [
        language_model_head(record["started_from"]),
        f"# SpikeGPT whose matrices read integer spikes, made of {record['started_from']}",
        f"{record['parameters'] / 1e6:.2f} M parameters, {record['binary_neurons']:,} binary neurons: spikes of "
        f"{levels} before every matrix, squares of 0 ... {of_ffn} before ffn.value{salient * bool(made['saliency'])}. "
        f"Made by recipes/convert.py; scales fitted on {made['tokens']:,} tokens. All figures are in convert.json.",
        USE,
        f"Nats a token above the float model's {record['float']:.4f}, on the same {made['measured']:,} validation "
        f"tokens (standard error over {STREAMS} streams of text):",
        table(["what spikes", "nats", "standard error"], [_row(one) for one in [*rows, *_trained(record)]]),
        f"Share of the inputs of each matrix that are not 0; weighted by its rows they are weight reads, in the blocks "
        f"{record['reads']:.3f} of a dense model's:",
        table(["matrix", "not 0"], [[name, f"{share:.3f}"] for name, share in record["nonzero"].items()]),
    ]
    if "training" in record:
        done, options = record["training"], record["training"]["options"]
        towards = "towards the float model" if done["teacher"] else "on the text"
        sections.insert(
            3,
            f"Trained {towards} with spikes on: {options['steps']:,} steps of {options['batch_size']} x "
            f"{options['length']} tokens, rate {options['learning_rate']:g}, in {done['precision']}, "
            f"{done['hours']:.2f} hours.",
        )
    return "\n\n".join(sections) + "\n"


def _row(one: dict) -> list[str]:
    return [one["part"], f"{one['nats']:+.4f}", f"{one['error']:.4f}"]


def _trained(record: dict) -> list[dict]:
    return [record["training"]] if "training" in record else []


if __name__ == "__main__":
    sys.exit(command_line.run(main, STOPPED))
