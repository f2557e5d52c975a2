"""Reruns a bundle: in the interpreter, and each island in the simulators that are installed.

Interpreter: with the recorded spikes it gives the recorded currents. From token ids alone it gives the recorded spikes
    and logits; in float32 a rounding may flip a spike that lies at its threshold, and what follows it differs: such
    sentences are counted, and the first difference of each must lie within MARGIN of the threshold.
Simulators: run the islands on the recorded currents; every spike must be the recorded one. Islands with weights get
    what the matrix reads and do the product themselves; a neuron whose first difference lies within MARGIN of the
    threshold is counted as rounding. Before, each simulator has to get an island wrong that is wrong on purpose
    (`simulators.self_test`).
"""

import numpy as np

from . import simulators
from .bundle import Bundle
from .findings import Findings
from .graph import weights_before
from .islands import no_island
from .simulators import run_neurons

MARGIN = 1e-5  # of a membrane from its threshold
CLOSE = 1e-4  # of currents and logits in float32 by two ways, in units of their root mean square, 1 at least


def check_interpreter(bundle: Bundle, found: Findings) -> dict:
    sentences = bundle.sentences
    counts = {"dtype": "float32", "sentences": len(sentences["ids"]), "sentences_with_a_flip": 0}
    counts |= {"farthest_first_flip": 0.0, "different_predictions": 0}
    for rows, T in found.progress(list(bundle.rows()), "interpreter"):
        ids, lengths, real = sentences["ids"][rows, :T], sentences["lengths"][rows], bundle.real[rows, :T, None]
        logits, teacher_forced = _teacher_forced(bundle, rows, T, [node["inputs"][0] for node in bundle.neurons])
        for i in np.flatnonzero(~_close(logits, sentences["logits"][rows]).all(axis=1)):
            found.add(f"interpreter: other logits than recorded for sample {rows[i]}")
        for node in bundle.neurons:
            recorded = bundle.traces[node["name"]]["current"][rows, :T]
            apart = ~_close(teacher_forced[node["inputs"][0]], recorded) & real
            found.first("interpreter: another current than recorded", node["name"], apart, rows)
        logits, seen = bundle.program.run(ids, lengths, list(bundle.trace.spikes))
        answers = logits.argmax(axis=1) != sentences["logits"][rows].argmax(axis=1)
        counts["different_predictions"] += int(answers.sum())
        for i, row in enumerate(rows.tolist()):
            flip = _first(bundle, {n: seen[n][i] != spikes[row, :T] for n, spikes in bundle.trace.spikes.items()})
            if flip is not None:
                _judge(bundle, row, *flip, counts, found)
    return counts


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


def _judge(bundle: Bundle, row: int, name: str, step: int, unit: int, counts: dict, found: Findings) -> None:
    """Whether a sentence's first difference is a rounding at the threshold."""
    where = f"interpreter: population {name}, sample {row}, step {step}, neuron {unit} differs"
    node = next((node for node in bundle.neurons if node["name"] == name), None)
    if node is None:
        found.add(where)
        return
    h, _ = run_neurons(node, bundle.traces[name]["current"][row : row + 1])
    distance = abs(float(h[0, step, unit]) - float(np.broadcast_to(np.float32(node["v_threshold"]), h.shape[-1])[unit]))
    counts["sentences_with_a_flip"] += 1
    counts["farthest_first_flip"] = max(counts["farthest_first_flip"], distance)
    if not distance <= MARGIN:
        found.add(f"{where}, {distance:.1e} from the threshold (at most {MARGIN:g} is rounding)")


def check_simulators(bundle: Bundle, found: Findings) -> dict:
    here = simulators.installed()
    results = {name: "not installed" for name in simulators.SIMULATORS}
    results |= {name: _start(name, version, found) for name, version in here.items()}
    parts = {node["name"]: weights_before(bundle.nodes, node) for node in bundle.neurons}
    for rows, T in found.progress(list(bundle.rows()), "simulators") if here else []:
        _, reads = _teacher_forced(bundle, rows, T, [name for reads in parts.values() for name, _ in reads])
        for node in bundle.neurons:
            for simulator in here:
                if reason := unable(simulator, node):
                    results[simulator]["left_out"][node["name"]] = reason
                    continue
                _replay(bundle, simulator, node, rows, T, None, results[simulator]["neurons"], found)
                if parts[node["name"]]:
                    read = np.concatenate([reads[name] for name, _ in parts[node["name"]]], axis=-1)
                    _replay(bundle, simulator, node, rows, T, read, results[simulator]["with_weights"], found)
    for simulator in here:
        for counts in (results[simulator]["neurons"], results[simulator]["with_weights"]):
            counts["islands"] = len(counts["islands"])
    return results


def _start(simulator: str, version: str, found: Findings) -> dict:
    control = simulators.self_test(simulator)
    if control["wrong"] or not control["wrong_on_purpose"]:
        found.add(f"{simulator}: this check cannot tell right from wrong with it ({control})")
    return {"version": version, "control": control, "left_out": {}} | {
        kind: {"islands": set(), "steps": 0, "wrong": 0, "rounding": 0} for kind in ("neurons", "with_weights")
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
    counts["wrong"] += found.first(what, name, different, rows)
    counts["steps"] += int(real.sum()) * different.shape[-1]
    counts["islands"].add(name)


def _rounded(node: dict, current: np.ndarray, different: np.ndarray, margin) -> np.ndarray:
    """Of the differences `(b, t, n)`, those of neurons whose first one lies within `margin` of the threshold."""
    h, _ = run_neurons(node, current)
    near = np.abs(h - np.float32(node["v_threshold"])) <= margin
    if node["from_rest"]:
        return different & near
    first = different & (np.cumsum(different, axis=1) == 1)
    return different & (first & near).any(axis=1, keepdims=True)
