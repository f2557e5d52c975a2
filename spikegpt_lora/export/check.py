"""Whether a bundle is what it says, found out without the model.

Files: the ones that the manifest names, each with its hash, and no others.
Statements: populations, sentences and conventions in the manifest, and dense operations and silent neurons in
    cost.json, are what graph and traces give. (Effective operations, labels and words are covered by hashes alone.)
Neurons: the recorded spikes are what LIF neurons give for the recorded currents, and the events are those spikes.
Interpreter: with the recorded spikes it gives the recorded currents. From token ids alone it gives the recorded spikes
    and logits; in float32 a rounding may flip a spike that lies at its threshold, and what follows it differs: such
    sentences are counted, and the first difference of each must lie within MARGIN of the threshold.
Islands: each file holds what the graph says.
Simulators, where installed: run the islands on the recorded currents; every spike must be the recorded one. Islands
    with weights get what the matrix reads and do the product themselves; a neuron whose first difference lies within
    MARGIN of the threshold is counted as rounding. Before, each simulator has to get an island wrong that is wrong on
    purpose (`islands.control`).
"""

import json
import zipfile
import zlib

import numpy as np

from ..trace import EMBEDDING
from . import islands
from .bundle import CONVENTIONS, Bundle, add_check, own_hash, population, sha256, weights_before
from .events import events_of

MARGIN = 1e-5  # of a membrane from its threshold
CLOSE = 1e-4  # of currents and logits in float32 by two ways, in units of their root mean square, 1 at least
BROKEN = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, AssertionError, ImportError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def check_bundle(folder, progress=lambda rounds, text: rounds) -> dict:
    """Check a bundle and write the results into its manifest (not where files were altered).

    Args:
        progress: wraps whatever takes long, as `progress(list, text)` (tqdm in recipes).

    Returns:
        passed, problems (one line each, naming population, sample and step), and what was measured.

    Raises:
        ValueError: the folder is no bundle.
    """
    bundle = Bundle(folder)
    if problems := altered(bundle):
        return {"passed": False, "problems": problems}
    results = {"files": len(bundle.manifest["sha256"]) + 2}
    parts = {
        "statements": _statements, "neurons": _neurons, "events": _events, "interpreter": _interpreter,
        "islands": _islands, "simulators": _simulators,
    }  # fmt: skip
    for name, part in parts.items():
        try:
            results[name] = part(bundle, problems, progress)
        except BROKEN as error:  # a file with the right hash and the wrong content
            problems.append(f"{name}: could not be checked, {type(error).__name__}: {error}")
    results |= {"problems": problems, "passed": not problems}
    add_check(bundle, "checked", results)
    return results


def altered(bundle: Bundle) -> list[str]:
    """Files that are missing, unknown or have another hash, the manifest included."""
    problems, folder, hashes = [], bundle.folder, bundle.manifest.get("sha256", {})
    own = folder / "manifest.json.sha256"
    if not own.is_file() or own.read_bytes() != own_hash(folder).encode():
        problems.append("manifest.json is not what manifest.json.sha256 says")
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    problems += [f"{name} is not in the manifest" for name in sorted(there - set(hashes) - set(Bundle.MANIFEST))]
    for name, expected in hashes.items():
        if name not in there:
            problems.append(f"{name} is missing")
        elif sha256(folder / name) != expected:
            problems.append(f"{name} was altered: its sha256 is not the manifest's")
    return problems


def _statements(bundle: Bundle, problems: list[str], progress) -> None:
    manifest, names = bundle.manifest, [EMBEDDING, *(node["name"] for node in bundle.neurons)]
    if set(bundle.traces) != set(names):
        problems.append("traces.h5 has other populations than the graph has neurons")
    found = {
        "conventions": CONVENTIONS,
        "sentences": len(bundle.sentences["lengths"]),
        "tokens": int(bundle.sentences["lengths"].sum()),
        "populations": [population(bundle.trace, name, bundle.nodes) for name in bundle.trace.spikes],
    }
    problems += [f"manifest.json: {key} is not what the files say" for key in found if manifest.get(key) != found[key]]
    cost = json.loads((bundle.folder / "cost.json").read_text(encoding="utf-8"))["as_executed"]
    for node in bundle.nodes:
        if (
            node["op"] == "linear"
            and cost["layers"][node["name"]]["dense_macs"] != bundle.program.weights[node["weight"]].size
        ):
            problems.append(f"cost.json: dense MACs of {node['name']} are not its matrix's")
    for node in bundle.neurons:
        silent = int((~bundle.traces[node["name"]]["spikes"] & bundle.real[..., None]).sum())
        if cost["populations"][node["name"]]["zeros"] != silent:
            problems.append(f"cost.json: silent neurons of population {node['name']} are not those of traces.h5")


