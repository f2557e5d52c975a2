"""Runs an exported SpikeGPT with numpy alone: token by token, the state explicit, many sentences at once.

    logits, seen = Program(folder).run(ids, lengths, watch=["blocks.0.lif1"])
    logits, seen = EventDriven(folder).run(ids, lengths)      # adds at spikes, never multiplies W by x

For whoever writes a chip's host code: every operation of the model is a method of `Program` below, a few lines each.
This file stands alone; copy it anywhere. It reads graph.json (the operations in order) and weights.npz, as
`Graph.save` writes them.
"""

import json
from pathlib import Path

import numpy as np

NOTHING_YET = -1e38  # WKV's exponent before the first token


class Program:
    """The operation graph of a bundle.

    Args:
        folder: of the bundle. dtype: of every real number in it; float64 has no rounding to speak of.
    """

    def __init__(self, folder, dtype=np.float32):
        self.dtype = np.dtype(dtype)
        graph = json.loads((Path(folder) / "graph.json").read_text(encoding="utf-8"))
        self.nodes, self.labels = graph["nodes"], graph["labels"]
        with np.load(Path(folder) / "weights.npz") as stored:
            self.weights = {name: self._real(stored, name) for name in stored.files if not name.endswith("/scale")}

    def _real(self, stored, name):
        """A weight as real numbers; int8 ones come with a scale, a power of two."""
        weight = stored[name].astype(self.dtype)
        return weight * stored[f"{name}/scale"].astype(self.dtype) if f"{name}/scale" in stored.files else weight

    def run(self, ids, lengths, watch=()):
        """Read sentences ids `(B, T)`, of `lengths` `(B,)` tokens each from the left.

        Returns:
            logits `(B, labels)`, and of each node in `watch` its values `(B, T, n)`, 0 behind a sentence's end.
        """
        state, seen = {}, {name: [] for name in watch}
        for t in range(ids.shape[1]):
            before, state = state, {}
            self.reading = reading = t < np.asarray(lengths)  # of each sentence, whether it still goes on
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
            values[node["name"]] = getattr(self, node["op"])(node, inputs, before.get(node["name"]), after)
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
        return 1 / (1 + np.exp(-inputs[0]))

    def squared_relu(self, node, inputs, state, after):
        return np.maximum(inputs[0], 0) ** 2

    def multiply(self, node, inputs, state, after):
        return inputs[0] * inputs[1]

    def add(self, node, inputs, state, after):
        return inputs[0] + inputs[1]

    def scale(self, node, inputs, state, after):
        return inputs[0] * self.dtype.type(node["factor"])

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

    additions, products: what was done so far, counted where it is done.
    """

    def __init__(self, folder, dtype=np.float32):
        super().__init__(folder, dtype)
        self.additions = self.products = 0
        self.by_name = {node["name"]: node for node in self.nodes}
        self.readers = {}  # name of a layer norm -> the linear layers that read mixes of it
        for node in self.nodes:
            source = self.by_name.get(node["inputs"][0])
            if node["op"] == "linear" and source is not None and source["op"] == "mix":
                self.readers.setdefault(source["inputs"][0], []).append(
                    (node["name"], source["weight"], node["weight"])
                )
        self.columns = {name: self._columns(name) for name in self.readers}

    def _columns(self, norm):
        """Of one layer norm: rows for `now` and `then` of all its readers, as columns to add, and what is constant."""
        node = self.by_name[norm]
        g, b = self.weights[node["weight"]], self.weights[node["bias"]]
        shares = [(self.weights[weight], self.weights[share]) for _, share, weight in self.readers[norm]]
        parts = [weight * share for weight, share in shares] + [weight * (1 - share) for weight, share in shares]
        stacked = np.concatenate(parts)
        return {"columns": np.ascontiguousarray((stacked * g).T), "mean": stacked @ g, "bias": stacked @ b}

    def step(self, token, before, after):
        values, events = {"token": token}, {}  # events: name of a residual sum -> the spikes that it is made of
        for node in self.nodes:
            name, source, inputs = node["name"], node["inputs"][0], [values.get(i) for i in node["inputs"]]
            if name in self.columns:
                values[name] = self._norm(node, values[source], events[source], values, after, before)
            elif node["op"] == "linear" and self.by_name[source]["op"] == "mix":
                pass  # done by _norm, with all the layers that read the same events
            elif node["op"] == "linear":
                values[name] = self._product(node, inputs[0])
            elif node["op"] in ("delay", "mix"):
                values[name] = inputs[0]  # carried by the sums
            else:
                values[name] = getattr(self, node["op"])(node, inputs, before.get(name), after)
            if name == "ln0":
                events[name] = []
            elif node["op"] == "add" and source in events:
                events[name] = [*events[source], values[node["inputs"][1]]]
        return values

    def _norm(self, node, x, spikes, values, after, before):
        """Statistics of x, then the sums of all readers; returns nothing that anybody multiplies with."""
        form = self.columns[node["name"]]
        mu, sigma = self._statistics(node, x)
        sums = self._embedding_sums(node["name"], values) + sum(self._added(form["columns"], s) for s in spikes)
        given = (sums - mu * form["mean"]) / sigma + form["bias"]
        now, then = np.split(given, 2, axis=1)
        last = before.get(node["name"])
        after[node["name"]] = then
        total = now + (0 if last is None else last)
        ends = np.cumsum([len(self.weights[weight]) for _, _, weight in self.readers[node["name"]]])
        for (name, _, _), part in zip(self.readers[node["name"]], np.split(total, ends[:-1], axis=1)):
            values[name] = part
        return None

    def _embedding_sums(self, norm, values):
        """W m g ln0(e) for the embedding's spikes e: ln0 is a layer norm like the others, of e alone."""
        form, ln0 = self.columns[norm], self.by_name["ln0"]
        if "ln0_columns" not in form:
            g, b = self.weights[ln0["weight"]], self.weights[ln0["bias"]]
            form["ln0_columns"] = form["columns"] * g[:, None]
            form["ln0_mean"], form["ln0_bias"] = g @ form["columns"], b @ form["columns"]
        e = values[ln0["inputs"][0]]
        mu, sigma = self._statistics(ln0, e)
        return (self._added(form["ln0_columns"], e) - mu * form["ln0_mean"]) / sigma + form["ln0_bias"]

    def _added(self, columns, spikes):
        """The sum of the columns where spikes `(B, C)` are; the additions are counted here, where they are made."""
        sums = np.zeros((len(spikes), columns.shape[1]), self.dtype)
        for row in np.flatnonzero(self.reading):
            events = np.flatnonzero(spikes[row])
            sums[row] = columns[events].sum(axis=0)
            self.additions += len(events) * columns.shape[1]
        return sums

    def _product(self, node, x):
        """W x where x is real, or B of a gate: one column times one value for each that is not 0."""
        weight = self.weights[node["weight"]]
        count = int(np.count_nonzero(x[self.reading])) * len(weight)
        binary = self.by_name[node["inputs"][0]]["op"] == "lif"
        self.additions, self.products = self.additions + count * binary, self.products + count * (not binary)
        return x @ weight.T
