"""Spiking populations as NIR files that simulators run spike for spike.

Only Input, Linear, LIF and Output: other nodes are skipped in silence by one importer or refused by another. The
mapping is exact where one token is dt = 1e-4 s (fixed in snnTorch), tau is a power of two (Norse computes 1 / tau in
float32), the reset is hard and to 0, and the threshold lies one float32 below ours, because NIR fires above a threshold
and SpikeGPT at it. Where it would not be exact it is refused.
"""

import math

import nir
import numpy as np

from .graph import BINARY, levels_of

DT = 1e-4  # seconds a token


def no_island(node: dict) -> str | None:
    """Why NIR's LIF is not what a node does; None if it is, and the node gets islands."""
    if node["op"] == "integer_spikes":
        return "it gives integers, which are a population of NIR's LIFs"
    if node["op"] != "lif":
        return f"NIR has no node for its operation, {node['op']}"
    levels = levels_of(node)
    return None if levels == BINARY else f"NIR's LIF gives 0 and 1, and it gives {', '.join(map(str, levels))}"


def refusals(node: dict) -> list[str]:
    """Why simulators would not run the islands of a node exactly; empty if they do, or if it gets none."""
    if no_island(node):
        return []
    reasons, name = [], node["name"]
    taus = np.atleast_1d(node["tau"]).tolist()
    if any(math.frexp(tau)[0] != 0.5 for tau in taus):
        reasons.append(f"{name}: tau must be a power of two (1 / tau is rounded otherwise), got {taus[0]:g}")
    if node["v_reset"] is None:
        reasons.append(f"{name}: a soft reset (v_reset None) is not in NIR's LIF, which sets the membrane to v_reset")
    elif node["v_reset"] != 0:
        reasons.append(f"{name}: v_reset must be 0 (both simulators reset to 0), got {node['v_reset']:g}")
    return reasons


def island(node: dict, units: int, weight: np.ndarray | None = None, threshold=None) -> nir.NIRGraph:
    """One population: Input, Linear where `weight` `(units, m)` is given, LIF, Output.

    Args:
        node: the graph's "lif". threshold: in the file (default: `lowered`; every other is wrong at ties).

    Raises:
        ValueError: the population is not binary, or another neuron.
    """
    if reason := no_island(node):
        raise ValueError(f"{node['name']} can be no island: {reason}")
    threshold = lowered(node) if threshold is None else threshold
    lif = lif_node(units, node["tau"], threshold)
    nodes = {"input": input_node(units if weight is None else weight.shape[1])}
    if weight is not None:
        nodes["linear"] = nir.Linear(weight=weight.astype(np.float32))
    nodes |= {"lif": lif, "output": nir.Output({"output": np.array([units])})}
    names = list(nodes)
    metadata = {
        "population": node["name"], "dt": DT, "tau_steps": node["tau"], "v_threshold": node["v_threshold"],
        "fires": "at v_threshold; the file's threshold is the float32 below it, for simulators that fire above",
        "reset": "hard", "decay_input": True, "from_rest_every_token": node["from_rest"],
    }  # fmt: skip
    return nir.NIRGraph(nodes=nodes, edges=list(zip(names, names[1:])), metadata=metadata)


def lif_node(units: int, tau, threshold) -> nir.LIF:
    """NIR's LIF with tau in tokens; tau and threshold are one number or one a unit."""
    return nir.LIF(
        tau=np.broadcast_to(np.float64(tau) * DT, units).copy(),
        r=np.ones(units),
        v_leak=np.zeros(units),
        v_threshold=np.broadcast_to(np.float64(threshold), units).copy(),
        v_reset=np.zeros(units),
    )


def input_node(units: int) -> nir.Input:
    return nir.Input({"input": np.array([units])})


def lowered(node: dict) -> np.ndarray:
    """The float32 below a neuron's threshold, or those of its units: fired above it is fired at the threshold."""
    return np.nextafter(np.float32(node["v_threshold"]), np.float32(-np.inf))


def same(one: nir.NIRGraph, other: nir.NIRGraph) -> bool:
    """Whether two islands have the same nodes, edges, values and metadata."""
    if set(one.edges) != set(other.edges) or one.nodes.keys() != other.nodes.keys():
        return False
    pairs = [(one.nodes[name], node) for name, node in other.nodes.items()]
    return all(type(a) is type(b) and _equal(vars(a), vars(b)) for a, b in pairs) and _equal(
        one.metadata, other.metadata
    )


def _equal(one, other) -> bool:
    if isinstance(other, dict):
        return isinstance(one, dict) and one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in other)
    one = one.decode() if isinstance(one, bytes) else one
    return np.array_equal(np.asarray(one), np.asarray(other))