def _neurons(bundle: Bundle, problems: list[str], progress) -> dict:
    steps = 0
    for node in bundle.neurons:
        trace = bundle.traces[node["name"]]
        _, spikes = islands.charge(node, trace["current"])
        different = (spikes != trace["spikes"]) & bundle.real[..., None]
        _report(problems, "traces.h5: spikes are not what the currents give", node["name"], different)
        steps += int(bundle.real.sum()) * spikes.shape[-1]
    return {"populations": len(bundle.neurons), "steps": steps}


def _events(bundle: Bundle, problems: list[str], progress) -> None:
    with np.load(bundle.folder / "events.npz") as file:
        events, names, sizes = file["events"], file["populations"].tolist(), file["sizes"].tolist()
    trace = bundle.trace
    if names != list(trace.spikes) or sizes != [spikes.shape[-1] for spikes in trace.spikes.values()]:
        problems.append("events.npz: other populations or sizes than in traces.h5")
        return
    expected = events_of(trace)
    if np.array_equal(events, expected):
        return
    problems.append("events.npz: not the spikes and values of traces.h5, in order")
    for number, name in enumerate(names):
        mine, grid = events[events["population"] == number], np.zeros_like(trace.spikes[name], bool)
        grid[mine["sample"], mine["t"], mine["index"]] = True
        _report(problems, "events.npz and traces.h5 differ", name, grid != trace.spikes[name])


def _report(problems: list[str], what: str, name: str, different: np.ndarray, rows=None) -> int:
    """Add the first difference `(B, T, n)`, if there is one, to the problems; returns how many there are."""
    count = int(different.sum())
    if count:
        sample, step, unit = min(np.argwhere(different).tolist(), key=lambda at: (at[1], at[0]))
        sample = sample if rows is None else int(rows[sample])
        problems.append(f"{what}: population {name}, sample {sample}, step {step}, neuron {unit} ({count} differences)")
    return count


def _interpreter(bundle: Bundle, problems: list[str], progress) -> dict:
    sentences = bundle.sentences
    counts = {"dtype": "float32", "sentences": len(sentences["ids"]), "sentences_with_a_flip": 0}
    counts |= {"farthest_first_flip": 0.0, "different_predictions": 0}
    for rows, T in progress(list(bundle.rows()), "interpreter"):
        ids, lengths, real = sentences["ids"][rows, :T], sentences["lengths"][rows], bundle.real[rows, :T, None]
        forced = _forced(bundle, rows, T, [node["inputs"][0] for node in bundle.neurons])
        for node in bundle.neurons:
            recorded = bundle.traces[node["name"]]["current"][rows, :T]
            apart = ~_close(forced[node["inputs"][0]], recorded) & real
            _report(problems, "interpreter: another current than recorded", node["name"], apart, rows)
        logits, seen = bundle.program.run(ids, lengths, list(bundle.trace.spikes))
        answers = logits.argmax(axis=1) != sentences["logits"][rows].argmax(axis=1)
        counts["different_predictions"] += int(answers.sum())
        for i, row in enumerate(rows.tolist()):
            flip = _first(bundle, {n: seen[n][i] != spikes[row, :T] for n, spikes in bundle.trace.spikes.items()})
            if flip is not None:
                _judge(bundle, row, *flip, counts, problems)
            elif not _close(logits[i], sentences["logits"][row]).all():
                problems.append(
                    f"interpreter: other logits than recorded for sample {row}, though all spikes are the same"
                )
    return counts


def _close(ours: np.ndarray, recorded: np.ndarray) -> np.ndarray:
    """Where both are the same but for rounding; not where one is NaN."""
    return np.abs(ours - recorded) <= CLOSE * max(1.0, float(np.sqrt(np.square(recorded, dtype=np.float64).mean())))


def _forced(bundle: Bundle, rows: np.ndarray, T: int, names) -> dict[str, np.ndarray]:
    """Values of nodes `(b, T, n)` where the recorded spikes stand in for the interpreter's own."""
    recorded = {name: trace["spikes"][rows, :T] for name, trace in bundle.traces.items()}
    ids, lengths = bundle.sentences["ids"][rows, :T], bundle.sentences["lengths"][rows]
    return bundle.program.run(ids, lengths, set(names), recorded)[1]


def _first(bundle: Bundle, different: dict[str, np.ndarray]) -> tuple[str, int, int] | None:
    """The first difference `(T, n)` in the order in which things happen: by token, then by place in the graph."""
    order = [node["name"] for node in bundle.nodes]
    steps = {name: int(np.argmax(d.any(axis=1))) for name, d in different.items() if d.any()}
    if not steps:
        return None
    name = min(steps, key=lambda name: (steps[name], order.index(name)))
    return name, steps[name], int(np.argmax(different[name][steps[name]]))


