"""What a bundle's manifest says: what graph and traces say too, and the hash of every file."""

import hashlib
from pathlib import Path

import numpy as np

from ..observe.traces import SpikeTrace
from ..utils.files import write_json, write_text
from .files import INTEGER, island_names
from .graph import BINARY, INTEGER_SCHEMA, levels_of, read_real_numbers, schema_of, weights_before

MANIFEST = ("manifest.json", "manifest.json.sha256")
CONVENTIONS = {
    "time step": "one token: dt = 1e-4 s in .nir files, 1 in traces.h5",
    "tau": "in tokens; in .nir files times 1e-4 s",
    "order": "charge, fire, reset",
    "charge": "h = v + (x - (v - v_reset)) / tau",
    "fire": "h >= v_threshold; in .nir files h > the float32 below it",
    "reset": "v = v_reset where it fired, else h",
    "start": "v = v_reset before a sentence's first token; populations with from_rest: before every token",
    "arrays": "sentences left-aligned, zeros behind their ends",
}

OF_INTEGERS = {
    "integer spikes": "u = current / scale, k = floor(u + 1/2) between the outermost levels; sent is k, or k^2",
    "scale": "what a spike of each channel stands for is in the matrix that reads it, in graph.json and .nir files",
    "population": "in .nir files an integer neuron is one memoryless LIF a level, its input u and 1; +-k fires with "
    "those below it, and what a spike counts, 1, -1 or 2k - 1, is in the matrix of the .path.nir file",
}


def statements(trace: SpikeTrace, nodes: list[dict], classes: list[str], logits: np.ndarray) -> dict:
    """What the manifest says that graph and traces say too."""
    return {
        "sentences": len(trace.lengths),
        "tokens": int(trace.lengths.sum()),
        "classes": classes,
        "labelled": int((trace.labels >= 0).sum()),
        "right": int((trace.labels == logits.argmax(axis=1)).sum()),
        "conventions": CONVENTIONS | (OF_INTEGERS if schema_of(nodes) == INTEGER_SCHEMA else {}),
        "populations": [population(trace, name, nodes) for name in trace.spikes],
        "host": _host(nodes),
    }


def in_integers(nodes: list[dict], weights: str) -> bool:
    """Whether every matrix reads integers and is int8, so that the interpreter can run in integer arithmetic."""
    return weights == "int8" and schema_of(nodes) == INTEGER_SCHEMA and not read_real_numbers(nodes)


def population(trace: SpikeTrace, name: str, nodes: list[dict]) -> dict:
    """What the manifest says of one population."""
    node = next(node for node in nodes if node["name"] == name)
    levels = "binary" if levels_of(node) == BINARY else "integer"
    said = {
        "name": name,
        "n": trace.spikes[name].shape[-1],
        "kind": "graded" if name in trace.values else levels,
        "from_rest": node.get("from_rest", True),  # the embedding has no state
        "islands": [f"islands/{file}" for file in island_names(nodes, node)],
        "firing_rate": trace.firing_rate(name),
        "spikes_per_token": trace.spikes_per_token(name),
    }
    return said | ({"levels": levels_of(node)} if node["op"] == INTEGER else {})


def _host(nodes: list[dict]) -> dict:
    """The operations that are in no island, by kind."""
    islands = [node for node in nodes if island_names(nodes, node)]
    inside = {weight for node in islands if node["op"] != INTEGER for _, weight in weights_before(nodes, node)}
    operations: dict[str, list[str]] = {}
    for node in nodes:
        if node not in islands and node.get("weight") not in inside:
            operations.setdefault(node["op"], []).append(node["name"])
    return {
        "operations": operations,
        "why": "NIR has no LayerNorm, exponential, division or product of two signals, and simulators no delay; "
        "graph.json has all of it, in order, and interpreter.py runs it",
    }


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write the manifest with the hash of every other file by its path in the bundle, and its own beside it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in MANIFEST)
    hashes = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    write_json(folder / "manifest.json", manifest | {"sha256": hashes})
    write_text(folder / "manifest.json.sha256", own_hash(folder))


def own_hash(folder: Path) -> str:
    """What manifest.json.sha256 holds: the sha256 of the manifest in `folder`, as a line that `sha256sum -c` reads."""
    return f"{sha256(folder / 'manifest.json')}  manifest.json\n"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
