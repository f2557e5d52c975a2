"""Reruns a bundle: in the interpreter, and each island in the simulators that are installed.

Interpreter: with the recorded spikes it gives the recorded currents. From token ids alone it gives the recorded spikes
    and logits; in float32 a rounding may flip a spike that lies at its threshold, and what follows it differs: such
    sentences are counted, and the first difference of each must lie within MARGIN of the threshold.
Simulators: run the islands on the recorded currents; every spike must be the recorded one. Islands with weights get
    what the matrix reads and do the product themselves; a neuron whose first difference lies within MARGIN of the
    threshold is counted as rounding. Integer neurons are populations there, whose integers must be the recorded ones;
    paths get their currents, and do population, matrix and neurons behind it themselves. Before, each simulator has to
    get an island and a path wrong that are wrong on purpose (`simulators.self_test`, `self_test_integers`).

An exponent of WKV with powers of two is a rounded number too, and no spike: where one lies within MARGIN of a rounding,
what its sentence does from then on may differ, and is counted.
"""

import numpy as np

from . import simulators
from .bundle import Bundle
from .files import INTEGER, path_to
from .findings import Findings
from .graph import weights_before
from .interpreter import LN2
from .islands import no_island
from .simulators import run_neurons

MARGIN = 1e-5  # of a membrane from its threshold
KINDS = ("neurons", "with_weights", "integers", "paths")  # of islands; the last two of bundles of integer models
CLOSE = 1e-4  # of currents and logits in float32 by two ways, in units of their root mean square, 1 at least


def check_interpreter(bundle: Bundle, found: Findings) -> dict:
    sentences = bundle.sentences
    counts = {"dtype": "float32", "sentences": len(sentences["ids"]), "sentences_with_a_flip": 0}
    counts |= {"farthest_first_flip": 0.0, "different_predictions": 0}
    exponents = [node["inputs"][0] for node in bundle.nodes if node["op"] == "wkv_powers_of_two"]
    if exponents:
        counts["sentences_with_a_rounded_exponent"] = 0
    for rows, T in found.progress(list(bundle.rows()), "interpreter"):
        ids, lengths, real = sentences["ids"][rows, :T], sentences["lengths"][rows], bundle.real[rows, :T, None]
        names = [node["inputs"][0] for node in bundle.neurons] + exponents
        logits, teacher_forced = _teacher_forced(bundle, rows, T, names)
        since = _rounded_exponent([teacher_forced[name] for name in exponents], lengths)
        for i in np.flatnonzero(~_close(logits, sentences["logits"][rows]).all(axis=1) & (since >= lengths)):
            found.add(f"interpreter: other logits than recorded for sample {rows[i]}")
        for node in bundle.neurons:
            recorded = bundle.traces[node["name"]]["current"][rows, :T]
            apart = ~_close(teacher_forced[node["inputs"][0]], recorded) & real
            apart &= (np.arange(T) < since[:, None])[..., None]
            found.first("interpreter: another current than recorded", node["name"], apart, rows)
        logits, seen = bundle.program.run(ids, lengths, list(bundle.trace.spikes))
        answers = logits.argmax(axis=1) != sentences["logits"][rows].argmax(axis=1)
        counts["different_predictions"] += int(answers.sum())
        for i, row in enumerate(rows.tolist()):
            flip = _first(bundle, {n: seen[n][i] != spikes[row, :T] for n, spikes in bundle.trace.spikes.items()})
            if flip is not None:
                _judge(bundle, row, *flip, flip[1] >= since[i], counts, found)
    return counts


def _rounded_exponent(currents: list[np.ndarray], lengths: np.ndarray) -> np.ndarray:
    """Of each sentence the first step `(b,)` at which a k `(b, T, n)` lies next to the half of an exponent; behind its
    end if there is none."""
    since = lengths.copy()
    for k in currents:
        e = k / np.float32(LN2)
        near = np.abs(e - np.floor(e) - 0.5) <= MARGIN * np.maximum(1, np.abs(e))
        near = near.any(axis=2) & (np.arange(k.shape[1]) < lengths[:, None])
        since = np.where(near.any(axis=1), np.minimum(since, near.argmax(axis=1)), since)
    return since


def _close(ours: np.ndarray, recorded: np.ndarray) -> np.ndarray:
    """Where both are the same but for rounding; not where one is NaN."""
    return np.abs(ours - recorded) <= CLOSE * max(1.0, float(np.sqrt(np.square(recorded, dtype=np.float64).mean())))


