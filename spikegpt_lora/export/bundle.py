"""A bundle as it lies in a folder: its files read as ones that nobody vouches for."""

import stat
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import nir
import numpy as np

from ..observe.traces import EMBEDDING, SpikeTrace
from ..utils.errors import read_json
from ..utils.npz import read_npz
from . import graph
from .events import EVENT
from .interpreter import Program
from .sentences import by_length
from .shapes import read_weights, sizes_of
from .untrusted import reading, require, require_plain_hdf5, room

SCHEMA = "spikegpt_lora/bundle/1"
INTEGER_SCHEMA = "spikegpt_lora/bundle/2"  # of models whose matrices read integer spikes
SCHEMAS = {SCHEMA: graph.SCHEMA, INTEGER_SCHEMA: graph.INTEGER_SCHEMA}  # and those of their graphs
PARTS = ("cost.json", "events.npz", "graph.json", "sentences.npz", "traces.h5", "weights.npz")  # beside islands/*.nir
LARGEST_JSON = 1 << 24  # bytes


def spikes_type(node: dict) -> type:
    """Of a population's spikes in traces.h5: bool; int8 where it has other levels than 0 and 1, int16 where a level
    does not fit in a byte."""
    levels = graph.levels_of(node)
    return bool if levels == graph.BINARY else np.int8 if levels[-1] < 128 else np.int16


def as_integers(spikes: np.ndarray) -> np.ndarray:
    """Recorded spikes as a `SpikeTrace` has them: int8, or int16 as they are."""
    return spikes if spikes.dtype == np.int16 else spikes.astype(np.int8)


class Bundle:
    """A bundle as it lies in a folder; its files are read when asked for, and only if they can be what they should.

    Raises:
        ValueError: no readable manifest.json of this schema there. What is read later raises DamagedFile, a ValueError.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            path = self.folder / "manifest.json"
            require(path, stat.S_ISREG(path.lstat().st_mode), "is no file")
            self.manifest = read_json(path, LARGEST_JSON)
            schema = self.manifest["schema"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder} is no bundle: its manifest.json cannot be read ({error})") from error
        if schema not in list(SCHEMAS):
            known = " and ".join(map(repr, SCHEMAS))
            raise ValueError(f"{folder} is a bundle of schema {schema!r:.80}; this version reads {known}")

    @cached_property
    def stored_graph(self) -> dict:
        content = self.json("graph.json")
        wanted = SCHEMAS[self.manifest["schema"]]
        require(self.folder / "graph.json", content.get("schema") == wanted, f"must be {wanted!r}")
        return content

    @property
    def integer(self) -> bool:
        """Whether the model's matrices read integer spikes."""
        return self.manifest["schema"] == INTEGER_SCHEMA

    @cached_property
    def sizes(self) -> dict[str, int]:
        """How many values each node of the graph gives for a token; it is known to fit the weights."""
        stored, weights, path = self.stored_graph, self.weights, self.folder / "graph.json"
        with reading(path):
            sizes = sizes_of(stored, weights)
            wanted = graph.schema_of(stored["nodes"])
            require(path, stored["schema"] == wanted, f"must be {wanted!r}, by its operations")
        return sizes

    @property
    def nodes(self) -> list[dict]:
        self.sizes  # noqa: B018 - a graph that cannot be run is no list of nodes
        return self.stored_graph["nodes"]

    @property
    def classes(self) -> list[str]:
        return self.stored_graph["labels"]

    @cached_property
    def stored_weights(self) -> dict[str, np.ndarray]:
        path = self.folder / "weights.npz"
        return read_npz(path, room(path))

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """float32, by name."""
        path = self.folder / "weights.npz"
        return read_weights(path, self.stored_weights)

    @cached_property
    def program(self) -> Program:
        """The interpreter in float32, with the weights."""
        self.sizes  # noqa: B018 - as above
        return Program(self.folder, np.float32)

    @cached_property
    def neurons(self) -> list[dict]:
        return graph.neurons_in(self.nodes)

    @cached_property
    def sentences(self) -> dict[str, np.ndarray]:
        """ids, tokens, words `(B, T)`; lengths, labels `(B,)`; logits `(B, classes)`."""
        path = self.folder / "sentences.npz"
        found = read_npz(path, room(path))
        with reading(path):
            _require_sentences(path, found, len(self.weights[self.nodes[0]["weight"]]), len(self.classes))
        return found

    @cached_property
    def traces(self) -> dict[str, dict[str, np.ndarray]]:
        """Of each population `spikes` (`spikes_type`) and `current` float32, both `(B, T, n)`."""
        path = self.folder / "traces.h5"
        require_plain_hdf5(path)
        with reading(path):
            data = nir.read_data(str(path))
            dts = {grid.dt for node in data.nodes.values() for grid in node.observables.values()}
            require(path, dts == {1.0}, "must have a step of 1, a token, in all of its observables")
            found = {name: {k: grid.data for k, grid in node.observables.items()} for name, node in data.nodes.items()}
            wanted = {node["name"]: ("spikes", "current") for node in self.neurons} | {EMBEDDING: ("spikes",)}
            require(path, found.keys() == wanted.keys(), "has other populations than the graph has neurons")
            for name, kinds in wanted.items():
                require(path, found[name].keys() == set(kinds), f"must have {' and '.join(kinds)} of {name}")
                self._require_trace(path, name, found[name])
        return found

    def _require_trace(self, path: Path, name: str, found: dict[str, np.ndarray]) -> None:
        """Raise unless what was recorded of a population has its type, shape and levels, and zeros behind the ends."""
        node = next(node for node in self.nodes if node["name"] == name)
        types, shape = {"spikes": spikes_type(node), "current": np.float32}, (*self.real.shape, self.sizes[name])
        for kind, array in found.items():
            _require_array(path, f"{kind} of {name}", array, (types[kind],), shape)
            silent = ~array.any(axis=-1) | self.real
            require(path, bool(silent.all()), f"has {kind} of {name} behind a sentence's end")
        levels = graph.levels_of(node)
        possible = bool(np.isin(found["spikes"], [0, *levels]).all())
        require(path, possible, f"has spikes of {name} that are none of {levels}")

    @cached_property
    def events(self) -> tuple[np.ndarray, list[str]]:
        """The records of events.npz, and which population each number is."""
        path = self.folder / "events.npz"
        found = read_npz(path, room(path))
        with reading(path):
            require(path, found.keys() == {"events", "populations", "sizes"}, "must hold events, populations and sizes")
            events, names = found["events"], found["populations"].tolist()
            require(path, events.dtype == EVENT and events.ndim == 1, f"must hold records of type {EVENT}")
            sizes = [self.sizes.get(name) for name in names]
            right = sorted(names) == sorted(self.traces) and found["sizes"].tolist() == sizes
            require(path, right, "has other populations or sizes than traces.h5")
            for key, end in zip(("sample", "t", "population"), (*self.real.shape, len(names))):
                require(path, _within(events[key], 0, end), f"has an event whose {key} is none of 0 to {end - 1}")
            ends = np.array(sizes)[events["population"]]
            require(path, _within(events["index"], 0, ends), "has an event of a neuron that its population has not")
        return events, names

    @cached_property
    def real(self) -> np.ndarray:
        """bool `(B, T)`: where there is a token."""
        lengths = self.sentences["lengths"]
        return np.arange(self.sentences["ids"].shape[1]) < lengths[:, None]

    @cached_property
    def trace(self) -> SpikeTrace:
        """The same as a `SpikeTrace`, populations in the order of events.npz."""
        names = self.events[1]
        graded = [node["inputs"][0] for node in self.nodes if node["name"] == f"{node['inputs'][0]}.graded"]
        spikes = {name: as_integers(self.traces[name]["spikes"]) for name in names}
        values = {name: self.traces[name]["current"] * spikes[name] for name in names if name in graded}
        given: dict[str, Any] = {key: self.sentences[key] for key in ("lengths", "tokens", "words", "labels")}
        return SpikeTrace(spikes, values, **given)

    @cached_property
    def cost(self) -> dict:
        return self.json("cost.json")

    @cached_property
    def islands(self) -> dict[str, nir.NIRGraph]:
        """By file name."""
        found = {}
        for path in sorted((self.folder / "islands").glob("*.nir")):
            require_plain_hdf5(path)
            with reading(path):
                found[path.name] = nir.read(path)
        return found

    def json(self, name: str) -> dict:
        with reading(self.folder / name):
            return read_json(self.folder / name, LARGEST_JSON)

    def rows(self) -> Iterator[tuple[np.ndarray, int]]:
        """Sentences in groups of like length: row numbers, and the longest one's length."""
        for rows in by_length(self.sentences["lengths"]):
            yield rows, int(self.sentences["lengths"][rows].max())


