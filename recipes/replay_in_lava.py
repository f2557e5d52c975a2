"""Replay a bundle's populations, and matrices that read integer spikes, in Lava's models that are bit-accurate with the
Loihi chip, and compare spikes and sums.

    python3.10 -m venv lava && lava/bin/pip install lava-nc h5py
    lava/bin/python recipes/replay_in_lava.py BUNDLE

Lava needs Python 3.10, so this file stands alone: it reads a bundle's files and imports nothing of this package.

Loihi adds integers: 16 bit of current a step, shifted by 6 into a membrane of 24 bit, thresholds of 17 bit. Recorded
currents are therefore rounded to steps of 1 / scale, scale as large as fits, such that the threshold is a whole number
of steps. Membranes are then off by less than half a step and a truncated bit a token, all of it forgotten at the rate
1 / tau, and the neuron fires up to one step below its threshold, since Lava fires above a threshold that is a whole
number. A neuron whose first difference lies within that distance (`distance`) of the threshold is rounded; any other
difference is wrong, and the exit status 1. Each population is run with twice its tau too, which has to go wrong in one
of them. Populations whose currents are too large for 16 bits at that threshold are left out, by name.

Matrices, of bundles whose matrices read integer spikes and are int8 (export_neuromorphic.py --weights int8), are Lava's
Dense with graded spikes: weights are twice int8, since mixed signs must be even there, a spike is a message of 8 bit,
and every sum must be twice the one of the integers. Those of the first and of the last block are run on the first
--tokens tokens, and each with one weight changed too, which has to go wrong. What is no message of 8 bit (squares of
more than 11) and what reads no integers is left out, by name.
"""

import argparse
import json
import sys
from pathlib import Path

import h5py
import numpy as np
from lava.magma.core.run_conditions import RunSteps
from lava.magma.core.run_configs import Loihi2SimCfg
from lava.proc.dense.process import Dense
from lava.proc.io.sink import RingBuffer as Sink
from lava.proc.io.source import RingBuffer as Source
from lava.proc.lif.models import PyLifModelBitAcc

LARGEST_CURRENT, LARGEST_THRESHOLD, SHIFT, UNITY = 2**15 - 1, 2**17 - 1, 6, 2**12
FEWEST = 16  # steps that a threshold must have


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder that export_neuromorphic.py wrote")
    parser.add_argument("--tokens", type=int, default=64, help="that matrices are run on, from the first sentence on")
    args = parser.parse_args()
    if args.tokens < 1:
        parser.error(f"--tokens must be 1 or more, got {args.tokens}")
    try:
        nodes, lengths, weights, spikes, currents = read(args.bundle)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {args.bundle} cannot be read: {error}", file=sys.stderr)
        return 2
    lifs = [node for node in nodes if node["op"] == "lif"]
    results = [compare(node, currents[node["name"]], spikes[node["name"]], lengths) for node in lifs]
    results = [result for result in results if result is not None]
    if not results:
        print(f"error: {args.bundle} has no population that fits the chip's integers", file=sys.stderr)
        return 2
    wrong, rounded, steps, on_purpose = np.sum(results, axis=0)
    print(
        f"Lava's bit-accurate LIF: {wrong:,} wrong, {rounded:,} rounded of {steps:,} neuron steps in {len(results)} "
        f"populations; with twice the tau it got {on_purpose:,} wrong"
    )
    right = not wrong and bool(on_purpose)
    if any(node["op"] == "integer_spikes" for node in nodes):
        right = replay_matrices(nodes, weights, spikes, lengths, args.tokens) and right
    return 0 if right else 1


def read(bundle: Path) -> tuple[list[dict], np.ndarray, dict, dict, dict]:
    """The graph's nodes, lengths of sentences, weights as stored, and by population spikes and (of LIFs) currents."""
    nodes = json.loads((bundle / "graph.json").read_text(encoding="utf-8"))["nodes"]
    with np.load(bundle / "sentences.npz") as sentences, np.load(bundle / "weights.npz") as file:
        lengths, weights = sentences["lengths"], dict(file)
    with h5py.File(bundle / "traces.h5") as traces:
        spikes = {name: traces[f"nodes/{name}/observables/spikes/data"][()] for name in traces["nodes"]}
        lifs = [node["name"] for node in nodes if node["op"] == "lif"]
        currents = {name: traces[f"nodes/{name}/observables/current/data"][()] for name in lifs}
    return nodes, lengths, weights, spikes, currents


