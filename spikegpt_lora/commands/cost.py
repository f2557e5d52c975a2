"""What a checkpoint does when it reads: firing rates, what each matrix is given, operations and energy a token.

    spikegpt_lora cost embedded
    spikegpt_lora cost runs/subj/spikelora/seed0 --file sentences.txt

MODEL is embedded, the folder of a language model, of a classifier or of an adapter, or a hub id. Without sentences it
reads the test split of the built-in subj-mini. Counted is what is executed, over real tokens alone, by NeuroBench's
definitions (spikegpt_lora/observe/operations.py); energy is these counts times published constants of 45 nm
(spikegpt_lora/observe/energy.py), never measured.
"""

import argparse
import json
import re
from collections import defaultdict
from itertools import product
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..checkpoint import load_classifier, load_with_adapter
from ..forward import run
from ..observe.adapters import AdapterActivity, observe_adapters
from ..observe.books import as_json
from ..observe.matrix_inputs import HEAD, by_kind, cells, matrix_inputs
from ..observe.operations import Operations, count_operations
from ..observe.traces import GATE
from ..report.markdown import table
from ..tasks.registry import load_task
from ..utils import command_line
from ..utils.errors import read_json
from ..utils.saved import saved_shapes
from .sentences import add_sentences, encoded, sentences_of


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    args = parse_arguments(arguments, prog)
    sentences, source = sentences_of(args), "given"
    if not sentences:
        sentences, source = load_task("subj-mini")["test"]["text"][:], "of subj-mini"
    command_line.set_up()
    model, tokenizer = load(args.model)
    starts = range(0, len(sentences), args.batch_size)
    batches = [encoded(tokenizer, sentences[i : i + args.batch_size], args.max_length) for i in starts]
    counted = count_operations(model, batches)
    if args.json:
        print(json.dumps(as_json(counted), indent=1))
        return 0
    title = f"# {args.model}: {counted.sentences:,} sentences {source}, {counted.tokens:,} tokens"
    parts = [title, firing(counted), table(HEAD, cells(by_kind(matrix_inputs(model, batches))), text=(0, 1))]
    parts += [adapters(model, batches), cost_tables({"as_executed": as_json(counted)})]
    if counted.left_out:
        parts.append(f"Not counted, so the totals are too small: {', '.join(counted.left_out)}.")
    print("\n\n".join(part for part in parts if part))
    return 0


def parse_arguments(arguments: list[str] | None, prog: str | None) -> argparse.Namespace:
    parser = command_line.parser(__doc__, prog)
    add = parser.add_argument
    add("model", metavar="MODEL", help="embedded, a folder, or a hub id")
    add_sentences(parser, "or else subj-mini's test split")
    add("--json", action="store_true", help="all counts, by layer and population, as cost.json of an export has them")
    return parser.parse_intermixed_args(arguments)  # options may stand before sentences


