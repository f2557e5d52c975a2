"""Counts cost.json again from graph, weights and recorded spikes, in other ways than the export.

Operations as executed are counted from what the interpreter gives with the recorded spikes, event-driven additions from
the spikes alone. Whole numbers and dense operations must be the same. Of products with what may be 0 (gates that are
all but shut, squared relus) stored counts must lie between those with and without what is next to 0, give or take NEAR:
what is 0 by one order of additions is 1e-9 by another, and export counted the event-driven form in float64, where a
spike can lie elsewhere. Not counted again: memory of the model's own parameters (footprint), zeros among all of its
matrices, what no matrix does (real_valued, from sizes), how the event-driven form compared with the model, and what
only earlier versions counted (EARLIER).
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np

from ..observe.books import as_json
from ..observe.operations import LayerCount, Operations, PopulationCount
from . import event_driven
from .bundle import Bundle
from .event_driven import EventDriven
from .findings import Findings
from .interpreter import Program

NEAR = 1e-2  # largest relative difference
NEXT_TO_0 = 1e-6  # of the largest value that a matrix reads
EARLIER = ("shortest", "table")  # of event_driven, in bundles of earlier versions
OWN = ("footprint", "connection_sparsity")  # of the model, not of the graph


def check_costs(bundle: Bundle, found: Findings) -> dict | None:
    """Add a problem for each count that is not what is counted here.

    Returns:
        not_recomputed: parts of earlier versions' cost.json that nothing is known of; None if there is none.
    """
    executed, form = bundle.cost.get("as_executed"), bundle.cost.get("event_driven")
    low, high = _count(bundle)
    between = (as_json(_operations(bundle, counts)) | _of(executed, *OWN) for counts in (low, high))
    _compare(found, "as_executed", executed, *between)
    earlier = [part for part in EARLIER if isinstance(form, Mapping) and part in form]
    if form is not None:
        counted = _event_driven(bundle, high, form)
        stored = {name: form[name] for name in form if name not in earlier} if earlier else form
        _compare(found, "event_driven", stored, counted, counted)
    if unknown := bundle.cost.keys() - {"as_executed", "event_driven"}:
        found.add(f"cost.json: {', '.join(sorted(unknown))} is unknown")
    return {"not_recomputed": [f"event_driven.{part}" for part in earlier]} if earlier else None


def _of(stored, *names: str) -> dict:
    """Some values of a stored object, as they are."""
    return {name: stored.get(name) for name in names} if isinstance(stored, Mapping) else {}


def _compare(found: Findings, place: str, stored, low, high) -> None:
    """Add a problem for each value of cost.json that does not lie between those counted here."""
    if isinstance(high, Mapping):
        if not isinstance(stored, Mapping) or stored.keys() != high.keys():
            found.add(f"cost.json: {place} must hold {', '.join(high)}")
            return
        for name, value in high.items():
            _compare(found, f"{place}.{name}", stored[name], low[name], value)
        return
    if isinstance(high, float) and isinstance(stored, float) and not place.rpartition(".")[2].startswith("dense"):
        right = low * (1 - NEAR) <= stored <= high * (1 + NEAR)
    else:
        right = stored == high
    if not right:
        found.add(f"cost.json: {place} is {stored!r}, counted from weights and spikes it is {high!r}")


def _count(bundle: Bundle) -> tuple[dict[str, Counter], dict[str, Counter]]:
    """Of each matrix, what it reads with the recorded spikes in place of the interpreter's: rows, values that are not 0
    ("active"), pairs of such a value and a weight that is not 0, and values that are none of -1, 0 and 1 ("real").

    Returns:
        counted without what is next to 0, and with it.
    """
    program, pool, low, high = Program(bundle.folder, np.float64), bundle.nodes[-1], {}, {}
    matrices = {node["name"]: node for node in bundle.nodes if node["op"] == "linear"}
    if pool["op"] == "pool":
        matrices["score"] = pool
    watch = {node["inputs"][0] for node in matrices.values()}
    nonzero = {name: (bundle.weights[node["weight"]] != 0).sum(axis=0) for name, node in matrices.items()}
    for rows, T in bundle.rows():
        teacher_forced = {name: trace["spikes"][rows, :T] for name, trace in bundle.traces.items()}
        ids, lengths = bundle.sentences["ids"][rows, :T], bundle.sentences["lengths"][rows]
        _, seen = program.run(ids, lengths, watch, teacher_forced)
        for name, node in matrices.items():
            x = seen[node["inputs"][0]]
            x = np.abs(_pooled(x, lengths, pool["kind"]) if node is pool else x[bundle.real[rows, :T]])
            for counts, least in ((low, NEXT_TO_0 * x.max()), (high, 0)):
                active = (x > least).sum(axis=0)
                counted = counts.setdefault(name, Counter())
                counted.update(rows=len(x), active=int(active.sum()), pairs=int(active @ nonzero[name]))
                counted["real"] += int(((x != 0) & (x != 1)).sum())
                _add_spikes(counted, x)
    return low, high


def _add_spikes(counted: Counter, x: np.ndarray) -> None:
    """What sizes `(rows, n)` of inputs add for integer spikes: digits that are 1, their sum, and the largest."""
    if not np.array_equal(x, np.floor(x)):
        counted["fractions"] += 1
        return
    whole, largest = x.astype(np.int64), counted["largest"]
    counted["largest"] = max(largest, int(whole.max(initial=0)))
    counted.update(ones=sum(int((whole >> j & 1).sum()) for j in range(16)), units=int(whole.sum()))


def _pooled(hidden: np.ndarray, lengths: np.ndarray, kind: str) -> np.ndarray:
    """What the classifier reads of hidden states `(B, T, n)`, zeros behind the ends."""
    last, mean = hidden[np.arange(len(hidden)), lengths - 1], hidden.sum(axis=1) / lengths[:, None]
    return {"last": last, "mean": mean, "last_mean": np.concatenate([last, mean], axis=1)}[kind]


def _operations(bundle: Bundle, counts: dict[str, Counter]) -> Operations:
    """What `cost.count_operations` gives, but for what is the model's own."""
    tokens, pool = int(bundle.real.sum()), bundle.nodes[-1]
    weights = {n["name"]: n["weight"] for n in bundle.nodes if n["op"] == "linear"}
    weights |= {"score": pool["weight"]} if pool["op"] == "pool" else {}
    layers, populations = {}, {}
    for name, count in counts.items():
        outputs, inputs = bundle.weights[weights[name]].shape
        pairs, binary = count["pairs"] / tokens, not count["real"]
        dense, density = count["rows"] * inputs * outputs / tokens, count["active"] / (count["rows"] * inputs)
        macs, acs = (0.0, pairs) if binary else (pairs, 0.0)
        layers[name] = LayerCount(inputs, outputs, dense, macs, acs, density, binary, *_spikes(count, outputs, tokens))
    for node in bundle.neurons:
        spikes = bundle.traces[node["name"]]["spikes"]
        outputs = tokens * spikes.shape[-1]
        populations[node["name"]] = PopulationCount(outputs, outputs - int(np.count_nonzero(spikes)))
    stated = bundle.cost.get("as_executed", {}).get("spikes", {}).get("real_valued") if bundle.integer else None
    return Operations(tokens, len(bundle.real), layers, populations, None, 0, real_valued=stated)