def _teacher_forced(bundle: Bundle, rows: np.ndarray, T: int, names) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits, and values of nodes `(b, T, n)`, where the recorded spikes stand in for the interpreter's own."""
    recorded = {name: trace["spikes"][rows, :T] for name, trace in bundle.traces.items()}
    ids, lengths = bundle.sentences["ids"][rows, :T], bundle.sentences["lengths"][rows]
    return bundle.program.run(ids, lengths, set(names), recorded)


def _first(bundle: Bundle, different: dict[str, np.ndarray]) -> tuple[str, int, int] | None:
    """The first difference `(T, n)` in the order in which things happen: by token, then by place in the graph."""
    order = [node["name"] for node in bundle.nodes]
    steps = {name: int(np.argmax(d.any(axis=1))) for name, d in different.items() if d.any()}
    if not steps:
        return None
    name = min(steps, key=lambda name: (steps[name], order.index(name)))
    return name, steps[name], int(np.argmax(different[name][steps[name]]))


def _judge(
    bundle: Bundle, row: int, name: str, step: int, unit: int, exponent: bool, counts: dict, found: Findings
) -> None:
    """Whether a sentence's first difference is a rounding at the threshold, or may be one of an `exponent` before."""
    where = f"interpreter: population {name}, sample {row}, step {step}, neuron {unit} differs"
    node = next((node for node in bundle.neurons if node["name"] == name), None)
    if node is None:
        found.add(where)
        return
    distance = float(_distances(node, bundle.traces[name]["current"][row : row + 1])[0, step, unit])
    if exponent and distance > margin_of(node):
        counts["sentences_with_a_rounded_exponent"] += 1
        return
    counts["sentences_with_a_flip"] += 1
    counts["farthest_first_flip"] = max(counts["farthest_first_flip"], distance)
    if not distance <= margin_of(node):
        found.add(f"{where}, {distance:.1e} from the threshold (at most {margin_of(node):g} is rounding)")


def margin_of(node: dict) -> float:
    """How far from a threshold rounding may decide: of a membrane, or in spikes, as currents may be off (CLOSE)."""
    return CLOSE if node["op"] == INTEGER else MARGIN


def _distances(node: dict, current: np.ndarray) -> np.ndarray:
    """How far the membranes `(B, T, n)` of a population with these currents are from the threshold, or from the nearest
    step between two integers."""
    h, _ = run_neurons(node, current)
    if node["op"] != INTEGER:
        return np.abs(h - np.float32(node["v_threshold"]))
    most = np.asarray(node["most"])
    step = np.clip(np.floor(h) + 0.5, 0.5 - most if node["signed"] else 0.5, most - 0.5)
    return np.abs(h - step)


def check_simulators(bundle: Bundle, found: Findings) -> dict:
    here = simulators.installed()
    results = {name: "not installed" for name in simulators.SIMULATORS}
    results |= {name: _start(name, version, bundle.integer, found) for name, version in here.items()}
    parts = {node["name"]: weights_before(bundle.nodes, node) for node in bundle.neurons if node["op"] != INTEGER}
    for rows, T in found.progress(list(bundle.rows()), "simulators") if here else []:
        _, reads = _teacher_forced(bundle, rows, T, [name for reads in parts.values() for name, _ in reads])
        for node in bundle.neurons:
            for simulator in here:
                if node["op"] == INTEGER:
                    _replay_integers(bundle, simulator, node, rows, T, results[simulator]["integers"], found)
                    continue
                if reason := unable(simulator, node):
                    results[simulator]["left_out"][node["name"]] = reason
                    continue
                _replay(bundle, simulator, node, rows, T, None, results[simulator]["neurons"], found)
                if parts[node["name"]]:
                    read = np.concatenate([reads[name] for name, _ in parts[node["name"]]], axis=-1)
                    _replay(bundle, simulator, node, rows, T, read, results[simulator]["with_weights"], found)
                if path_to(bundle.nodes, node):
                    _replay_path(bundle, simulator, node, rows, T, results[simulator]["paths"], found)
    for simulator in here:
        for counts in (results[simulator][kind] for kind in KINDS if kind in results[simulator]):
            counts["islands"] = len(counts["islands"])
    return results


