"""The neuromorphic bundle: a classifier, its spikes on some sentences, and what proves that both belong together.

    manifest.json               versions, sha256 of every file, conventions, populations, what stays on the host
    manifest.json.sha256        of the manifest itself (`sha256sum -c` reads it)
    graph.json  weights.npz     every operation (graph.py), for interpreter.py
    sentences.npz               ids `(B, T)`, lengths, labels, tokens, words, and the model's logits
    islands/NAME.nir            the neurons of one population: Input (their current), LIF, Output
    islands/NAME.weights.nir    where a matrix stands right before them: Input, Linear, LIF, Output
    islands/NAME.path.nir       where integer neurons stand before that matrix: all three (encoders.py)
    traces.h5                   nir.read_data: of each population `spikes` (bool; int8 or int16 where they have other
                                levels than 0 and 1), `current` (float32; "emb" has none)
    events.npz                  the spikes as address events (events.py)
    cost.json                   counted operations, and energy as counts times constants (observe/operations.py)

`bundle.py` reads it. `check.py` needs nothing of the model to find out whether a bundle is what it says.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import cast

import nir
import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..convert.weights import WEIGHTS, quantized_copy
from ..observe.books import as_json
from ..observe.operations import count_operations
from ..observe.traces import SpikeTrace, record_spikes
from ..utils.files import UNFINISHED, whole_file, write_json
from . import islands
from .bundle import SCHEMAS, Bundle, spikes_type
from .event_driven import EventDriven, counts
from .events import save_events
from .files import islands_for
from .graph import INTEGER_SCHEMA, Graph, graph_of, levels_of, neurons_in
from .interpreter import Program
from .manifest import in_integers, statements, write_manifest
from .sentences import left_aligned
from .verify import Recorded, compare, in_float64, record_in_float64

PACKAGES = ("spikegpt_lora", "torch", "spikingjelly", "nir", "numpy")


def export_bundle(
    model: nn.Module,
    batch: Mapping,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    weights: str = "float32",
    event_driven: bool = False,
    progress: Callable[[list, str], Iterable] = lambda rounds, text: rounds,
) -> Path:
    """Write a bundle of a SpikeGPT classifier and what it does on `batch`; returns its folder.

    Args:
        model: float32, with or without LoRA or SpikeLoRA adapters. It stays as it is.
        batch: input_ids `(B, T)`, attention_mask, labels optional, as for `record_spikes`.
        directory: appears whole or not at all; must not exist.
        tokenizer: for tokens and words in readable form.
        weights: "float32", or "int8": matrices rounded to int8 times a power of two, in the bundle and in the model
            whose spikes are recorded.
        event_driven: run and count the event-driven form too, which takes about 30 ms a token.
        progress: wraps whatever takes long, as `progress(list, text)`; tqdm in recipes.

    Raises:
        FileExistsError: `directory` exists.
        ValueError: a model that the graph or the islands cannot hold exactly: another class, an unknown module, not
            float32, values that are not finite, a soft reset, tau not a power of two; a sentence without a token;
            spikes of other levels than a neuron names; the event-driven form of a model whose matrices read integer
            spikes. Or a graph that turns out not to compute what the model does.
    """
    directory = Path(directory)
    if directory.exists():
        raise FileExistsError(f"{directory} exists: give another folder for the bundle, or delete it")
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    model = quantized_copy(model, weights)
    graph = graph_of(model)
    _require_exportable(graph, event_driven)
    trace = record_spikes(model, batch, tokenizer, currents=True)
    _require_sentences(trace, len(graph.labels))
    _require_levels(trace, graph)
    cost = {"as_executed": as_json(count_operations(model, [batch]))}
    with _whole_folder(directory) as folder:
        _write(folder, graph, trace, batch, weights)
        recorded = record_in_float64(in_float64(model), batch, progress)  # the copy is ours
        checks = _compared(folder, in_integers(graph.nodes, weights), recorded, progress)
        if event_driven:
            cost["event_driven"] = _event_driven(folder, recorded, progress)
        write_json(folder / "cost.json", cost)
        write_manifest(folder, _manifest(trace, graph, weights) | {"checks": checks})
    return directory


def _require_exportable(graph: Graph, event_driven: bool) -> None:
    if event_driven and graph.schema == INTEGER_SCHEMA:
        raise ValueError(
            "the event-driven form turns products of real numbers into additions at spikes, and every matrix of this "
            "model reads integer spikes already: leave it out (cost.json counts its additions)"
        )
    if reasons := [reason for node in neurons_in(graph.nodes) for reason in islands.refusals(node)]:
        raise ValueError("simulators would not run this model's neurons exactly:\n" + "\n".join(reasons))


def _compared(folder: Path, in_integers: bool, recorded: Recorded, progress) -> dict[str, dict]:
    """The interpreter against the model in float64, and where it can be run so in integer arithmetic too."""
    checks = {"exported": compare(Program(folder, np.float64), recorded, "interpreter", progress)}
    if in_integers:
        program = Program(folder, np.float64, integers=True)
        checks["integers"] = compare(program, recorded, "interpreter in integers", progress)
    return checks


def _require_sentences(trace: SpikeTrace, classes: int) -> None:
    if not trace.lengths.all():
        raise ValueError(f"sentence {int(np.argmin(trace.lengths))} has no token: leave it out of the batch")
    if not np.issubdtype(trace.labels.dtype, np.integer) or trace.labels.max() >= classes:
        raise ValueError(f"labels must be whole numbers below {classes}, the classes, got {trace.labels.max()}")


def _require_levels(trace: SpikeTrace, graph: Graph) -> None:
    for node in graph.nodes:
        spikes, levels = trace.spikes.get(node["name"]), levels_of(node)
        if spikes is not None and not np.isin(spikes, [0, *levels]).all():
            values = ", ".join(map(str, np.unique(spikes)))
            raise ValueError(f"{node['name']} gives {values}, and its levels are {levels}: its node must name them all")


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`, which it becomes at the end; on an exception it is removed."""
    unfinished = folder.with_name(f"{UNFINISHED}{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an export that was killed
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished)
        raise


