"""What `count_operations` counted as plain numbers, for cost.json and for tables: layers, totals, energy."""

from dataclasses import asdict

from .energy import ENERGY, arithmetic_energy, memory_energy, real_valued_energy, with_reads
from .operations import LayerCount, Operations

COUNTS = ("weight_reads", "plane_additions", "unary_additions")
OF_SPIKES = ("largest_spike", *COUNTS)  # of a LayerCount


def totals(operations: Operations, blocks: bool = False) -> dict:
    """What reads and additions come to per real token, of all matrices or of those of the blocks alone: dense (pairs of
    an input and a row), the three counts and their share of it, energy in pJ (`energy.with_reads`).

    The additions, and with them what spikes would cost, are None where a matrix reads real numbers.
    """
    layers = [one for name, one in operations.layers.items() if not blocks or name.startswith("blocks.")]
    dense, reads = sum(one.dense_macs for one in layers), sum(one.weight_reads for one in layers)
    integer = all(one.spikes == "integer" for one in layers)
    planes, unary = (
        sum(getattr(one, f"{code}_additions") for one in layers) if integer else None for code in ("plane", "unary")
    )
    found: dict = {"dense": dense, "weight_reads": reads, "plane_additions": planes, "unary_additions": unary}
    for name in COUNTS:
        found[f"{name}_share"] = None if found[name] is None or not dense else found[name] / dense
    return found | {"energy": with_reads(dense, reads, planes)}


def spikes_json(operations: Operations) -> dict:
    """The counts that concern integer spikes, as plain numbers: by layer, and the totals of blocks and of all."""
    layers = {
        name: {"spikes": one.spikes} | {key: getattr(one, key) for key in OF_SPIKES}
        for name, one in operations.layers.items()
    }
    found = {"layers": _in_order(layers), "blocks": totals(operations, blocks=True), "all": totals(operations)}
    if (parts := operations.real_valued) is None:
        return found
    return found | {"real_valued": parts, "real_valued_energy": real_valued_energy(parts)}


def as_json(operations: Operations) -> dict:
    """Plain numbers for cost.json, names in order; operations per real token, energy in pJ per real token. Of a model
    whose matrices read integer spikes `spikes_json` too."""
    dense, macs, acs = operations.dense_macs, operations.effective_macs, operations.effective_acs
    executed, baseline = arithmetic_energy(macs, acs), arithmetic_energy(dense, 0)
    populations = {n: asdict(p) | {"sparsity": p.sparsity} for n, p in operations.populations.items()}
    return {
        "tokens": operations.tokens,
        "sentences": operations.sentences,
        "dense_macs": dense,
        "effective_macs": macs,
        "effective_acs": acs,
        "activation_sparsity": operations.activation_sparsity,
        "connection_sparsity": operations.connection_sparsity,
        "footprint": operations.footprint,
        "left_out": list(operations.left_out),
        "layers": _in_order({name: _of_layer(layer) for name, layer in operations.layers.items()}),
        "populations": _in_order(populations),
        "arithmetic_energy": {
            "effective_fp32": executed["fp32"],
            "dense_fp32": baseline["fp32"],
            "dense_int8": baseline["int8"],
        },
        "weight_reads": dense,  # with a batch of one, each weight once a token
        "memory_energy": memory_energy(dense),
        "constants": dict(ENERGY),
        **({} if operations.real_valued is None else {"spikes": spikes_json(operations)}),
    }


def _of_layer(layer: LayerCount) -> dict:
    return {key: value for key, value in asdict(layer).items() if key not in OF_SPIKES}


def _in_order(named: dict) -> dict:
    """By name, block 10 after block 9."""
    return dict(sorted(named.items(), key=lambda item: [p.zfill(9) if p.isdigit() else p for p in item[0].split(".")]))