def _start(simulator: str, version: str, integer: bool, found: Findings) -> dict:
    """The results of a simulator before anything is replayed: what it made of what is wrong on purpose."""
    controls = {"control": simulators.self_test(simulator)}
    if integer:
        controls["control_of_integers"] = simulators.self_test_integers(simulator)
    for control in controls.values():
        if control["wrong"] or not control["wrong_on_purpose"]:
            found.add(f"{simulator}: this check cannot tell right from wrong with it ({control})")
    kinds = KINDS if integer else KINDS[:2]
    return {"version": version, **controls, "left_out": {}} | {
        kind: {"islands": set(), "steps": 0, "wrong": 0, "rounding": 0} for kind in kinds
    }


def unable(simulator: str, node: dict) -> str | None:
    """Why a simulator cannot run these neurons, if it cannot."""
    if reason := no_island(node):
        return reason
    several = [key for key in ("tau", "v_threshold") if np.unique(node[key]).size > 1]
    if simulator == "snnTorch" and "v_threshold" in several or simulator == "spikingjelly" and several:
        return f"it takes one {several[-1]} a population"
    return "it takes no tau of 1" if simulator == "spikingjelly" and np.min(node["tau"]) <= 1 else None


def _replay(bundle: Bundle, simulator: str, node: dict, rows, T: int, read, counts: dict, found: Findings) -> None:
    """One island on one group of sentences, in one simulator: counts and problems grow."""
    name, trace, real = node["name"], bundle.traces[node["name"]], bundle.real[rows, :T, None]
    current = trace["current"][rows, :T]
    graph = bundle.islands[f"{name}.nir" if read is None else f"{name}.weights.nir"]
    spikes = simulators.replay(simulator, graph, current if read is None else read, node["from_rest"])
    different = (spikes != trace["spikes"][rows, :T]) & real
    margin = MARGIN if read is not None else simulators.blind(simulator, node)
    if margin is not None and different.any():
        rounded = _rounded(node, current, different, margin)
        counts["rounding"] += int(rounded.sum())
        different &= ~rounded
    what = f"{simulator}, {'island' if read is None else 'island with weights'}"
    _count(what, node, different, real, rows, counts, found)


def _count(what: str, node: dict, different: np.ndarray, real: np.ndarray, rows, counts: dict, found: Findings) -> None:
    name = node["name"]
    counts["wrong"] += found.first(what, name, different, rows)
    counts["steps"] += int(real.sum()) * different.shape[-1]
    counts["islands"].add(name)


def _replay_integers(bundle: Bundle, simulator: str, node: dict, rows, T: int, counts: dict, found: Findings) -> None:
    """The population of integer neurons on one group of sentences."""
    name, real = node["name"], bundle.real[rows, :T, None]
    current, recorded = (bundle.traces[name][kind][rows, :T] for kind in ("current", "spikes"))
    integers = simulators.replay_integers(simulator, node, bundle.islands[f"{name}.nir"], current)
    _count(f"{simulator}, population", node, (integers != recorded) & real, real, rows, counts, found)


def _replay_path(bundle: Bundle, simulator: str, node: dict, rows, T: int, counts: dict, found: Findings) -> None:
    """Integer neurons, matrix and the neurons behind it on one group of sentences, from the first neurons' currents."""
    name, real = node["name"], bundle.real[rows, :T, None]
    source, _ = path_to(bundle.nodes, node) or ({}, "")
    given, graph = bundle.traces[source["name"]]["current"][rows, :T], bundle.islands[f"{name}.path.nir"]
    spikes = simulators.replay_path(simulator, source, graph, given, node["from_rest"])
    different = (spikes != bundle.traces[name]["spikes"][rows, :T]) & real
    if different.any():
        rounded = _rounded(node, bundle.traces[name]["current"][rows, :T], different, MARGIN)
        counts["rounding"] += int(rounded.sum())
        different &= ~rounded
    _count(f"{simulator}, path", node, different, real, rows, counts, found)


def _rounded(node: dict, current: np.ndarray, different: np.ndarray, margin) -> np.ndarray:
    """Of the differences `(b, t, n)`, those of neurons whose first one lies within `margin` of the threshold."""
    near = _distances(node, current) <= margin
    if node.get("from_rest", True):
        return different & near
    first = different & (np.cumsum(different, axis=1) == 1)
    return different & (first & near).any(axis=1, keepdims=True)
