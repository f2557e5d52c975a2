"""The event-driven form of a bundle: additions at spikes in place of products, and what they cost, counted as it runs.

The cost column stands beside the operations as executed and is never added to them. Counts are per real token:

    additions           columns of matrices added where neurons spiked, one for each of their rows (k for a spike of k)
    products            what reads no spikes: att.output, ffn.value (zeros skipped), B of graded gates
    rescaling           additions and products, no event decides about them: mean and deviation of the layer norms, now
                        for every row of the matrices behind them (as executed they are for every channel, and not
                        counted), and adding up what populations, current and previous give
    weight_reads        of 32 bit: every addition and product reads one value of a matrix or, rescaling, of a vector;
                        a dense product reads each weight once a token, so with a batch of one this compares
    arithmetic_energy   pJ: "fp32"; "int8" would be with columns rounded to int8, which are W times the gains of a layer
                        norm and the shares of the token shift, and were not rounded here. Rescaling is fp32 in both.
"""

import numpy as np

from ..observe.energy import ENERGY, memory_energy
from .interpreter import NEURONS, Program


class EventDriven(Program):
    """The same function with additions at spikes in place of every product W LN(x).

    x is a sum of spikes: the embedding's (through ln0) and those of the neurons before. So with LN(x) = g (x - mu)
    / sigma + b and the token shift's shares m, what a linear layer gives is

        W (m LN(x_t) + (1-m) LN(x_t-1)) = current(x_t) + previous(x_t-1)
        current(x) = (S - mu W m g 1) / sigma + W m b

    where S = W m g x grows by one column of W m g for each spike, by k of them for a spike of value k. All layers that
    read one LN share its events. What stays a product reads no spikes: att.output (sigmoid times WKV), ffn.value
    (squared ReLU, zeros are skipped), and B of a graded gate, one column times one value a spike.

    additions: so far, by (what reads, what spikes), counted where they are made. products: so far, by layer. rescaling:
    additions and products that turn sums into what layers give, whatever spikes.
    """

    def __init__(self, folder, dtype=np.float32):
        super().__init__(folder, dtype)
        self.additions, self.products = {}, {}
        self.rescaling = {"additions": 0, "products": 0}
        self.by_name = {node["name"]: node for node in self.nodes}
        if "ln0" not in self.by_name:
            raise ValueError(
                f"{folder} has no event-driven form: every matrix reads integer spikes already (cost.json counts them)"
            )
        self.embedding = self.by_name["ln0"]["inputs"][0]  # the population that ln0 reads
        self.readers = {}  # name of a layer norm -> the linear layers that read mixes of it: layer, share, weight
        for node in self.nodes:
            source = self.by_name.get(node["inputs"][0])
            if node["op"] == "linear" and source is not None and source["op"] == "mix":
                self.readers.setdefault(source["inputs"][0], []).append(
                    (node["name"], source["weight"], node["weight"])
                )
        self.forms = {name: self._form(name) for name in self.readers}

    def _form(self, norm):
        """Rows of `current` and `previous` for all readers of a layer norm, as columns to add, and what is constant."""
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
                values[name] = self.value(node, inputs, before, after)
            if name == "ln0":
                events[name] = []
            elif node["op"] == "add" and source in events:
                events[name] = [*events[source], node["inputs"][1]]
        return values

    def _norm(self, node, populations, values, before, after):
        """What all readers of this layer norm get, from its statistics and the sums at spikes."""
        name, form = node["name"], self.forms[node["name"]]
        sums = self._sum(name, self.embedding, form["ln0 columns"], values)
        sums = self._normed(self.by_name["ln0"], sums, form["ln0 constant"], values)
        for population in populations:
            sums = sums + self._sum(name, population, form["columns"], values)
            self._rescaled(sums, additions=1)
        current, previous = np.split(self._normed(node, sums, form["constant"], values), 2, axis=1)
        after[name] = previous
        total = current + before.get(name, 0)
        self._rescaled(current, additions=1)
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

    def _sum(self, norm, population, columns, values):
        """The columns `(C, rows)` times the spikes `(B, C)` of a population, `(B, rows)`."""
        spikes = values[population]
        sums = np.zeros((len(spikes), columns.shape[1]), self.dtype)
        for row in np.flatnonzero(self.reading):
            fired = np.flatnonzero(spikes[row])
            sums[row] = np.einsum("i,ij->j", spikes[row, fired], columns[fired])
        self._count(self.additions, (norm, population), np.abs(spikes).sum(axis=1), columns.shape[1])
        return sums

    def _product(self, node, x):
        """W x where x is real, or B of a gate: one column times one value for each that is not 0."""
        weight, source = self.weights[node["weight"]], node["inputs"][0]
        if self.by_name[source]["op"] in NEURONS:
            self._count(self.additions, (node["name"], source), np.abs(x).sum(axis=1), len(weight))
        else:
            self._count(self.products, node["name"], np.count_nonzero(x, axis=1), len(weight))
        return x @ weight.T

    def _count(self, made, key, columns, rows):
        """Add to `made` so many columns `(B,)` of so many rows, of the sentences that still go on."""
        made[key] = made.get(key, 0) + int(columns[self.reading].sum()) * rows


def counts(program: EventDriven, tokens: int) -> dict:
    """What `program` did in `tokens` tokens, by layer and in total."""
    layers = {name: {"additions": 0.0, "products": made / tokens} for name, made in program.products.items()}
    for (reader, _), made in program.additions.items():
        for name, share in _shares(program, reader):
            layers.setdefault(name, {"additions": 0.0, "products": 0.0})["additions"] += share * made / tokens
    additions, products = (sum(layer[kind] for layer in layers.values()) for kind in ("additions", "products"))
    rescaling = {kind: made / tokens for kind, made in program.rescaling.items()}
    rescaled = rescaling["additions"] * ENERGY["fp32_add"] + rescaling["products"] * ENERGY["fp32_multiply"]
    reads = additions + products + rescaling["products"]
    return {
        "additions": additions,
        "products": products,
        "rescaling": rescaling,
        "embedding_additions": sum(made for (_, of), made in program.additions.items() if of == program.embedding)
        / tokens,
        "layers": layers,
        "weight_reads": reads,
        "memory_energy": memory_energy(reads),
        "arithmetic_energy": {
            "fp32": additions * ENERGY["fp32_add"] + products * ENERGY["fp32_mac"] + rescaled,
            "int8": additions * ENERGY["int32_add"] + products * ENERGY["int8_mac"] + rescaled,  # sums are wide
        },
    }


def _shares(program: EventDriven, reader: str) -> list[tuple[str, float]]:
    """Of additions counted for a layer norm, the linear layers behind it and their share of the rows."""
    if reader not in program.readers:
        return [(reader, 1.0)]
    rows = {name: len(program.weights[weight]) for name, _, weight in program.readers[reader]}
    return [(name, size / sum(rows.values())) for name, size in rows.items()]
