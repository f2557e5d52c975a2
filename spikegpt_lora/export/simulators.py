"""The simulators that run islands: spikes of an island, and whether a wrong island would be seen."""

import contextlib
import io
import warnings
from importlib.metadata import PackageNotFoundError, version

import nir
import numpy as np
import torch

from .encoders import Population, drive, encoder_graph, path_graph
from .interpreter import NEURONS
from .islands import DT, input_node, island, lif_node, lowered

SIMULATORS = {"snnTorch": "snntorch", "Norse": "norse", "spikingjelly": "spikingjelly"}  # and their packages
IMPORTER = "nirtorch"  # which all of them need to read NIR files
FROM_REST = ("Norse", "spikingjelly")  # memoryless neurons every token: Norse's v + (x - v) is x but for rounding
NEEDS_LEAK = ("spikingjelly",)  # those that take no tau of one step
FIRE_AT = ("spikingjelly",)  # those that fire at the file's threshold, not above it


def installed() -> dict[str, str]:
    """The simulators that are here and can read NIR files, and their versions."""
    found = {}
    for name, package in SIMULATORS.items():
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(package) if version(IMPORTER) else None
    return found


@torch.no_grad()
def replay(simulator: str, graph: nir.NIRGraph, inputs: np.ndarray, from_rest: bool = False) -> np.ndarray:
    """Spikes (bool) `(B, T, n)` of an island for float32 inputs `(B, T, m)`, in a simulator of `SIMULATORS`.

    Args:
        from_rest: every token is a first step.
    """
    rows = torch.from_numpy(np.ascontiguousarray(inputs, np.float32))
    if from_rest:
        rows = rows.flatten(0, 1)[:, None]
    with _silent():
        step = {"snnTorch": _snntorch, "Norse": _norse, "spikingjelly": _spikingjelly}[simulator](graph)
    spikes = torch.stack([step(rows[:, t]) for t in range(rows.shape[1])], dim=1)
    return (spikes != 0).view(*inputs.shape[:2], -1).numpy()


def _snntorch(graph):
    from snntorch.import_nir import import_from_nir  # an optional package: extra "export"

    network = import_from_nir(graph)  # a new one: its neurons keep their membranes inside
    return lambda x: network(x)[0]


def _norse(graph):
    from norse.torch import from_nir

    return _carrying(from_nir(graph, dt=DT))


def _spikingjelly(graph):
    from spikingjelly.activation_based.nir_exchange import import_from_nir  # needs nirtorch, of the same extra

    return _carrying(import_from_nir(graph, dt=DT))


def _carrying(network):
    """A step of a network that takes its state and gives it back."""
    state = None

    def step(x):
        nonlocal state
        spikes, state = network(x, state)
        return spikes

    return step


@contextlib.contextmanager
def _silent():
    """Importers print what they do, and warn of what torch deprecated."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def replay_integers(simulator: str, node: dict, graph: nir.NIRGraph, currents: np.ndarray) -> np.ndarray:
    """Integers `(B, T, n)` of a population of integer neurons (`encoders.encoder_graph`) for currents `(B, T, n)`."""
    return Population(node).integers(_replay_population(simulator, graph, drive(node, currents)))


def replay_path(
    simulator: str, node: dict, graph: nir.NIRGraph, currents: np.ndarray, from_rest: bool = False
) -> np.ndarray:
    """Spikes (bool) `(B, T, rows)` behind neuron, matrix and neuron (`encoders.path_graph`) for the first neurons'
    currents `(B, T, n)`: in one network, or where the simulator needs it in one for each half of the file.

    Args:
        from_rest: of the last neurons, as for `replay`.
    """
    rows = drive(node, currents)
    if simulator not in FROM_REST:
        return replay(simulator, graph, rows, from_rest)
    first, last = (_part(graph, names) for names in (("encoder", "population"), ("matrix", "lif")))
    return replay(simulator, last, _replay_population(simulator, first, rows).astype(np.float32), from_rest)


def _replay_population(simulator: str, graph: nir.NIRGraph, rows: np.ndarray) -> np.ndarray:
    graph = _with_leak(graph) if simulator in NEEDS_LEAK else graph
    return replay(simulator, graph, rows, from_rest=simulator in FROM_REST)


def _part(graph: nir.NIRGraph, names: tuple[str, str]) -> nir.NIRGraph:
    """A Linear and a LIF of a file, with an input and an output of their own."""
    linear, lif = (graph.nodes[name] for name in names)
    nodes = {"input": input_node(linear.weight.shape[1])} | {name: graph.nodes[name] for name in names}
    nodes["output"] = nir.Output({"output": np.array([lif.v_threshold.size])})
    order = list(nodes)
    return nir.NIRGraph(nodes=nodes, edges=list(zip(order, order[1:])))


def _with_leak(graph: nir.NIRGraph) -> nir.NIRGraph:
    """The same memoryless neurons for a simulator that takes no tau of one step and fires at the threshold: tau twice
    as long and weights twice as large, every token from rest, and the threshold one float32 higher."""
    names = [name for name in graph.nodes if name not in ("input", "output")]
    part = _part(graph, (names[0], names[1]))
    linear, lif = part.nodes[names[0]], part.nodes[names[1]]
    threshold = np.nextafter(lif.v_threshold.astype(np.float32), np.float32(np.inf))
    part.nodes[names[0]] = nir.Linear(weight=2 * linear.weight)
    part.nodes[names[1]] = lif_node(threshold.size, 2.0, threshold)
    return part


def blind(simulator: str, node: dict) -> np.ndarray | None:
    """How far below its threshold a neuron fires in a simulator that fires at the file's; None if it does not."""
    return np.float32(node["v_threshold"]) - lowered(node) if simulator in FIRE_AT else None


