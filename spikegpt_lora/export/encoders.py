"""Integer neurons as populations of memoryless LIFs in NIR, one a level and channel, and the path through a matrix.

    [u, 1] -> Linear [+-I | 3/2 - k] -> LIF (tau = dt, r = 1, v_leak = v_reset = 0) -> sum of +-1, or of 2k - 1

u = current / scale is made outside, a number a channel and token; the constant 1 carries what a bias would, so that
Input, Linear, LIF and Output are enough. Neuron k of a channel fires at u >= k - 1/2, that of -k at u < 1/2 - k, so
that the signs of those that fire add up to floor(u + 1/2) between the outermost levels. Squares: neuron k counts
2k - 1, for 1 + 3 + ... + (2k - 1) = k^2.

All of it is exact in float32. A simulator fires above the file's threshold, the float32 below 1; near a level's step u
and its bias cancel without rounding. At u = 1/2 - k itself neuron -k must not fire: its bias is a rounding step lower.
"""

import nir
import numpy as np

from .islands import DT, input_node, lif_node, lowered

ONE = {"v_threshold": 1.0}


class Population:
    """The neurons of an "integer_spikes" node, P of them: by sign, then level, then channel.

    sign, level, channel: `(P,)`. value: what a spike of each counts, `(P,)`. channels: how many there are.
    """

    def __init__(self, node: dict) -> None:
        most = np.asarray(node["most"], int)
        levels = [(s, k) for s in ((1, -1) if node["signed"] else (1,)) for k in range(1, int(most.max()) + 1)]
        found = [(s, k, np.flatnonzero(most >= k)) for s, k in levels]
        self.sign = np.concatenate([np.full(len(at), s) for s, _, at in found])
        self.level = np.concatenate([np.full(len(at), k) for _, k, at in found])
        self.channel = np.concatenate([at for _, _, at in found])
        self.value = 2 * self.level - 1 if node["squared"] else self.sign
        self.channels = len(most)

    def encoder(self) -> np.ndarray:
        """`(P, channels + 1)` float32: what each neuron makes of [u, 1]."""
        weight = np.zeros((len(self.sign), self.channels + 1), np.float32)
        weight[np.arange(len(self.sign)), self.channel] = self.sign
        bias = np.float32(1.5) - self.level.astype(np.float32)
        lower = bias - np.maximum(np.spacing(np.abs(bias)), np.float32(2.0**-24))
        weight[:, -1] = np.where(self.sign > 0, bias, lower)
        return weight

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """`(rows, P)`: what a matrix `(rows, channels)` makes of the neurons' spikes."""
        return weight[:, self.channel] * self.value.astype(weight.dtype)

    def integers(self, spikes: np.ndarray) -> np.ndarray:
        """Integers `(B, T, channels)` of spikes `(B, T, P)`."""
        sums = np.zeros((*spikes.shape[:2], self.channels), np.int32)
        for s, k in dict.fromkeys(zip(self.sign.tolist(), self.level.tolist())):
            mine = np.flatnonzero((self.sign == s) & (self.level == k))
            sums[..., self.channel[mine]] += spikes[..., mine] * int(self.value[mine[0]])
        return sums


def drive(node: dict, current: np.ndarray) -> np.ndarray:
    """[u, 1] `(B, T, channels + 1)` float32 for the currents `(B, T, channels)` of an integer neuron."""
    u = current / np.asarray(node["scale"], current.dtype)
    return np.concatenate([u, np.ones_like(u[..., :1])], axis=-1).astype(np.float32)


def encoder_graph(node: dict, threshold: float | None = None) -> nir.NIRGraph:
    """A population alone: Input [u, 1], Linear, LIF, Output. threshold: as in `path_graph`."""
    return _graph(_encoding(node, threshold), _metadata(node))


def path_graph(
    node: dict, weight: np.ndarray, lif: dict, threshold: float | None = None, last: float | None = None
) -> nir.NIRGraph:
    """Neuron, matrix, neuron: Input [u, 1], Linear, LIF, Linear (W times what a spike counts), LIF, Output.

    Args:
        node: "integer_spikes". weight: the matrix that reads them, `(rows, channels)`. lif: the "lif" it feeds.
        threshold, last: of the population, and of the last neurons, in the file (default: the float32 below theirs).
    """
    nodes, rows = _encoding(node, threshold), len(weight)
    nodes["matrix"] = nir.Linear(weight=Population(node).matrix(weight).astype(np.float32))
    nodes["lif"] = lif_node(rows, lif["tau"], lowered(lif) if last is None else last)
    return _graph(nodes, _metadata(node) | {"to": lif["name"], "tau_steps": lif["tau"]})


def _encoding(node: dict, threshold: float | None) -> dict:
    weight = Population(node).encoder()
    return {
        "input": input_node(weight.shape[1]),
        "encoder": nir.Linear(weight=weight),
        "population": lif_node(len(weight), 1.0, lowered(ONE) if threshold is None else threshold),
    }


def _graph(nodes: dict, metadata: dict) -> nir.NIRGraph:
    units = nodes[list(nodes)[-1]].v_threshold.size
    nodes = nodes | {"output": nir.Output({"output": np.array([units])})}
    names = list(nodes)
    return nir.NIRGraph(nodes=nodes, edges=list(zip(names, names[1:])), metadata=metadata)


def _metadata(node: dict) -> dict:
    return {
        "population": node["name"], "dt": DT, "input": "current / scale of each channel, and 1",
        "neurons": "by sign, then level, then channel", "counts": "2k - 1" if node["squared"] else "the sign",
        "fires": "at 1; the file's threshold is the float32 below it, for simulators that fire above",
    }  # fmt: skip
