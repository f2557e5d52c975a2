"""Whether a bundle is what it says, found out without the model.

1. Every file has the hash that the manifest says.
2. The recorded spikes are what LIF neurons give for the recorded currents, and the events are those spikes.
3. The interpreter reads the sentences and gives these spikes and predictions. In float32 a rounding may flip a spike
   that lies at its threshold, and what follows it differs: such sentences are counted, and the first difference of each
   must lie within MARGIN of the threshold.
4. Simulators that are installed run the islands on the recorded currents: every spike must be the recorded one. Islands
   with weights get what the matrix reads, from the interpreter with the recorded spikes, and do the product themselves;
   a difference within MARGIN of the threshold is counted as rounding. Before, each simulator has to fail an island that
   is wrong on purpose (`islands.control`).
"""

import numpy as np

from . import islands
from .bundle import Bundle, own_hash, seal, sha256, weights_before
from .events import EVENT
from .interpreter import Program

MARGIN = 1e-5  # in units of the threshold's membrane


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
    results = {"files": len(bundle.manifest["sha256"]) + 2, "problems": []}
    results["neurons"] = _neurons(bundle, results["problems"])
    _events(bundle, results["problems"])
    results["interpreter"] = _interpreter(bundle, results["problems"], progress)
    results["simulators"] = _simulators(bundle, results["problems"], progress)
    results["passed"] = not results["problems"]
    seal(bundle.folder, bundle.manifest | {"checks": bundle.manifest["checks"] | {"checked": results}})
    return results


def altered(bundle: Bundle) -> list[str]:
    """Files that are missing or have another hash, the manifest included."""
    problems, folder = [], bundle.folder
    own = folder / "manifest.json.sha256"
    if not own.is_file() or own.read_bytes() != own_hash(folder).encode():
        problems.append("manifest.json is not what manifest.json.sha256 says")
    for name, expected in bundle.manifest["sha256"].items():
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif sha256(folder / name) != expected:
            problems.append(f"{name} was altered: its sha256 is not the manifest's")
    return problems


def _neurons(bundle: Bundle, problems: list[str]) -> dict:
    steps = 0
    for node in bundle.neurons:
        trace = bundle.traces[node["name"]]
        _, spikes = islands.charge(node, trace["current"])
        different = (spikes != trace["spikes"]) & bundle.real[..., None]
        _report(problems, "traces.h5: spikes are not what the currents give", node["name"], different)
        steps += int(bundle.real.sum()) * spikes.shape[-1]
    return {"populations": len(bundle.neurons), "steps": steps}


def _events(bundle: Bundle, problems: list[str]) -> None:
    with np.load(bundle.folder / "events.npz") as file:
        events, names = file["events"], file["populations"].tolist()
    if events.dtype != EVENT or set(names) != set(bundle.traces):
        problems.append("events.npz has other fields or populations than traces.h5")
        return
    for number, name in enumerate(names):
        mine, grid = events[events["population"] == number], np.zeros_like(bundle.traces[name]["spikes"])
        grid[mine["sample"], mine["t"], mine["index"]] = True
        _report(problems, "events.npz and traces.h5 differ", name, grid != bundle.traces[name]["spikes"])


def _report(problems: list[str], what: str, population: str, different: np.ndarray, rows=None) -> int:
    """Add the first difference `(B, T, n)`, if there is one, to the problems; returns how many there are."""
    count = int(different.sum())
    if count:
        sample, step, unit = min(np.argwhere(different).tolist(), key=lambda at: (at[1], at[0]))
        sample = sample if rows is None else int(rows[sample])
        problems.append(
            f"{what}: population {population}, sample {sample}, step {step}, neuron {unit} ({count} differences)"
        )
    return count


