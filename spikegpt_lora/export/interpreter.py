"""Runs an exported SpikeGPT with numpy alone: token by token, the state explicit, many sentences at once.

    python interpreter.py BUNDLE    the bundle's sentences again, compared with what was recorded (with --integers:
                                    every matrix in int32, where all of them read integer spikes and are int8)
    logits, seen = Program(folder).run(ids, lengths, watch=["blocks.0.lif1"])

For whoever writes a chip's host code: every operation of the model is a few lines below, with its equation. This file
stands alone; copy it anywhere. It reads graph.json (the operations in order) and weights.npz.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

OPERATIONS = (
    "embed_spike layernorm delay mix linear wkv sigmoid squared_relu multiply add pool "
    "gain centre statistics normalise wkv_powers_of_two pool_rows"  # of models whose matrices read integer spikes
).split()
LN2, NOTHING_YET = float(np.log(2)), -1e6  # an exponent below all others


def lif(node: dict, x: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One token of leaky integrate-and-fire neurons, in x's dtype and in the model's order of operations.

        h[t] = v[t-1] + (x[t] - (v[t-1] - v_reset)) / tau    charge
        s[t] = 1 where h[t] >= v_threshold, else 0           fire
        v[t] = v_reset where s[t] = 1, else h[t]             reset; h[t] - s[t] v_threshold where v_reset is null

    x is what the neurons integrate, v their membranes before, both `(B, n)`; tau (in tokens) and v_threshold are one
    number or n. Returns h[t], s[t] and v[t], `(B, n)` each."""
    tau, threshold = (np.asarray(node[key], x.dtype) for key in ("tau", "v_threshold"))
    rest = x.dtype.type(node["v_reset"] or 0)
    h = v + (x - (v - rest)) / tau
    spikes = (h >= threshold).astype(x.dtype)
    return h, spikes, h - spikes * threshold if node["v_reset"] is None else np.where(spikes != 0, rest, h)


