"""Which NIR files a bundle's islands/ holds, and what is in each.

NAME.nir            a population alone (islands.py; of integer spikes encoders.py)
NAME.weights.nir    with the matrices before it, where they stand right before it
NAME.path.nir       integer neurons, the matrix that reads them, and this population behind it
"""

from collections.abc import Mapping

import nir
import numpy as np

from .encoders import encoder_graph, path_graph
from .graph import weights_before
from .islands import island, no_island

INTEGER = "integer_spikes"


def island_names(nodes: list[dict], node: dict) -> list[str]:
    """Names of a population's files, without islands/; none of what no simulator runs."""
    name = node["name"]
    if node["op"] == INTEGER:
        return [f"{name}.nir"]
    if no_island(node):
        return []
    parts = weights_before(nodes, node)
    return [f"{name}.nir", *[f"{name}.weights.nir"] * bool(parts), *[f"{name}.path.nir"] * bool(path_to(nodes, node))]


def path_to(nodes: list[dict], node: dict) -> tuple[dict, str] | None:
    """The integer neurons before the one matrix before a "lif", and that matrix' name; None if there are none."""
    parts = weights_before(nodes, node) if node["op"] == "lif" else []
    if len(parts) != 1:
        return None
    source = next((other for other in nodes if other["name"] == parts[0][0]), None)
    return (source, parts[0][1]) if source is not None and source["op"] == INTEGER else None


def islands_for(
    nodes: list[dict], node: dict, units: int, weights: Mapping[str, np.ndarray]
) -> dict[str, nir.NIRGraph]:
    """A population's files by name, as `island_names` has them.

    Args:
        nodes: the whole graph's. units: of the population. weights: by name.
    """
    graphs: dict[str, nir.NIRGraph] = {}
    for file in island_names(nodes, node):
        if node["op"] == INTEGER:
            graphs[file] = encoder_graph(node)
        elif file.endswith(".path.nir"):
            source, weight = path_to(nodes, node) or ({}, "")
            graphs[file] = path_graph(source, weights[weight], node)
        elif file.endswith(".weights.nir"):
            parts = [weights[name] for _, name in weights_before(nodes, node)]
            graphs[file] = island(node, units, np.concatenate(parts, axis=1))
        else:
            graphs[file] = island(node, units)
    return graphs
