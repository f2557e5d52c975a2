"""Replay a bundle's populations in Lava's LIF neuron that is bit-accurate with the Loihi chip, and compare spikes.

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
"""

import argparse
import json
import sys
from pathlib import Path

import h5py
import numpy as np
from lava.proc.lif.models import PyLifModelBitAcc

LARGEST_CURRENT, LARGEST_THRESHOLD, SHIFT, UNITY = 2**15 - 1, 2**17 - 1, 6, 2**12
FEWEST = 16  # steps that a threshold must have


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder that export_neuromorphic.py wrote")
    args = parser.parse_args()
    try:
        nodes = json.loads((args.bundle / "graph.json").read_text(encoding="utf-8"))["nodes"]
        with h5py.File(args.bundle / "traces.h5") as traces, np.load(args.bundle / "sentences.npz") as sentences:
            lengths = sentences["lengths"]
            seen = {node["name"]: traces[f"nodes/{node['name']}/observables"] for node in nodes if node["op"] == "lif"}
            recorded = {n: (seen[n]["current/data"][()], seen[n]["spikes/data"][()]) for n in seen}
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {args.bundle} cannot be read: {error}", file=sys.stderr)
        return 2
    results = [compare(node, *recorded[node["name"]], lengths) for node in nodes if node["op"] == "lif"]
    results = [result for result in results if result is not None]
    if not results:
        print(f"error: {args.bundle} has no population that fits the chip's integers", file=sys.stderr)
        return 2
    wrong, rounded, steps, on_purpose = np.sum(results, axis=0)
    print(
        f"Lava's bit-accurate LIF: {wrong:,} wrong, {rounded:,} rounded of {steps:,} neuron steps in {len(results)} "
        f"populations; with twice the tau it got {on_purpose:,} wrong"
    )
    return 1 if wrong or not on_purpose else 0


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
