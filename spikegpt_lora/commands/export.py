"""From a fine-tuned SpikeGPT to a neuromorphic bundle, checked in outside simulators, with pictures and costs.

    spikegpt_lora export runs/subj/spikelora/seed0 --data-dir FOLDER_WITH_SUBJ
    spikegpt_lora export check BUNDLE            (the same as python -m spikegpt_lora.export)
    spikegpt_lora export event-driven BUNDLE

It takes what recipes/subj_finetune.py left behind (a model's folder, or an adapter's, which names its base model) and
leaves in --output-dir:

    bundle/        graph, weights, NIR islands, spikes, events, costs, manifest (spikegpt_lora/export/bundle.py)
    check.json     what its check found, and check.txt the same in words; with --accuracy, accuracy.json
    pictures/      raster.png firing.png sparsity.png cost.png
    summary.md     what was found: check, spikes, costs, accuracy

Given again after it was stopped, the same command goes on with the bundle that is there.
`check` checks a bundle again, anywhere, without the model; --help of it says more. Simulators that are
not installed are not asked: pip install "spikegpt_lora[export]".
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..checkpoint import load_classifier
from ..export import (
    WEIGHTS,
    Bundle,
    batches_by_length,
    check_bundle,
    draw_all,
    export_bundle,
    first_difference,
    summary,
    write_results,
)
from ..export.__main__ import main as of_bundle
from ..report.markdown import table
from ..tasks.registry import TASKS, labels_of, load_task
from ..utils import command_line, files
from .cost import cost_tables, kind_of
from .sentences import encoded, read_sentences

OF_BUNDLE = ("check", "event-driven")
STOPPED = "stopped; the same command goes on from here."


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    if arguments and arguments[0] in OF_BUNDLE:
        return of_bundle(arguments, prog or "export")
    args = parse_arguments(arguments, prog)
    command_line.set_up()
    return export(args)


def parse_arguments(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = command_line.parser(__doc__, prog)
    add = parser.add_argument
    add("model", type=Path, help="folder of a fine-tuned classifier or of its adapter")
    add("--data-dir", type=Path, help="folder with Subj, CoLA or RTE; else SPIKEGPT_LORA_DATA, else the hub")
    named = f"whose test sentences are read: {', '.join(TASKS)}, a file, a folder or a hub id"
    add("--task", type=command_line.utf8, default="subj", help=named)
    add("--text", type=Path, help="read this file instead, a sentence a line")
    add("--sentences", type=command_line.positive, default=200, help="the first so many")
    add("--weights", choices=WEIGHTS, default="float32", help="int8: times powers of two")
    add("--event-driven", action="store_true", help="count the event-driven form too (some 30 ms a token)")
    add("--accuracy", action="store_true", help="let the interpreter read the whole test split with these weights")
    add("--max-length", type=command_line.positive, default=128, help="tokens a sentence")
    add("--output-dir", type=Path, help="results go here (default: MODEL/export-WEIGHTS)")
    args = parser.parse_args(arguments)
    if args.text and args.accuracy:
        parser.error("--accuracy needs labels, and --text has none: leave one of them out")
    return args


def export(args) -> int:
    out = args.output_dir or args.model / f"export-{args.weights}"
    model, tokenizer = load_classifier(args.model)
    texts, labels = sentences(args, model.config.num_labels)
    shown = slice(0, args.sentences)
    batch = encode(tokenizer, texts[shown], labels[shown], args.max_length)
    with files.locked(out):
        bundle = bundle_of(args, model, batch, tokenizer, out / "bundle")
        results = check_bundle(bundle.folder, bar)
        checked = summary(results)
        write_results(results, checked, out)
        parts = [f"# {args.model}, {args.weights}", checked]
        if results["passed"]:
            draw_all(bundle, out / "pictures")
            parts += [spikes(bundle), cost_tables(bundle.cost)]
            if args.accuracy:
                counted = accuracy(model, bundle, tokenizer, texts, labels, args.max_length)
                files.write_json(out / "accuracy.json", counted)
                parts.append(
                    "Accuracy on all {sentences:,} test sentences: the model {model:.2f} %, the interpreter with the "
                    "bundle's weights {bundle:.2f} %; {same:.2f} % of the answers are the same.".format(**counted)
                )
        files.write_text(out / "summary.md", "\n\n".join(parts) + "\n")
    print("\n" + (out / "summary.md").read_text(encoding="utf-8"))
    print(f"Written to {out}: bundle/, check.json, check.txt, pictures/, summary.md.")
    return 0 if results["passed"] else 1


def bundle_of(args, model, batch, tokenizer, folder: Path) -> Bundle:
    """The bundle in `folder`, written now, or by an earlier run of the same command that did not get to its end."""
    if not folder.exists():
        return Bundle(export_bundle(model, batch, folder, tokenizer, args.weights, args.event_driven, bar))
    elsewhere = "give another --output-dir, or delete it"
    try:
        bundle = Bundle(folder)
        other = first_difference(bundle, model, batch, args.weights, args.event_driven)
    except ValueError as error:
        raise ValueError(f"{folder} cannot be gone on with ({error}): {elsewhere}") from error
    if other:
        raise ValueError(f"{folder} holds other {other} than this command would write: {elsewhere}")
    print(f"{folder} is there already; going on with its check.")
    return bundle


def bar(rounds: list, text: str):
    return tqdm(rounds, desc=text, leave=False, disable=None)


def sentences(args, classes: int) -> tuple[list[str], list[int]]:
    """What is read and its labels, -1 where it has none; raises ValueError for a task of other than `classes`."""
    if args.text is None:
        data = load_task(args.task, args.data_dir)
        if (found := len(labels_of(data))) != classes:
            raise ValueError(f"--task {args.task} has {found} classes and {args.model} {classes}: name the model's own")
        return list(data["test"]["text"]), list(data["test"]["label"])
    texts = read_sentences(args.text)
    return texts, [-1] * len(texts)


def encode(tokenizer, texts: list[str], labels: list[int], max_length: int):
    batch = encoded(tokenizer, texts, max_length)
    batch["labels"] = torch.tensor(labels)
    return batch


def spikes(bundle: Bundle) -> str:
    """Spikes a token and a sentence, by kind of population."""
    manifest, rows, kinds = bundle.manifest, [], {}
    for one in manifest["populations"]:
        kinds.setdefault(kind_of(one["name"]), []).append(one)
    length = manifest["tokens"] / manifest["sentences"]
    for kind, ones in kinds.items():
        a_token, units = sum(one["spikes_per_token"] for one in ones), sum(one["n"] for one in ones)
        fired = 100 * sum(one["firing_rate"] * one["n"] for one in ones) / units
        rows.append([kind, f"{units:,}", f"{fired:.1f}", f"{a_token:.1f}", f"{length * a_token:,.0f}"])
    return table(["spikes of", "neurons", "firing %", "a token", "a sentence"], rows)


@torch.no_grad()
def accuracy(model, bundle: Bundle, tokenizer, texts: list[str], labels: list[int], max_length: int) -> dict:
    """The whole test split, read by the model as it was and by the interpreter with the bundle's weights."""
    batch, right, wanted = encode(tokenizer, texts, labels, max_length), [0, 0, 0], np.array(labels)
    for rows, part in bar(batches_by_length(batch, 64), "accuracy"):
        ids, lengths = part["input_ids"].numpy(), part["attention_mask"].sum(1).numpy()
        theirs = model(**part).logits.numpy().argmax(axis=1)
        ours = bundle.program.run(ids, lengths)[0].argmax(axis=1)
        for i, correct in enumerate((theirs == wanted[rows], ours == wanted[rows], ours == theirs)):
            right[i] += int(correct.sum())
    shares = {name: 100 * n / len(wanted) for name, n in zip(("model", "bundle", "same"), right)}
    return {"sentences": len(wanted), **shares}