def replay_matrices(nodes: list[dict], weights: dict, spikes: dict, lengths: np.ndarray, tokens: int) -> bool:
    """Run the matrices of the first and the last block; whether every sum is right, and every changed matrix wrong."""
    if not any(name.endswith("/scale") for name in weights):
        print("matrices: left out, weights must be int8: export the bundle with --weights int8")
        return True
    by_name = {node["name"]: node for node in nodes}
    blocks = sorted({int(name.split(".")[1]) for name in by_name if name.startswith("blocks.")})
    chosen = tuple(f"blocks.{i}." for i in dict.fromkeys((blocks[0], blocks[-1])))
    real = np.arange(next(iter(spikes.values())).shape[1]) < lengths[:, None]
    sums = wrong = seen = 0
    for node in nodes:
        if node["op"] != "linear" or not node["name"].startswith(chosen):
            continue
        read = integers(node["inputs"][0], by_name, weights, spikes)
        if read is None or not -128 <= read.min() <= read.max() < 128:
            why = "real numbers" if read is None else f"integers up to {np.abs(read).max()}"
            print(f"{node['name']}: left out, it must read integers of 8 bit, and reads {why}")
            continue
        matrix, rows = weights[node["weight"]].astype(np.int32), read[real][:tokens]
        changed = matrix.copy()
        row, column = 0, int(np.abs(rows).sum(axis=0).argmax())
        changed[row, column] += 1 if changed[row, column] < 127 else -1
        expected = 2 * rows @ matrix.T
        different, on_purpose = (int((dense(w, rows) != expected).sum()) for w in (matrix, changed))
        print(
            f"{node['name']}: {different} wrong of {expected.size:,} sums, the largest "
            f"{np.abs(expected).max():,}; with one weight changed: {on_purpose} wrong"
        )
        sums, wrong, seen = sums + expected.size, wrong + different + (not on_purpose), seen + 1
    print(f"Lava's bit-accurate Dense: {wrong:,} wrong of {sums:,} sums in {seen} matrices")
    return not wrong and seen > 0


def integers(name: str, by_name: dict, weights: dict, spikes: dict) -> np.ndarray | None:
    """The integers `(B, T, n)` that a node of the graph gives for the recorded spikes; None if it gives none.

    A residual stream is the gain of the embedding's spikes and the spikes of the neurons before, added up."""
    if name in spikes:
        return spikes[name].astype(np.int32)
    node = by_name[name]
    if node["op"] not in ("gain", "centre", "add"):
        return None
    values = [integers(one, by_name, weights, spikes) for one in node["inputs"]]
    if any(value is None for value in values):
        return None
    if node["op"] == "add":
        return values[0] + values[1]
    vector = weights[node["weight"]].astype(np.int32)
    return values[0] * vector if node["op"] == "gain" else values[0] - vector


