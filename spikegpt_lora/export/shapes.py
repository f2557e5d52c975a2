"""Checks that a graph can be run: every operation is known, has its parameters, and fits its inputs."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..observe.traces import EMBEDDING
from ..utils.errors import DamagedFile
from . import islands
from .graph import BINARY
from .interpreter import NEURONS
from .untrusted import require

MOST = 20_000  # operations
MOST_SPIKES = 127  # of an integer neuron
EQUAL = ("mix", "wkv", "wkv_powers_of_two", "multiply", "add")  # operations of two inputs of one size
SAME = (
    "layernorm",
    "delay",
    "sigmoid",
    "squared_relu",
    "pool",
    "gain",
    "centre",
    "pool_rows",
)  # of one input; their output is as large
VECTORS = {
    "layernorm": ("weight", "bias"), "mix": ("weight",), "wkv": ("decay", "first"), "wkv_powers_of_two":
    ("decay", "first"), "gain": ("weight",), "centre": ("weight",), "statistics": ("offset",),
}  # fmt: skip  # weights of that size
MOMENTS = 2  # values that "statistics" gives
POOLING = {"last": 1, "mean": 1, "last_mean": 2}  # vectors that the classifier reads


def sizes_of(graph: Mapping, weights: Mapping[str, np.ndarray]) -> dict[str, int]:
    """How many values each node of a graph.json gives for a token, by name.

    Raises:
        DamagedFile: for the first node that could not be run, with its name and the reason.
    """
    nodes, labels = graph.get("nodes"), graph.get("labels")
    _require(isinstance(nodes, list) and 0 < len(nodes) <= MOST, f"nodes must be a list of 1 to {MOST:,} operations")
    _require(_texts(labels) and labels, "labels must be a list of class names")
    sizes: dict[str, int] = {}
    used: set[str] = set()
    for place, node in enumerate(nodes):
        _require(isinstance(node, dict), f"node {place} must be an object")
        name = node.get("name")
        _require(isinstance(name, str) and name not in {*sizes, "token"}, f"node {place} must have a name of its own")
        try:
            sizes[name] = _Node(node, sizes, weights, used).size(len(labels))
        except DamagedFile as error:
            raise DamagedFile(f"{error}, in node {name}") from error
    embed, pool = ([n["name"] for n in nodes if n["op"] in ops] for ops in (("embed_spike",), ("pool", "pool_rows")))
    _require(embed == [EMBEDDING], f"{EMBEDDING} alone must be an embed_spike, got {embed}")
    _require(pool == [nodes[-1]["name"]], f"the last node alone must be a pool, got {pool}")
    _require(used == set(weights), f"no node reads {', '.join(sorted(set(weights) - used)[:3])} of weights.npz")
    return sizes


class _Node:
    """One node beside what was found of those before it: `used` grows by the weights that it reads."""

    def __init__(self, node: dict, sizes: dict[str, int], weights: Mapping[str, np.ndarray], used: set[str]):
        self.node, self.sizes, self.weights, self.used = node, sizes, weights, used
        self.op, self.inputs = node.get("op"), node.get("inputs")

    def size(self, labels: int) -> int:
        known = (*EQUAL, *SAME, *NEURONS, "embed_spike", "linear", "statistics", "normalise")
        _require(isinstance(self.op, str) and self.op in known, f"unknown operation {self.op!r}")
        count = 2 if self.op in (*EQUAL, "normalise") else 1
        _require(_texts(self.inputs) and len(self.inputs) == count, f"{self.op} must have {count} inputs")
        if self.op == "embed_spike":
            _require(self.inputs == ["token"], "embed_spike must read token")
            return self.shape("weight", 2)[1]
        for name in self.inputs:
            _require(name in self.sizes, f"{name} must stand before what reads it")
        sizes = [self.sizes[name] for name in self.inputs]
        if self.op == "normalise":
            return self.normalise(*sizes)
        _require(len(set(sizes)) == 1, f"inputs must be of one size, got {sizes}")
        for key in (*VECTORS.get(self.op, ()), *["offset"] * (self.op == "layernorm" and "offset" in self.node)):
            _require(self.shape(key, 1) == (sizes[0],), f"{key} must be {(sizes[0],)}, got {self.shape(key, 1)}")
        if self.op == "linear":
            shape = self.shape("weight", 2)
            _require(shape[1] == sizes[0], f"weight must be (n, {sizes[0]}), got {shape}")
            return shape[0]
        self.settings(sizes[0], labels)
        return MOMENTS if self.op == "statistics" else sizes[0]

    def normalise(self, rows: int, moments: int) -> int:
        shape = self.shape("weight", 2)
        right = shape[0] == rows and moments == MOMENTS
        _require(right, f"weight must have {rows} rows, and the second input must be a statistics, got {shape}")
        for key in ("offset", "centre", "bias"):
            _require(self.shape(key, 1) == shape[1:], f"{key} must be {shape[1:]}, got {self.shape(key, 1)}")
        return rows

    def shape(self, key: str, dimensions: int) -> tuple[int, ...]:
        name = self.node.get(key)
        _require(isinstance(name, str) and name in self.weights, f"{key} must be in weights.npz, got {name!r}")
        self.used.add(name)
        shape = self.weights[name].shape
        _require(len(shape) == dimensions and 0 not in shape, f"{key} must have {dimensions} dimensions, got {shape}")
        return shape

    def settings(self, size: int, labels: int) -> None:
        node = self.node
        if self.op in ("layernorm", "statistics"):
            _require(_number(node.get("eps")) and node["eps"] >= 0, f"eps must be >= 0, got {node.get('eps')!r}")
        elif self.op == "pool":
            _require(node.get("kind") in list(POOLING), f"kind must be one of {', '.join(POOLING)}")
            shape, wanted = self.shape("weight", 2), (labels, size * POOLING[node["kind"]])
            _require(shape == wanted, f"weight must be {wanted}, got {shape}")
        elif self.op == "pool_rows":
            _require(node.get("kind") in list(POOLING), f"kind must be one of {', '.join(POOLING)}")
            rows = labels * POOLING[node["kind"]]
            _require(size == rows, f"the rows pooled must be {rows}, got {size}")
        elif self.op == "integer_spikes":
            self.integers(size)
        elif self.op in NEURONS:
            self.neurons(size)

    def integers(self, size: int) -> None:
        scale, most = (self.node.get(key) for key in ("scale", "most"))
        for values, rule, right in (
            (scale, "scale must be numbers above 0", lambda one: _number(one) and one > 0),
            (most, f"most must be whole numbers of 1 to {MOST_SPIKES}", lambda one: _whole(one, MOST_SPIKES)),
        ):
            listed = isinstance(values, list) and len(values) == size
            _require(listed and all(map(right, values or [])), f"{rule}, {size} of them")
        signed, squared = (self.node.get(key) for key in ("signed", "squared"))
        kinds = isinstance(signed, bool) and isinstance(squared, bool) and not (signed and squared)
        _require(kinds, "signed and squared must be true or false, and not both true")
        counts = range(-max(most) if signed else 0, max(most) + 1)
        levels = [k * k for k in counts] if squared else list(counts)
        _require(self.node.get("levels", BINARY) == levels, f"levels must be {levels}, by most, signed and squared")

    def neurons(self, size: int) -> None:
        node, levels = self.node, self.node.get("levels", BINARY)
        for key in ("tau", "v_threshold"):
            values = node.get(key)
            several = isinstance(values, list) and len(values) == size and all(map(_number, values))
            _require(_number(values) or several, f"{key} must be a number, or {size} of them")
        _require(isinstance(node.get("from_rest"), bool), "from_rest must be true or false")
        _require(node.get("v_reset") is None or _number(node["v_reset"]), "v_reset must be a number")
        whole = isinstance(levels, list) and all(type(level) is int and -128 <= level < 128 for level in levels)
        rising = whole and len(levels) > 1 and levels == sorted(set(levels))
        _require(rising, f"levels must be whole numbers of -128 to 127 in rising order, got {levels!r:.80}")
        for reason in islands.refusals(node):
            raise DamagedFile(f"graph.json: {reason}")


def read_weights(path: Path, stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a weights.npz as the interpreter takes them, float32; int8 ones times their power of two.

    Raises:
        DamagedFile: another type, a scale that is no power of two, or values that are not finite.
    """
    weights = {}
    for name, array in stored.items():
        if name.endswith("/scale"):
            require(path, name.removesuffix("/scale") in stored, f"holds {name}, the scale of nothing")
            continue
        scale = stored.get(f"{name}/scale")
        if scale is not None:
            fits = scale.dtype == np.float32 and scale.shape == () and math.frexp(float(scale))[0] == 0.5
            require(path, fits and array.dtype == np.int8, f"must hold {name} as int8 times a float32 power of two")
            array = array.astype(np.float32) * scale
        require(path, array.dtype == np.float32, f"must hold {name} as float32, got {array.dtype}")
        require(path, np.isfinite(array).all(), f"holds values that are not finite in {name}")
        weights[name] = array
    return weights


def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _whole(value, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise DamagedFile(f"graph.json: {reason}")