def _require_sentences(path: Path, found: dict, vocabulary: int, classes: int) -> None:
    """Raise unless arrays of sentences have the types and shapes that they should, and ids are in the vocabulary."""
    wanted = {"ids", "lengths", "labels", "tokens", "words", "logits"}
    require(path, found.keys() == wanted, f"must hold {', '.join(sorted(wanted))}")
    ids, lengths = found["ids"], found["lengths"]
    _require_array(path, "ids", ids, (np.integer,), ids.shape)
    require(path, ids.ndim == 2 and ids.size > 0, f"must have ids of shape (B, T), got {ids.shape}")
    for name in ("lengths", "labels"):
        _require_array(path, name, found[name], (np.integer,), ids.shape[:1])
    for name in ("tokens", "words"):
        _require_array(path, name, found[name], (np.str_,), ids.shape)
    _require_array(path, "logits", found["logits"], (np.floating,), (len(ids), classes))
    right = _within(lengths, 1, ids.shape[1] + 1) and lengths.max() == ids.shape[1]
    require(path, right, f"must have lengths of 1 to {ids.shape[1]} tokens, the longest among them")
    require(path, _within(ids, 0, vocabulary), f"must have ids of 0 to {vocabulary - 1}, the rows of emb")
    require(path, _within(found["labels"], -(1 << 31), classes), f"must have labels below {classes}, the classes")
    behind = np.arange(ids.shape[1]) >= lengths[:, None]
    for name, nothing in (("ids", 0), ("tokens", ""), ("words", "")):
        require(path, bool((found[name][behind] == nothing).all()), f"has {name} behind a sentence's end")


def _require_array(path: Path, name: str, array: np.ndarray, kinds: tuple, shape: tuple) -> None:
    right = any(np.issubdtype(array.dtype, kind) for kind in kinds) and array.shape == shape
    require(path, right, f"must have {name} as {kinds[0].__name__} {shape}, got {array.dtype} {array.shape}")


def _within(values: np.ndarray, first: int, end) -> bool:
    return bool(((values >= first) & (values < end)).all())