def _judge(bundle: Bundle, row: int, name: str, step: int, unit: int, counts: dict, problems: list[str]) -> None:
    """Whether a sentence's first difference is a rounding at the threshold."""
    where = f"interpreter: population {name}, sample {row}, step {step}, neuron {unit} differs"
    node = next((node for node in bundle.neurons if node["name"] == name), None)
    if node is None:
        problems.append(where)
        return
    h, _ = islands.charge(node, bundle.traces[name]["current"][row : row + 1])
    distance = abs(float(h[0, step, unit]) - float(np.broadcast_to(np.float32(node["v_threshold"]), h.shape[-1])[unit]))
    counts["sentences_with_a_flip"] += 1
    counts["farthest_first_flip"] = max(counts["farthest_first_flip"], distance)
    if not distance <= MARGIN:
        problems.append(f"{where}, {distance:.1e} from the threshold (at most {MARGIN:g} is rounding)")


def _islands(bundle: Bundle, problems: list[str], progress) -> None:
    for node in bundle.neurons:
        units = bundle.traces[node["name"]]["spikes"].shape[-1]
        for file, graph in islands.of(node, units, weights_before(bundle.nodes, node), bundle.program.weights).items():
            if file not in bundle.islands:
                problems.append(f"islands/{file} is missing")
            elif not islands.same(bundle.islands[file], graph):
                problems.append(f"islands/{file} is not the graph's population {node['name']}")


def _simulators(bundle: Bundle, problems: list[str], progress) -> dict:
    here = islands.installed()
    results = {name: "not installed" for name in islands.SIMULATORS}
    results |= {name: _start(name, version, problems) for name, version in here.items()}
    parts = {node["name"]: weights_before(bundle.nodes, node) for node in bundle.neurons}
    for rows, T in progress(list(bundle.rows()), "simulators") if here else []:
        reads = _forced(bundle, rows, T, [name for reads in parts.values() for name, _ in reads])
        for node in bundle.neurons:
            for simulator in here:
                if reason := _unable(simulator, node):
                    results[simulator]["left_out"][node["name"]] = reason
                    continue
                _replay(bundle, simulator, node, rows, T, None, results[simulator]["neurons"], problems)
                if parts[node["name"]]:
                    read = np.concatenate([reads[name] for name, _ in parts[node["name"]]], axis=-1)
                    _replay(bundle, simulator, node, rows, T, read, results[simulator]["with_weights"], problems)
    for simulator in here:
        for counts in (results[simulator]["neurons"], results[simulator]["with_weights"]):
            counts["islands"] = len(counts["islands"])
    return results


def _start(simulator: str, version: str, problems: list[str]) -> dict:
    control = islands.control(simulator)
    if control["wrong"] or not control["wrong_if_not_lowered"]:
        problems.append(f"{simulator}: this check cannot tell right from wrong with it ({control})")
    return {"version": version, "control": control, "left_out": {}} | {
        kind: {"islands": set(), "steps": 0, "wrong": 0, "rounding": 0} for kind in ("neurons", "with_weights")
    }


def _unable(simulator: str, node: dict) -> str | None:
    one = np.unique(node["v_threshold"]).size == 1
    return "it takes one threshold a population" if simulator == "snnTorch" and not one else None


def _replay(bundle: Bundle, simulator: str, node: dict, rows, T: int, read, counts: dict, problems: list[str]) -> None:
    """One island on one group of sentences, in one simulator: counts and problems grow."""
    name, trace, real = node["name"], bundle.traces[node["name"]], bundle.real[rows, :T, None]
    current = trace["current"][rows, :T]
    graph = bundle.islands[f"{name}.nir" if read is None else f"{name}.weights.nir"]
    spikes = islands.replay(simulator, graph, current if read is None else read, node["from_rest"])
    different = (spikes != trace["spikes"][rows, :T]) & real
    if read is not None and different.any():
        rounded = _rounded(node, current, different)
        counts["rounding"] += int(rounded.sum())
        different &= ~rounded
    what = f"{simulator}, {'island' if read is None else 'island with weights'}"
    counts["wrong"] += _report(problems, what, name, different, rows)
    counts["steps"] += int(real.sum()) * different.shape[-1]
    counts["islands"].add(name)


def _rounded(node: dict, current: np.ndarray, different: np.ndarray) -> np.ndarray:
    """Of the differences `(b, t, n)`, those of neurons whose first one lies within MARGIN of the threshold."""
    h, _ = islands.charge(node, current)
    near = np.abs(h - np.float32(node["v_threshold"])) <= MARGIN
    if node["from_rest"]:
        return different & near
    first = different & (np.cumsum(different, axis=1) == 1)
    return different & (first & near).any(axis=1, keepdims=True)