def _spikes(count: Counter, outputs: int, tokens: int) -> tuple:
    """The last fields of a LayerCount: largest spike, reads, plane and unary additions."""
    reads = count["active"] * outputs / tokens
    if count["fractions"]:
        return None, reads, None, None
    return count["largest"], reads, count["ones"] * outputs / tokens, count["units"] * outputs / tokens


def _event_driven(bundle: Bundle, counts: dict[str, Counter], stored) -> dict:
    """What `event_driven.counts` gives, and as stored how the form compared with the model."""
    program, tokens, events = EventDriven(bundle.folder, np.float32), int(bundle.real.sum()), {}
    spikes = {name: int(np.abs(trace["spikes"].astype(int)).sum()) for name, trace in bundle.traces.items()}
    for node in bundle.nodes:
        name, source = node["name"], node["inputs"][0]
        if name in program.forms:
            rows = program.forms[name]["columns"].shape[1]
            program.additions |= {(name, one): spikes[one] * rows for one in (program.embedding, *events[source])}
            program.rescaling["additions"] += tokens * (4 * rows + rows // 2 + len(events[source]) * rows)
            program.rescaling["products"] += tokens * 4 * rows
        elif node["op"] == "linear" and program.by_name[source]["op"] != "mix":
            rows = len(bundle.weights[node["weight"]])
            if source in spikes:
                program.additions[name, source] = spikes[source] * rows
            else:
                program.products[name] = counts[name]["active"] * rows
        elif name == "ln0":
            events[name] = []
        elif node["op"] == "add" and source in events:
            events[name] = [*events[source], node["inputs"][1]]
    return {**event_driven.counts(program, tokens), **_of(stored, "compared")}