def integer_spikes(node: dict, x: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integer spikes of neurons without memory; arguments as of `lif`.

        u = x / scale                                  scale `(n,)`, what one spike stands for
        k = floor(u + 1/2), in -most ... most          most `(n,)`; 0 ... most where "signed" is false
        s = k, or k^2 where "squared" is true

    Returns u, s, and v as it is."""
    scale, most = (np.asarray(node[key], x.dtype) for key in ("scale", "most"))
    u = x / scale
    k = np.clip(np.floor(u + x.dtype.type(0.5)), -most if node["signed"] else 0 * most, most)
    return u, k * k if node["squared"] else k, v


# operations of populations that spike; where "from_rest" is true (or not said: no memory) every token is a first step
NEURONS = {"lif": lif, "integer_spikes": integer_spikes}


class Program:
    """The operation graph of the bundle in `folder`, all real numbers of `dtype`; float64 has no rounding to speak of.

    Args:
        integers: every matrix in integer arithmetic, as on a chip: int8 weights times integer spikes in int32.

    Raises:
        ValueError: an unknown operation, or weights that are not finite, which spikes would hide; with `integers` a
            matrix that is not int8, and while it runs one that reads a number that is none.
    """

    def __init__(self, folder: str | Path, dtype: type | str = np.float32, integers: bool = False) -> None:
        self.dtype, self.integers = np.dtype(dtype), dict[str, tuple[np.ndarray, np.ndarray]]()
        self.constants = dict[str, tuple[np.ndarray, ...]]()  # of "normalise", by node
        graph = json.loads((Path(folder) / "graph.json").read_text(encoding="utf-8"))
        self.nodes, self.labels = graph["nodes"], graph["labels"]
        with np.load(Path(folder) / "weights.npz") as stored:
            self.weights = {name: self._real(stored, name) for name in stored.files if not name.endswith("/scale")}
            for node in self.nodes if integers else []:
                if node["op"] == "linear" or node["op"] == "pool":
                    self.integers[node["name"]] = self._int8(stored, node)
        for node in self.nodes:
            if node["op"] not in (*OPERATIONS, *NEURONS):
                raise ValueError(f"graph.json has an unknown operation, {node['op']!r} of {node['name']}")

    def _real(self, stored: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
        """A weight as real numbers; int8 ones come with a scale, a power of two."""
        weight = stored[name].astype(self.dtype)
        if not np.isfinite(weight).all():
            raise ValueError(f"weights.npz holds values that are not finite in {name}: export the model again")
        return weight * stored[f"{name}/scale"].astype(self.dtype) if f"{name}/scale" in stored.files else weight

    def _int8(self, stored: np.lib.npyio.NpzFile, node: dict) -> tuple[np.ndarray, np.ndarray]:
        """A matrix as int32, and its power of two."""
        name = node["weight"]
        if node["op"] == "pool" or f"{name}/scale" not in stored.files:
            raise ValueError(
                f"{node['name']} is no matrix of int8 that reads spikes: integer arithmetic is for models whose "
                "matrices read integer spikes, exported with int8 weights"
            )
        return stored[name].astype(np.int32), stored[f"{name}/scale"].astype(self.dtype)

    def run(
        self, ids: np.ndarray, lengths: np.ndarray, watch: list[str] | tuple = (), teacher_forced: dict | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Read sentences ids `(B, T)`, of `lengths` `(B,)` tokens each from the left.

        teacher_forced: by name, values `(B, T, n)` to pass on in place of a node's own (recorded spikes: no difference
        spreads). Returns logits `(B, labels)`; by name in `watch`, values `(B, T, n)`, 0 behind a sentence's end."""
        state, seen = dict[str, np.ndarray](), {name: list[np.ndarray]() for name in watch}
        for t in range(ids.shape[1]):
            before, state = state, {}
            self.reading = reading = t < np.asarray(lengths)  # of each sentence, whether it still goes on
            self.teacher_forced = {name: x[:, t].astype(self.dtype) for name, x in (teacher_forced or {}).items()}
            values = self.step(ids[:, t], before, state)
            for name in before:  # where a sentence has ended its state stays; the batch is the axis before the last
                state[name] = np.where(reading[:, None], state[name], before[name])
            for name in watch:
                seen[name].append(values[name] * reading[:, None])
        return self.classify(state), {name: np.stack(rows, axis=1) for name, rows in seen.items()}

    def step(self, token: np.ndarray, before: dict, after: dict) -> dict[str, np.ndarray]:
        """One token `(B,)` of each sentence: all values by node name; state is read from `before`, put into `after`."""
        values = {"token": token}
        for node in self.nodes:
            values[node["name"]] = self.value(node, [values[name] for name in node["inputs"]], before, after)
        return values

    def value(self, node: dict, inputs: list[np.ndarray], before: dict, after: dict) -> np.ndarray:
        operation = self.neurons if node["op"] in NEURONS else getattr(self, node["op"])
        return self.teacher_forced.get(node["name"], operation(node, inputs, before.get(node["name"]), after))

    def classify(self, state: dict[str, np.ndarray]) -> np.ndarray:
        """logits = W p, W `(labels, n or 2 n)`: p is the last token's x, the mean over tokens, or both end to end. Of
        "pool_rows" p itself; of both, the first half of the last token's x plus the second half of the mean."""
        node = next(node for node in self.nodes if node["op"] in ("pool", "pool_rows"))
        last, total, count = state[node["name"]]
        mean = total / np.maximum(count, 1)
        if node["op"] == "pool_rows":
            half = last.shape[1] // 2
            return {"last": last, "mean": mean, "last_mean": last[:, :half] + mean[:, half:]}[node["kind"]]
        pooled = {"last": last, "mean": mean, "last_mean": np.concatenate([last, mean], axis=1)}[node["kind"]]
        return pooled @ self.weights[node["weight"]].T

    # ---- operations: (node, inputs, its state before, states after) -> value `(B, n)`; x and y are inputs `(B, n)`

    def neurons(self, node: dict, inputs: list[np.ndarray], state: np.ndarray | None, after: dict) -> np.ndarray:
        """s = spikes of x, see `lif`; the state is the membrane."""
        rest = node.get("from_rest", True)
        v = np.full_like(inputs[0], node.get("v_reset") or 0) if rest or state is None else state
        _, spikes, after[node["name"]] = NEURONS[node["op"]](node, inputs[0], v)
        return spikes

    def embed_spike(self, node: dict, inputs: list[np.ndarray], state: np.ndarray | None, after: dict) -> np.ndarray:
        """s = W[token], W `(vocabulary, n)` of 0 and 1."""
        return self.weights[node["weight"]][inputs[0]]

    def layernorm(self, node: dict, inputs: list[np.ndarray], state: np.ndarray | None, after: dict) -> np.ndarray:
        """(x - mean(x)) / sqrt(var(x) + eps) * w + b, mean and variance over the n values, w and b `(n,)`; of x + o in
        place of x where the node has an "offset" o."""
        x = inputs[0] + self.weights[node["offset"]] if "offset" in node else inputs[0]
        mu, sigma = self._statistics(node, x)
        return (x - mu) / sigma * self.weights[node["weight"]] + self.weights[node["bias"]]

    def _statistics(self, node: dict, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mu = x.mean(axis=1, keepdims=True)
        return mu, np.sqrt(((x - mu) ** 2).mean(axis=1, keepdims=True) + self.dtype.type(node["eps"]))

    def delay(self, node: dict, inputs: list[np.ndarray], state: np.ndarray | None, after: dict) -> np.ndarray:
        """x[t-1], 0 before the first token; the state is x."""
        after[node["name"]] = inputs[0]
        return np.zeros_like(inputs[0]) if state is None else state

    def mix(self, node: dict, inputs: list[np.ndarray], state: np.ndarray | None, after: dict) -> np.ndarray:
        """m * x + (1 - m) * y, m `(n,)`: x is of this token, y of the one before."""
        share = self.weights[node["weight"]]
        return inputs[0] * share + inputs[1] * (1 - share)

    def linear(self, node: dict, inputs: list[np.ndarray], state: np.ndarray | None, after: dict) -> np.ndarray:
        """W x, W `(outputs, n)`."""
        if self.integers:
            return self._integer_product(node, inputs[0])
        return inputs[0] @ self.weights[node["weight"]].T

    def _integer_product(self, node: dict, x: np.ndarray) -> np.ndarray:
        """W x = 2^e (V k), int8 V times integers k, summed up in int32."""
        matrix, power = self.integers[node["name"]]
        k = np.rint(x).astype(np.int32)
        if not np.array_equal(k, x):
            raise ValueError(f"{node['name']} reads real numbers: its product is none of integer arithmetic")
        if int(np.abs(k).max(initial=0)) * 128 * k.shape[1] >= 2**31:
            raise ValueError(f"{node['name']} reads integers up to {np.abs(k).max()}, whose sum may not fit 32 bit")
        return (k @ matrix.T).astype(self.dtype) * power

    def gain(self, node: dict, inputs: list[np.ndarray], state: np.ndarray | None, after: dict) -> np.ndarray:
        """w * x, w `(n,)` of integers: what a spike of the embedding adds to the residual stream."""
        return inputs[0] * self.weights[node["weight"]]

    def centre(self, node: dict, inputs: list[np.ndarray], state: np.ndarray | None, after: dict) -> np.ndarray:
        """x - c, c `(n,)` of integers: what is 0 most often is sent as 0."""
        return inputs[0] - self.weights[node["weight"]]

    def statistics(self, node: dict, inputs: list[np.ndarray], state: np.ndarray | None, after: dict) -> np.ndarray:
        """mu and sigma `(B, 2)` of x + o: mean(x + o) and sqrt(var(x + o) + eps), o `(n,)`."""
        return np.concatenate(self._statistics(node, inputs[0] + self.weights[node["offset"]]), axis=1)

    def normalise(self, node: dict, inputs: list[np.ndarray], state: np.ndarray | None, after: dict) -> np.ndarray:
        """(z + W (o + c) - mu W 1) / sigma + W b: W times the layer norm of x + o, for z = W (x - c).

        z `(B, rows)` and (mu, sigma) `(B, 2)` are the inputs; W `(rows, n)`, o, c and b `(n,)`."""
        if node["name"] not in self.constants:
            weight, o, c, b = (self.weights[node[key]] for key in ("weight", "offset", "centre", "bias"))
            self.constants[node["name"]] = weight @ (o + c), weight.sum(axis=1), weight @ b
        (z, moments), (offsets, ones, biases) = inputs, self.constants[node["name"]]
        return (z + offsets - moments[:, :1] * ones) / moments[:, 1:] + biases

    def wkv(self, node: dict, inputs: list[np.ndarray], state: np.ndarray | None, after: dict) -> np.ndarray:
        """(sum_s e^(k[s] - (t-1-s) d) v[s] + e^(u + k[t]) v[t]) / (the same without v), over s < t.

        k and v are the inputs, d = e^decay and u = first, `(n,)` both. The state `(3, B, n)`: both sums over e^p, and
        p, the largest exponent so far (none yet: -1e38), so that nothing overflows."""
        k, v = inputs
        w, u = -np.exp(self.weights[node["decay"]]), self.weights[node["first"]]
        top, bottom, p = (np.zeros_like(k), np.zeros_like(k), np.full_like(k, -1e38)) if state is None else state
        q = np.maximum(p, u + k)
        old, new = np.exp(p - q), np.exp(u + k - q)
        y = (old * top + new * v) / (old * bottom + new)
        q = np.maximum(p + w, k)
        old, new = np.exp(p + w - q), np.exp(k - q)
        after[node["name"]] = np.stack([old * top + new * v, old * bottom + new, q])
        return y

    def wkv_powers_of_two(
        self, node: dict, inputs: list[np.ndarray], state: np.ndarray | None, after: dict
    ) -> np.ndarray:
        """(sum_s d^(t-1-s) 2^e[s] v[s] + 2^(u + e[t]) v[t]) / (the same without v), over s < t.

        k and v are the inputs, e = floor(k / ln 2 + 1/2); d `(n,)` is 2^-m or 1 - 2^-m, u `(n,)` holds integers: all
        weights are shifts. The state `(3, B, n)`: both sums over 2^p, and p, such that the second is in [1/2, 1)."""
        k, v = inputs
        e, d = np.floor(k / self.dtype.type(LN2) + self.dtype.type(0.5)), self.weights[node["decay"]]
        top, bottom, p = (0 * k, 0 * k, np.full_like(k, NOTHING_YET)) if state is None else state
        one, now = np.ones_like(k), e + self.weights[node["first"]]
        old, new = _shifted(one, p - np.maximum(p, now)), _shifted(one, now - np.maximum(p, now))
        y = (old * top + new * v) / (old * bottom + new)
        q = np.maximum(p, e)
        old, new = _shifted(d, p - q), _shifted(one, e - q)
        bottom, moved = np.frexp(old * bottom + new)
        after[node["name"]] = np.stack([_shifted(old * top + new * v, -moved), bottom, q + moved])
        return y

    def sigmoid(self, node: dict, inputs: list[np.ndarray], state: np.ndarray | None, after: dict) -> np.ndarray:
        """1 / (1 + e^-x)."""
        with np.errstate(over="ignore"):  # exp gives infinity, and the share is 0 as it should be
            return 1 / (1 + np.exp(-inputs[0]))

    def squared_relu(self, node: dict, inputs: list[np.ndarray], state: np.ndarray | None, after: dict) -> np.ndarray:
        """max(x, 0)^2."""
        return np.maximum(inputs[0], 0) ** 2

    def multiply(self, node: dict, inputs: list[np.ndarray], state: np.ndarray | None, after: dict) -> np.ndarray:
        """x * y."""
        return inputs[0] * inputs[1]

    def add(self, node: dict, inputs: list[np.ndarray], state: np.ndarray | None, after: dict) -> np.ndarray:
        """x + y."""
        return inputs[0] + inputs[1]

    def pool_rows(self, node: dict, inputs: list[np.ndarray], state: np.ndarray | None, after: dict) -> np.ndarray:
        """x; the state is that of `pool`."""
        return self.pool(node, inputs, state, after)

    def pool(self, node: dict, inputs: list[np.ndarray], state: np.ndarray | None, after: dict) -> np.ndarray:
        """x; the state `(3, B, n)` is what `classify` reads: x, its sum over the tokens, and their number."""
        total, count = (0, 0) if state is None else (state[1], state[2])
        after[node["name"]] = np.stack([inputs[0], total + inputs[0], np.zeros_like(inputs[0]) + count + 1])
        return inputs[0]


def _shifted(x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """x * 2^places."""
    return np.ldexp(x, places.astype(np.int32))


def reread(program: Program, bundle: str | Path) -> bool:
    """Read a bundle's sentences and print how that compares with what was recorded; whether all predictions agree."""
    with np.load(Path(bundle) / "sentences.npz") as given:
        ids, lengths, recorded = (given[name] for name in ("ids", "lengths", "logits"))
    logits, _ = program.run(ids, lengths)
    agree = int(((logits.argmax(axis=1) == recorded.argmax(axis=1)) & np.isfinite(recorded).all(axis=1)).sum())
    apart = np.abs(logits - recorded).max()
    print(f"{agree} of {len(logits)} predictions as recorded; largest difference of a logit {apart:.2e}")
    return agree == len(logits)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64")
    parser.add_argument("--integers", action="store_true", help="int8 weights times integer spikes, in int32")
    args = parser.parse_args()
    try:
        return 0 if reread(Program(args.bundle, args.dtype, args.integers), args.bundle) else 1
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {args.bundle} cannot be run: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