def _interpreter(bundle: Bundle, problems: list[str], progress) -> dict:
    program, order = Program(bundle.folder, np.float32), [node["name"] for node in bundle.nodes]
    names = [name for name in order if name in bundle.traces]
    nodes, ids, lengths, logits = {n["name"]: n for n in bundle.neurons}, *(
        bundle.sentences[key] for key in ("ids", "lengths", "logits")
    )  # fmt: skip
    flipped, apart, answers, farthest = 0, 0.0, 0, 0.0
    for rows, T in progress(list(bundle.rows()), "interpreter"):
        ours, seen = program.run(ids[rows, :T], lengths[rows], names)
        answers += int((ours.argmax(axis=1) != logits[rows].argmax(axis=1)).sum())
        for i, row in enumerate(rows.tolist()):
            found = _first(names, {n: seen[n][i] != bundle.traces[n]["spikes"][row, :T] for n in names})
            if found is None:
                apart = max(apart, float(np.abs(ours[i] - logits[row]).max()))
                continue
            flipped += 1
            name, step, unit = found
            distance = np.inf if name not in nodes else _distance(bundle, nodes[name], row, step, unit)
            farthest = max(farthest, distance)
            if distance > MARGIN:
                problems.append(
                    f"interpreter: population {name}, sample {row}, step {step}, neuron {unit} differs, with the "
                    f"membrane {distance:.1e} from the threshold (at most {MARGIN:g} is rounding)"
                )
    if answers > flipped:
        problems.append(f"interpreter: {answers} predictions differ in {flipped} sentences with another spike")
    return {
        "dtype": "float32", "sentences": len(ids), "sentences_with_a_flip": flipped, "farthest_first_flip": farthest,
        "different_predictions": answers, "largest_logit_difference_without_flip": apart,
    }  # fmt: skip


def _first(names: list[str], different: dict[str, np.ndarray]) -> tuple[str, int, int] | None:
    """The first difference in the order in which things happen: by token, then by place in the graph."""
    steps = {name: int(np.argmax(d.any(axis=1))) for name, d in different.items() if d.any()}
    if not steps:
        return None
    name = min(steps, key=lambda name: (steps[name], names.index(name)))
    return name, steps[name], int(np.argmax(different[name][steps[name]]))


def _distance(bundle: Bundle, node: dict, row: int, step: int, unit: int) -> float:
    """How far the recorded neuron's membrane is from its threshold there."""
    h, _ = islands.charge(node, bundle.traces[node["name"]]["current"][row : row + 1])
    threshold = np.broadcast_to(np.float32(node["v_threshold"]), h.shape[-1])[unit]
    return abs(float(h[0, step, unit]) - float(threshold))


def _simulators(bundle: Bundle, problems: list[str], progress) -> dict:
    here = islands.installed()
    results = {
        name: _start(name, here[name], problems) if name in here else "not installed" for name in islands.SIMULATORS
    }
    running = [name for name in here if results[name]]
    parts = {node["name"]: weights_before(bundle.nodes, node) for node in bundle.neurons}
    for rows, T in progress(list(bundle.rows()), "simulators") if running else []:
        reads = _reads(bundle, rows, T, parts)
        for node in bundle.neurons:
            for simulator in running:
                if reason := _unable(simulator, node):
                    results[simulator]["left_out"][node["name"]] = reason
                    continue
                _replay(bundle, simulator, node, rows, T, None, results[simulator]["neurons"], problems)
                if parts[node["name"]]:
                    read = np.concatenate([reads[name] for name, _ in parts[node["name"]]], axis=-1)
                    _replay(bundle, simulator, node, rows, T, read, results[simulator]["with_weights"], problems)
    for simulator in running:
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


def _reads(bundle: Bundle, rows: np.ndarray, T: int, parts: dict) -> dict[str, np.ndarray]:
    """What the matrices before populations read, `(b, T, m)`, from the interpreter with the recorded spikes."""
    names = {name for reads in parts.values() for name, _ in reads}
    forced = {name: trace["spikes"][rows, :T] for name, trace in bundle.traces.items()}
    program = Program(bundle.folder, np.float32)
    return program.run(bundle.sentences["ids"][rows, :T], bundle.sentences["lengths"][rows], names, forced)[1]


def _replay(bundle: Bundle, simulator: str, node: dict, rows, T: int, read, counts: dict, problems: list[str]) -> None:
    """One island on one group of sentences, in one simulator: counts and problems grow."""
    name, trace, real = node["name"], bundle.traces[node["name"]], bundle.real[rows, :T, None]
    current = trace["current"][rows, :T]
    graph = bundle.island(f"{name}.nir" if read is None else f"{name}.weights.nir")
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