def _write(folder: Path, graph: Graph, trace: SpikeTrace, batch: Mapping, weights: str) -> None:
    """Every file of a bundle that is known without a second reading."""
    graph.save(folder, int8=weights == "int8")
    arrays = {name: getattr(trace, name) for name in ("logits", "lengths", "labels", "tokens", "words")}
    with whole_file(folder / "sentences.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, ids=left_aligned(batch)[0], **arrays)
    _save_traces(trace, graph, folder / "traces.h5")
    save_events(trace, folder / "events.npz")
    (folder / "islands").mkdir()
    for node in neurons_in(graph.nodes):
        units = trace.spikes[node["name"]].shape[-1]
        for name, island in islands_for(graph.nodes, node, units, graph.weights).items():
            nir.write(str(folder / "islands" / name), island)


def _event_driven(folder: Path, recorded: Recorded, progress: Callable[[list, str], Iterable]) -> dict:
    """What the event-driven form takes, and how it compares with the model."""
    program = EventDriven(folder, np.float64)
    compared = compare(program, recorded, "event-driven form", progress)
    return {**counts(program, compared["tokens"]), "compared": compared}


def _manifest(trace: SpikeTrace, graph: Graph, weights: str) -> dict:
    logits = cast(np.ndarray, trace.logits)  # a classifier's: they are recorded
    return {
        "schema": next(schema for schema, of in SCHEMAS.items() if of == graph.schema),
        "versions": {name: version(name) for name in PACKAGES},
        "weights": weights,
        **statements(trace, graph.nodes, graph.labels, logits),
    }


def first_difference(bundle: Bundle, model: nn.Module, batch: Mapping, weights: str, event_driven: bool) -> str | None:
    """What a bundle has that `export_bundle` with these arguments would write otherwise; None if nothing."""
    graph, (ids, lengths) = graph_of(quantized_copy(model, weights)), left_aligned(batch)
    given = batch["labels"].cpu().numpy() if "labels" in batch else np.full(len(ids), -1)
    same_weights = graph.weights.keys() == bundle.weights.keys() and all(
        np.array_equal(bundle.weights[name], weight) for name, weight in graph.weights.items()
    )
    differ = {
        "weights": bundle.manifest.get("weights") != weights or not same_weights,
        "neurons or class names": (bundle.nodes, bundle.classes) != (graph.nodes, graph.labels),
        "sentences": any(
            not np.array_equal(bundle.sentences[key], value)
            for key, value in (("ids", ids), ("lengths", lengths), ("labels", given))
        ),
        "event-driven form": ("event_driven" in bundle.cost) != event_driven,
    }
    return next((name for name, different in differ.items() if different), None)


def _save_traces(trace: SpikeTrace, graph: Graph, path: Path) -> None:
    nodes, types = {}, {node["name"]: spikes_type(node) for node in graph.nodes}
    for name, spikes in trace.spikes.items():
        seen = {"spikes": nir.TimeGriddedData(spikes.astype(types[name]), dt=1.0)}
        if name in trace.currents:
            seen["current"] = nir.TimeGriddedData(trace.currents[name], dt=1.0)
        nodes[name] = nir.NIRNodeData(seen)
    with whole_file(path) as temporary:
        nir.write_data(temporary, nir.NIRGraphData(nodes))
