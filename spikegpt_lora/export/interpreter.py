"""Runs an exported SpikeGPT with numpy alone: token by token, the state explicit, many sentences at once.

    python interpreter.py BUNDLE                   the bundle's sentences again, compared with what was recorded
    python interpreter.py BUNDLE --event-driven    the same in the form that adds at spikes and never multiplies W by x

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

    def run(self, ids, lengths, watch=(), forced=None):
        """Read sentences ids `(B, T)`, of `lengths` `(B,)` tokens each from the left.

        Args:
            watch: names of nodes. forced: of some nodes the values `(B, T, n)` that the nodes behind them get, in place
                of what was computed ("teacher forcing": recorded spikes, so that a difference cannot spread).

        Returns:
            logits `(B, labels)`, and of each node in `watch` its values `(B, T, n)`, 0 behind a sentence's end.
        """
        state, seen = {}, {name: [] for name in watch}
        for t in range(ids.shape[1]):
            before, state = state, {}
            self.reading = reading = t < np.asarray(lengths)  # of each sentence, whether it still goes on
            self.forced = {name: values[:, t].astype(self.dtype) for name, values in (forced or {}).items()}
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
            values[node["name"]] = self.forced.get(node["name"], value)
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


class EventDriven(Program):
    """The same function with additions at spikes in place of every product W LN(x).

    x is a sum of binary spikes: the embedding's (through ln0) and those of the LIFs before. So with LN(x) = g (x - mu)
    / sigma + b and the token shift's shares m, what a linear layer gives is

        W (m LN(x_t) + (1-m) LN(x_t-1)) = now(x_t) + then(x_t-1)      now(x) = (S - mu W m g 1) / sigma + W m b

    where S = W m g x grows by one column of W m g for each spike. All layers that read one LN share its events. What
    stays a product reads no spikes: att.output (sigmoid times WKV), ffn.value (squared ReLU, zeros are skipped), and B
    of a graded gate, one column times one value a spike.

    Args:
        shortest: get each population's part of S in the shortest of three ways: add where there are spikes; subtract
            from the sum of all columns where there are none; change the last token's part where spikes changed.

    additions: so far, by (what reads, what spikes), counted where they are made. products: so far, by layer. rescaling:
    additions and products that turn sums into what layers give, whatever spikes.
    """

    def __init__(self, folder, dtype=np.float32, shortest=False):
        super().__init__(folder, dtype)
        self.shortest, self.totals, self.additions, self.products = shortest, {}, {}, {}
        self.rescaling = {"additions": 0, "products": 0}
        self.by_name = {node["name"]: node for node in self.nodes}
        self.readers = {}  # name of a layer norm -> the linear layers that read mixes of it: layer, share, weight
        for node in self.nodes:
            source = self.by_name.get(node["inputs"][0])
            if node["op"] == "linear" and source is not None and source["op"] == "mix":
                self.readers.setdefault(source["inputs"][0], []).append(
                    (node["name"], source["weight"], node["weight"])
                )
        self.forms = {name: self._form(name) for name in self.readers}

    def _form(self, norm):
        """Of one layer norm: rows for `now` and `then` of all its readers, as columns to add, and what is constant."""
        node, ln0 = self.by_name[norm], self.by_name["ln0"]
        shares = [(self.weights[weight], self.weights[share]) for _, share, weight in self.readers[norm]]
        stacked = np.concatenate([w * share for w, share in shares] + [w * (1 - share) for w, share in shares])
        form = {"constant": self._constants(node, stacked.T)}
        form["columns"] = np.ascontiguousarray((stacked * self.weights[node["weight"]]).T)
        # ln0 is a layer norm like the others, of emb alone.
        form["ln0 constant"] = self._constants(ln0, form["columns"])
        form["ln0 columns"] = form["columns"] * self.weights[ln0["weight"]][:, None]
        return form

    def _constants(self, norm, columns):
        """What a layer norm's gain and bias give through `columns` `(C, rows)`."""
        return self.weights[norm["weight"]] @ columns, self.weights[norm["bias"]] @ columns

    def step(self, token, before, after):
        values, events = {"token": token}, {}  # events: name of a residual sum -> the populations that it is made of
        for node in self.nodes:
            name, source, inputs = node["name"], node["inputs"][0], [values.get(i) for i in node["inputs"]]
            if name in self.forms:
                self._norm(node, events[source], values, before, after)
            elif node["op"] == "linear" and self.by_name[source]["op"] == "mix":
                continue  # done by _norm, with all the layers that read the same events
            elif node["op"] == "linear":
                values[name] = self._product(node, inputs[0])
            elif node["op"] not in ("delay", "mix"):  # these two are carried by the sums
                value = getattr(self, node["op"])(node, inputs, before.get(name), after)
                values[name] = self.forced.get(name, value)
            if name == "ln0":
                events[name] = []
            elif node["op"] == "add" and source in events:
                events[name] = [*events[source], node["inputs"][1]]
        return values

    def _norm(self, node, populations, values, before, after):
        """What all readers of this layer norm get, from its statistics and the sums at spikes."""
        name, form = node["name"], self.forms[node["name"]]
        embedding = self.by_name["ln0"]["inputs"][0]
        sums = self._sum(name, embedding, form["ln0 columns"], values, before, after)
        sums = self._normed(self.by_name["ln0"], sums, form["ln0 constant"], values)
        for population in populations:
            sums = sums + self._sum(name, population, form["columns"], values, before, after)
            self._rescaled(sums, additions=1)
        now, then = np.split(self._normed(node, sums, form["constant"], values), 2, axis=1)
        after[name] = then
        total = now + before.get(name, 0)
        self._rescaled(now, additions=1)
        ends = np.cumsum([len(self.weights[weight]) for _, _, weight in self.readers[name]])
        for (layer, _, _), part in zip(self.readers[name], np.split(total, ends[:-1], axis=1)):
            values[layer] = part

    def _normed(self, norm, sums, constant, values):
        mu, sigma = self._statistics(norm, values[norm["inputs"][0]])
        self._rescaled(sums, additions=2, products=2)
        return (sums - mu * constant[0]) / sigma + constant[1]

    def _rescaled(self, sums, **operations):
        for kind, each in operations.items():
            self.rescaling[kind] += each * sums.shape[1] * int(np.sum(self.reading))

    def _sum(self, norm, population, columns, values, before, after):
        """The sum of the columns `(C, rows)` where the population `(B, C)` spikes, `(B, rows)`."""
        spikes, key = values[population] > 0, (norm, population)
        if self.shortest and key not in self.totals:
            self.totals[key] = columns.sum(axis=0)
        sums, made = np.zeros((len(spikes), columns.shape[1]), self.dtype), 0
        for row in np.flatnonzero(self.reading):
            now, ways = spikes[row], [(spikes[row], spikes[row] & False, 0)]
            if self.shortest:
                ways.append((now & False, ~now, self.totals[key]))
            if self.shortest and key in before:
                last = before[norm, population, "spikes"][row]
                ways.append((now & ~last, last & ~now, before[key][row]))
            plus, minus, start = min(ways, key=lambda way: way[0].sum() + way[1].sum())
            sums[row] = start + columns[plus].sum(axis=0) - columns[minus].sum(axis=0)
            made += int(plus.sum() + minus.sum()) * columns.shape[1]
        self.additions[key] = self.additions.get(key, 0) + made
        if self.shortest:
            after[key], after[norm, population, "spikes"] = sums, spikes
        return sums

    def _product(self, node, x):
        """W x where x is real, or B of a gate: one column times one value for each that is not 0."""
        weight, source = self.weights[node["weight"]], node["inputs"][0]
        made = int(np.count_nonzero(x[self.reading])) * len(weight)
        counted, key = (self.additions, (node["name"], source)) if self.by_name[source]["op"] == "lif" else (
            self.products, node["name"]
        )  # fmt: skip
        counted[key] = counted.get(key, 0) + made
        return x @ weight.T


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--event-driven", action="store_true")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64")
    args = parser.parse_args()
    try:
        program = (EventDriven if args.event_driven else Program)(args.bundle, args.dtype)
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
    if args.event_driven:
        made = [sum(one.values()) for one in (program.additions, program.products, program.rescaling)]
        print(
            "a token: {:,.0f} additions, {:,.0f} products, {:,.0f} to rescale".format(*(np.array(made) / lengths.sum()))
        )
    return 0 if agree == len(logits) else 1


if __name__ == "__main__":
    sys.exit(main())
