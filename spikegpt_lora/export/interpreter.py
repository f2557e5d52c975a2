"""Runs an exported SpikeGPT with numpy alone: token by token, the state explicit, many sentences at once.

    python interpreter.py BUNDLE    the bundle's sentences again, compared with what was recorded

    logits, seen = Program(folder).run(ids, lengths, watch=["blocks.0.lif1"])

For whoever writes a chip's host code: every operation of the model is a method of `Program` below, a few lines each.
This file stands alone; copy it anywhere. It reads graph.json (the operations in order) and weights.npz.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

NOTHING_YET = -1e38  # WKV's exponent before the first token
OPERATIONS = (
    "embed_spike", "layernorm", "delay", "mix", "linear", "wkv", "sigmoid", "squared_relu", "multiply", "add", "lif",
    "pool",
)  # fmt: skip


class Program:
    """The operation graph of a bundle.

    Args:
        folder: of the bundle. dtype: of every real number in it; float64 has no rounding to speak of.

    Raises:
        ValueError: an operation that is none of `OPERATIONS`, or weights that are not finite, which spikes would hide.
    """

    def __init__(self, folder, dtype=np.float32):
        self.dtype = np.dtype(dtype)
        graph = json.loads((Path(folder) / "graph.json").read_text(encoding="utf-8"))
        self.nodes, self.labels = graph["nodes"], graph["labels"]
        with np.load(Path(folder) / "weights.npz") as stored:
            self.weights = {name: self._real(stored, name) for name in stored.files if not name.endswith("/scale")}
        for node in self.nodes:
            if node["op"] not in OPERATIONS:
                raise ValueError(f"graph.json has an unknown operation, {node['op']!r} of {node['name']}")
        for name, weight in self.weights.items():
            if not np.isfinite(weight).all():
                raise ValueError(f"weights.npz holds values that are not finite in {name}: export the model again")

    def _real(self, stored, name):
        """A weight as real numbers; int8 ones come with a scale, a power of two."""
        weight = stored[name].astype(self.dtype)
        return weight * stored[f"{name}/scale"].astype(self.dtype) if f"{name}/scale" in stored.files else weight

    def run(self, ids, lengths, watch=(), teacher_forced=None):
        """Read sentences ids `(B, T)`, of `lengths` `(B,)` tokens each from the left.

        Args:
            watch: names of nodes.
            teacher_forced: of some nodes the values `(B, T, n)` that the nodes behind them get, in place of what was
                computed: recorded spikes, so that a difference cannot spread.

        Returns:
            logits `(B, labels)`, and of each node in `watch` its values `(B, T, n)`, 0 behind a sentence's end.
        """
        state, seen = {}, {name: [] for name in watch}
        for t in range(ids.shape[1]):
            before, state = state, {}
            self.reading = reading = t < np.asarray(lengths)  # of each sentence, whether it still goes on
            self.teacher_forced = {name: x[:, t].astype(self.dtype) for name, x in (teacher_forced or {}).items()}
            values = self.step(ids[:, t], before, state)
            state = {name: _keep(reading, new, before.get(name)) for name, new in state.items()}
            for name in watch:
                seen[name].append(values[name] * reading[:, None])
        return self.classify(state), {name: np.stack(rows, axis=1) for name, rows in seen.items()}

    def step(self, token, before, after):
        """One token `(B,)` of each sentence: all values by node name; state is read from `before`, put into `after`."""
        values = {"token": token}
        for node in self.nodes:
            inputs = [values[name] for name in node["inputs"]]
            value = getattr(self, node["op"])(node, inputs, before.get(node["name"]), after)
            values[node["name"]] = self.teacher_forced.get(node["name"], value)
        return values

    def classify(self, state):
        node = next(node for node in self.nodes if node["op"] == "pool")
        last, total, count = state[node["name"]]
        mean = total / np.maximum(count, 1)
        pooled = {"last": last, "mean": mean, "last_mean": np.concatenate([last, mean], axis=1)}[node["kind"]]
        return pooled @ self.weights[node["weight"]].T

    # ---- operations: (node, inputs, its state before, states after) -> value `(B, n)`

    def embed_spike(self, node, inputs, state, after):
        return self.weights[node["weight"]][inputs[0]]

    def layernorm(self, node, inputs, state, after):
        mu, sigma = self._statistics(node, inputs[0])
        return (inputs[0] - mu) / sigma * self.weights[node["weight"]] + self.weights[node["bias"]]

    def _statistics(self, node, x):
        mu = x.mean(axis=1, keepdims=True)
        return mu, np.sqrt(((x - mu) ** 2).mean(axis=1, keepdims=True) + self.dtype.type(node["eps"]))

    def delay(self, node, inputs, state, after):
        after[node["name"]] = inputs[0]
        return np.zeros_like(inputs[0]) if state is None else state

    def mix(self, node, inputs, state, after):
        share = self.weights[node["weight"]]
        return inputs[0] * share + inputs[1] * (1 - share)

    def linear(self, node, inputs, state, after):
        return inputs[0] @ self.weights[node["weight"]].T

    def wkv(self, node, inputs, state, after):
        k, v = inputs
        w, u = -np.exp(self.weights[node["decay"]]), self.weights[node["first"]]
        top, bottom, p = (np.zeros_like(k), np.zeros_like(k), np.full_like(k, NOTHING_YET)) if state is None else state
        q = np.maximum(p, u + k)
        old, new = np.exp(p - q), np.exp(u + k - q)
        y = (old * top + new * v) / (old * bottom + new)
        q = np.maximum(p + w, k)
        old, new = np.exp(p + w - q), np.exp(k - q)
        after[node["name"]] = np.stack([old * top + new * v, old * bottom + new, q])
        return y

    def sigmoid(self, node, inputs, state, after):
        with np.errstate(over="ignore"):  # exp gives infinity, and the share is 0 as it should be
            return 1 / (1 + np.exp(-inputs[0]))

    def squared_relu(self, node, inputs, state, after):
        return np.maximum(inputs[0], 0) ** 2

    def multiply(self, node, inputs, state, after):
        return inputs[0] * inputs[1]

    def add(self, node, inputs, state, after):
        return inputs[0] + inputs[1]

    def lif(self, node, inputs, state, after):
        """charge, fire, reset; with "from_rest" every token is a first step."""
        tau, threshold = (np.asarray(node[key], self.dtype) for key in ("tau", "v_threshold"))
        rest = self.dtype.type(node["v_reset"] or 0)
        v = np.full_like(inputs[0], rest) if state is None or node["from_rest"] else state
        h = v + (inputs[0] - (v - rest)) / tau
        spikes = (h >= threshold).astype(self.dtype)
        after[node["name"]] = h - spikes * threshold if node["v_reset"] is None else np.where(spikes > 0, rest, h)
        return spikes

    def pool(self, node, inputs, state, after):
        total, count = (0, 0) if state is None else (state[1], state[2])
        after[node["name"]] = np.stack([inputs[0], total + inputs[0], np.zeros_like(inputs[0]) + count + 1])
        return inputs[0]


def _keep(reading, new, old):
    """The new state where a sentence still goes on, else what it was; the batch is the axis before the last."""
    if old is None:
        return new
    return np.where(reading[:, None], new, old)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64")
    args = parser.parse_args()
    try:
        program = Program(args.bundle, args.dtype)
        with np.load(args.bundle / "sentences.npz") as given:
            ids, lengths, recorded = (given[name] for name in ("ids", "lengths", "logits"))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {args.bundle} cannot be run: {error}", file=sys.stderr)
        return 2
    logits, _ = program.run(ids, lengths)
    agree = int(((logits.argmax(axis=1) == recorded.argmax(axis=1)) & np.isfinite(recorded).all(axis=1)).sum())
    print(
        f"{agree} of {len(logits)} predictions as recorded; largest difference of a logit "
        f"{np.abs(logits - recorded).max():.2e}"
    )
    return 0 if agree == len(logits) else 1


if __name__ == "__main__":
    sys.exit(main())