def dense(matrix: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Sums `(t, outputs)` of Lava's Dense with weights 2 * matrix `(outputs, n)` for the spikes `(t, n)`."""
    steps = len(rows) + 1  # what is sent arrives a step later
    source, layer = Source(data=rows.T), Dense(weights=2 * matrix, num_message_bits=8)
    sink = Sink(shape=(len(matrix),), buffer=steps)
    source.s_out.connect(layer.s_in)
    layer.a_out.connect(sink.a_in)
    sink.run(RunSteps(steps), Loihi2SimCfg(select_tag="fixed_pt"))
    sums = sink.data.get()
    sink.stop()
    return sums[:, 1:].T.astype(np.int64)


def compare(
    node: dict, current: np.ndarray, spikes: np.ndarray, lengths: np.ndarray
) -> tuple[int, int, int, int] | None:
    """Of one population wrong spikes, rounded ones, neuron steps, and wrong spikes with twice the tau.

    Returns:
        None if it does not fit the chip's integers.
    """
    if node.get("levels", [0, 1]) != [0, 1]:
        print(f"{node['name']}: left out, its spikes must be 0 and 1, and have the levels {node['levels']}")
        return None
    if np.size(node["tau"]) > 1 or np.size(node["v_threshold"]) > 1 or not np.all(np.array(node["v_threshold"]) > 0):
        print(f"{node['name']}: left out, its units must have one tau and one threshold above 0")
        return None
    real = (np.arange(current.shape[1]) < lengths[:, None])[..., None]
    if node["from_rest"]:  # every token is a sequence of one
        current, spikes, real = (x.reshape(-1, 1, x.shape[-1]) for x in (current, spikes, real))
    tau, threshold = float(node["tau"]), float(node["v_threshold"])
    scale, counted = scale_of(current, tau, threshold), []
    if scale * threshold < FEWEST:
        print(f"{node['name']}: left out, its largest current is {np.abs(current).max() / threshold:.0f} thresholds")
        return None
    for tried in (tau, 2 * tau):
        different = (lif(current, tried, threshold, scale) != spikes) & real
        near = np.abs(membrane(node, current) - threshold) <= distance(tau, scale)
        first = different & (np.cumsum(different, axis=1) == 1)
        rounded = different & (first & near).any(axis=1, keepdims=True)
        counted.append((int((different & ~rounded).sum()), int(rounded.sum())))
    (wrong, rounded), (on_purpose, _) = counted
    print(
        f"{node['name']}: {wrong} wrong, {rounded} rounded; steps of {1 / scale:.1e}; twice the tau: {on_purpose} wrong"
    )
    return wrong, rounded, int(real.sum()) * current.shape[-1], on_purpose


def scale_of(current: np.ndarray, tau: float, threshold: float) -> float:
    """Steps in 1, as many as fit the chip's integers, such that the threshold is a whole number of them."""
    most = min(LARGEST_CURRENT / max(float(np.abs(current).max()) / tau, 1e-9), (LARGEST_THRESHOLD + 1) / threshold)
    return float(np.floor(most * threshold)) / threshold


def distance(tau: float, scale: float) -> float:
    """How far from the threshold a membrane can lie where rounding decides about a spike."""
    return (tau * (0.5 + 1 / 2**SHIFT) + 1) / scale


def lif(current: np.ndarray, tau: float, threshold: float, scale: float) -> np.ndarray:
    """Spikes `(B, T, n)` of Lava's neuron for float currents; all sentences side by side as one population."""
    B, T, n = current.shape
    neuron = PyLifModelBitAcc({})
    neuron.u, neuron.v = np.zeros(B * n, np.int32), np.zeros(B * n, np.int32)
    neuron.du, neuron.dv = UNITY - 1, round(UNITY / tau)  # no memory of currents; the membrane forgets 1 / tau
    neuron.bias_mant, neuron.bias_exp = np.zeros(B * n, np.int16), np.zeros(B * n, np.int16)
    neuron.vth = np.int32(round(threshold * scale) - 1)
    neuron.scale_bias()
    neuron.scale_threshold()
    spikes = np.empty((B, T, n), bool)
    for t in range(T):
        neuron.subthr_dynamics(np.rint(current[:, t] * scale / tau).astype(np.int32).ravel())
        fired = neuron.spiking_activation()
        neuron.reset_voltage(fired)
        spikes[:, t] = fired.reshape(B, n)
    return spikes


def membrane(node: dict, current: np.ndarray) -> np.ndarray:
    """Membranes before the reset `(B, T, n)`, by the definition, in float64."""
    h, v = np.empty(current.shape), np.zeros(current[:, 0].shape)
    for t in range(current.shape[1]):
        h[:, t] = v + (current[:, t] - v) / node["tau"]
        v = np.where(h[:, t] >= node["v_threshold"], 0, h[:, t])
    return h


if __name__ == "__main__":
    sys.exit(main())
