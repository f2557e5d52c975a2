"""What a model would cost in the event-driven form of `interpreter.EventDriven`: counted while it runs, in float64.

This column stands beside the operations as executed and is never added to them. Counts are per real token:

    additions           columns of matrices added where neurons spiked, one for each of their rows
    products            what reads no spikes: att.output, ffn.value (zeros skipped), B of graded gates
    rescaling           additions and products, no event decides about them: mean and deviation of the layer norms, now
                        for every row of the matrices behind them (as executed they are for every channel, and not
                        counted), and adding up what populations, now and then give
    weight_reads        of 32 bit: every addition and product reads one value of a matrix or, rescaling, of a vector;
                        a dense product reads each weight once a token, so with a batch of one this compares
    arithmetic_energy   pJ: "fp32"; "int8" would be with columns rounded to int8, which are W times the gains of a layer
                        norm and the shares of the token shift, and were not rounded here. Rescaling is fp32 in both.
"""

import numpy as np

from ..observe.operations import ENERGY, memory_energy
from .interpreter import EventDriven


def counts(program: EventDriven, tokens: int) -> dict:
    """What `program` did in `tokens` tokens, by layer and in total."""
    layers = {name: {"additions": 0.0, "products": made / tokens} for name, made in program.products.items()}
    embedding = program.by_name["ln0"]["inputs"][0]
    for (reader, _), made in program.additions.items():
        for name, share in _shares(program, reader):
            layers.setdefault(name, {"additions": 0.0, "products": 0.0})["additions"] += share * made / tokens
    additions, products = (sum(layer[kind] for layer in layers.values()) for kind in ("additions", "products"))
    rescaling = {kind: made / tokens for kind, made in program.rescaling.items()}
    rescaled = rescaling["additions"] * ENERGY["fp32_add"] + rescaling["products"] * ENERGY["fp32_multiply"]
    reads = additions + products + rescaling["products"]
    return {
        "additions": additions,
        "products": products,
        "rescaling": rescaling,
        "embedding_additions": sum(made for (_, of), made in program.additions.items() if of == embedding) / tokens,
        "layers": layers,
        "weight_reads": reads,
        "memory_energy": memory_energy(reads),
        "arithmetic_energy": {
            "fp32": additions * ENERGY["fp32_add"] + products * ENERGY["fp32_mac"] + rescaled,
            "int8": additions * ENERGY["int32_add"] + products * ENERGY["int8_mac"] + rescaled,  # sums are wide
        },
    }


def _shares(program: EventDriven, reader: str) -> list[tuple[str, float]]:
    """Of additions counted for a layer norm, the linear layers behind it and their share of the rows."""
    if reader not in program.readers:
        return [(reader, 1.0)]
    rows = {name: len(program.weights[weight]) for name, _, weight in program.readers[reader]}
    return [(name, size / sum(rows.values())) for name, size in rows.items()]


def table(program: EventDriven) -> dict:
    """The way round the embedding's additions: one row for each token of the vocabulary, in place of its spikes.

    Returns:
        values: in the table, float32 each. reads: of them a token, in place of `embedding_additions`.
    """
    embedding = program.weights[program.by_name[program.by_name["ln0"]["inputs"][0]]["weight"]]
    rows = sum(form["columns"].shape[1] for form in program.forms.values())
    return {"values": len(embedding) * rows, "reads": rows}


def measure(folder, compare) -> dict:
    """The event-driven form of a bundle, and what makes it smaller.

    Args:
        compare: runs a program on the bundle's sentences beside the model, and returns how they compare.
    """
    plain, shortest = EventDriven(folder, np.float64), EventDriven(folder, np.float64, shortest=True)
    compared = compare(plain, "event-driven form"), compare(shortest, "event-driven form, shortest")
    tokens = compared[0]["tokens"]
    small = counts(shortest, tokens)
    del small["layers"]
    small["kept"] = sum(len(total) for total in shortest.totals.values())  # sums read and written again every token
    return {
        **counts(plain, tokens),
        "compared": compared[0],
        "shortest": small | {"compared": compared[1]},
        "table": table(plain),
    }