def load(source: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model at `source`, of either kind, and its tokenizer."""
    folder = Path(source)
    if (file := folder / "adapter_config.json").is_file():
        classifies = read_json(file).get("task_type") == "SEQ_CLS"
    else:
        classifies = folder.is_dir() and "score.weight" in saved_shapes(folder)
    return load_classifier(folder) if classifies else load_with_adapter(source)


def firing(counted: Operations) -> str:
    """Neurons and the share of their outputs that are not 0, by kind of population."""
    kinds = defaultdict(list)
    for name, population in counted.populations.items():
        kinds[kind_of(name)].append(population)
    rows = []
    for kind, ones in kinds.items():
        outputs, zeros = sum(one.outputs for one in ones), sum(one.zeros for one in ones)
        rows.append([kind, f"{outputs / counted.tokens:,.0f}", f"{100 * (1 - zeros / outputs):.1f}"])
    return table(["spikes of", "neurons", "firing %"], rows)


def kind_of(population: str) -> str:
    """What populations of all blocks are called together."""
    return "adapter gates" if GATE in population else re.sub(r"^blocks\.\d+\.", "", population)


def adapters(model: nn.Module, batches: list) -> str | None:
    """What the adapters do meanwhile, as a sentence; None where there are none."""
    with observe_adapters(model) as seen:
        for batch in batches:
            run(model, batch)
    if (found := seen.activity()) is None:
        return None
    said = [f"{100 * share:.1f} % of {what}" for share, what in _shares(found) if share is not None]
    if found.contribution is not None:
        said.append(f"the norm of what they add is {found.contribution:.3f} of that of W0 x")
    return f"Adapters: {'; '.join(said)}."


def _shares(found: AdapterActivity) -> list[tuple[float | None, str]]:
    return [(found.sparsity, "the gates' outputs are 0"), (found.dead_ranks, "the rank units never fire")]


def cost_tables(cost: dict) -> str:
    """What cost.json of a bundle holds: "as_executed" (of `books.as_json`) and, where it was counted, the event-driven
    form beside it, never added."""
    done = cost["as_executed"]
    energy = done["arithmetic_energy"]
    rows = [
        ["as executed: dense MACs", [done["dense_macs"]], energy["dense_fp32"], done["memory_energy"]],
        ["as executed: effective MACs", [done["effective_macs"]], energy["effective_fp32"], None],
        ["as executed: effective ACs", [done["effective_acs"]], None, None],
        ["dense int8 MACs, for comparison", [done["dense_macs"]], energy["dense_int8"], None],
    ]
    if form := cost.get("event_driven"):
        counts = [form["additions"], form["products"], sum(form["rescaling"].values())]
        what = "event-driven form: additions, products, rescaling"
        rows.append([what, counts, form["arithmetic_energy"]["fp32"], form["memory_energy"]])
        rows.append(["of these additions, the embedding's", [form["embedding_additions"]], None, None])
    cells = []
    for name, counts, arithmetic, memory in rows:
        places = [None, None] if memory is None else [memory["sram_1_mib"], memory["dram"]]
        cells.append([name, " + ".join(f"{count:,.0f}" for count in counts), *map(micro, [arithmetic, *places])])
    head = ["operations", "a token", "arithmetic, uJ", "weights from 1 MiB SRAM, uJ", "from DRAM, uJ"]
    tables = [table(head, cells)] + ([integer_costs(done["spikes"])] if "spikes" in done else [])
    return "\n\n".join([*tables, "Energy: counts times published constants of 45 nm, never measured."])


def integer_costs(spikes: dict) -> str:
    """What integer spikes cost in the blocks, with weight reads, beside an int8 engine: by place and tokens a read."""
    blocks, rows = spikes["blocks"], []
    for place, tokens in product(blocks["energy"], ("1", "8")):
        energy = blocks["energy"][place][tokens]
        kinds = [energy.get(kind) for kind in ("spiking", "dense_int8", "skipping_int8")]
        density = energy.get("break_even")
        rows.append([place, tokens, *map(micro, kinds), "" if density is None else f"{100 * density:.1f}"])
    shares = [blocks[f"{kind}_share"] for kind in ("weight_reads", "plane_additions", "unary_additions")]
    said = ["none, a matrix reads real numbers" if share is None else f"{share:.3f}" for share in shares]
    head = [
        "weights in",
        "tokens a read",
        "spiking, uJ",
        "dense int8, uJ",
        "skipping zeros, uJ",
        "break-even, % nonzero",
    ]
    return (
        f"Blocks, of their {blocks['dense']:,.0f} dense products a token: weight reads {said[0]}, additions of bit "
        f"planes {said[1]}, of unary spikes {said[2]}. What stays real-valued beside the matrices: "
        f"{micro(spikes['real_valued_energy'])} uJ (fp32).\n\n" + table(head, rows)
    )


def micro(energy: float | None) -> str:
    """pJ as microjoules."""
    return "" if energy is None else f"{energy / 1e6:,.2f}"