def run_neurons(node: dict, currents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Membranes before the reset and spikes (int16), `(B, T, n)` both, of a population with these currents `(B, T, n)`:
    the interpreter's own neurons, in the currents' dtype."""
    h, spikes = np.empty_like(currents), np.empty(currents.shape, np.int16)
    v = rest = np.full_like(currents[:, 0], node.get("v_reset") or 0)
    for t in range(currents.shape[1]):
        h[:, t], spikes[:, t], v = NEURONS[node["op"]](node, currents[:, t], rest if node.get("from_rest", True) else v)
    return h, spikes


def self_test(simulator: str) -> dict:
    """Whether a wrong island would be seen: int8 weights that make membranes end exactly on the threshold.

    Returns:
        neuron steps, ties among them, wrong spikes with the threshold as bundles have it (0 if all is well), and with a
        threshold that is wrong on purpose (not 0 if all is well): as the model's is, or, for a simulator that fires at
        the file's, one float32 higher.
    """
    generator = np.random.default_rng(0)
    node = {"name": "control", "op": "lif", "tau": 2.0, "v_threshold": 1.0, "v_reset": 0.0, "from_rest": False}
    weight = generator.integers(-40, 60, (48, 24)).astype(np.float32) / 64
    events = (generator.random((32, 24, 24)) < 0.3).astype(np.float32)
    h, spikes = run_neurons(node, events.astype(np.float64) @ weight.T.astype(np.float64))
    one = np.float32(1)
    on_purpose = np.nextafter(one, 2 * one) if simulator in FIRE_AT else one
    wrong = [
        int((replay(simulator, island(node, 48, weight, threshold), events) != spikes).sum())
        for threshold in (None, on_purpose)
    ]
    return {"steps": spikes.size, "ties": int((h == 1).sum()), "wrong": wrong[0], "wrong_on_purpose": wrong[1]}


def self_test_integers(simulator: str) -> dict:
    """Whether a wrong path would be seen: currents on the steps of levels, int8 weights with ties at the threshold.

    Returns:
        integers and spikes in all, wrong ones with the thresholds as bundles have them (0 if all is well), and with the
        population's, and with the last neurons', wrong on purpose (neither 0 if all is well), as in `self_test`.
    """
    generator, one = np.random.default_rng(0), np.float32(1)
    node = {"name": "control", "op": "integer_spikes", "scale": [0.5] * 24, "most": [3] * 24}
    node |= {"signed": True, "squared": False}
    lif = {"name": "control", "op": "lif", "tau": 2.0, "v_threshold": 1.0, "v_reset": 0.0, "from_rest": False}
    weight = generator.integers(-40, 60, (48, 24)).astype(np.float32) / 64
    currents = generator.integers(-16, 17, (32, 24, 24)).astype(np.float32) / 8  # quarters of a spike
    _, integers = run_neurons(node, currents)
    _, spikes = run_neurons(lif, integers.astype(np.float64) @ weight.T.astype(np.float64))
    ends = np.nextafter(one, 2 * one) if simulator in FIRE_AT else one
    wrong = [
        int((replay_integers(simulator, node, encoder_graph(node, threshold), currents) != integers).sum())
        for threshold in (None, one)
    ]
    paths = [
        int((replay_path(simulator, node, path_graph(node, weight, lif, *given), currents) != spikes).sum())
        for given in ((None, None), (one, None), (None, ends))
    ]
    return {
        "steps": integers.size + spikes.size,
        "wrong": wrong[0] + paths[0],
        "wrong_on_purpose": min(wrong[1], *paths[1:]),
    }
