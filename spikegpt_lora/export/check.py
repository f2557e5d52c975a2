"""Whether a bundle is what it says, found out without the model. Nothing is written into it.

Files: plain ones, those that the manifest names, each with its hash, and no others.
Contents: every file can be what it should: sizes first, then types, shapes and ranges (`bundle.py`, `shapes.py`).
Statements: what the manifest says is what graph and traces give; words hold their tokens, and a token has one name.
Costs: operations as executed and event-driven, counted again from weights and recorded spikes (`recount.py`).
Neurons: the recorded spikes are what LIF neurons give for the recorded currents, and the events are those spikes.
Islands: each file holds what the graph says.
Interpreter and simulators: `reruns.py`.
"""

import os
import re
import stat
from pathlib import Path

import numpy as np

from ..convert.weights import WEIGHTS
from . import islands
from .bundle import PARTS, Bundle
from .events import events_of
from .files import islands_for
from .findings import Findings
from .manifest import MANIFEST, in_integers, own_hash, sha256, statements
from .recount import check_costs
from .reruns import check_interpreter, check_simulators
from .simulators import run_neurons

LARGEST = 1 << 34  # bytes of a file: a sparse one is read for hours
SINCE = ("classes", "labelled", "right")  # statements that manifests of the first version do not make


def check_bundle(folder, progress=lambda rounds, text: rounds) -> dict:
    """Check a bundle, which is only read.

    Args:
        progress: wraps whatever takes long, as `progress(list, text)` (tqdm in recipes).

    Returns:
        passed, problems (one line each, naming file, population, sample and step), and what was measured.

    Raises:
        ValueError: the folder is no bundle.
    """
    bundle, found = Bundle(folder), Findings(progress)
    results = {}
    found.part("files", _check_files, bundle, found)
    if not found.problems:
        results["files"] = len(bundle.manifest["sha256"]) + len(MANIFEST)
        found.part("contents", _read_all, bundle)
    if not found.problems:
        parts = {
            "statements": _check_statements, "words": _check_words, "costs": check_costs, "neurons": _check_neurons,
            "events": _check_events, "islands": _check_islands, "interpreter": check_interpreter,
            "simulators": check_simulators,
        }  # fmt: skip
        measured = {name: found.part(name, part, bundle, found) for name, part in parts.items()}
        results |= {name: result for name, result in measured.items() if result is not None}
    return results | {"problems": found.problems, "passed": not found.problems}


def _check_files(bundle: Bundle, found: Findings) -> None:
    """Files that are missing, unknown, no plain files or altered, the manifest included."""
    folder, hashes = bundle.folder, bundle.manifest.get("sha256")
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        found.add("manifest.json must hold sha256, the hash of each file by its name")
        return
    there = _plain_files(folder, found)
    own = MANIFEST[1]
    if own not in there or (folder / own).stat().st_size > 200 or (folder / own).read_text("utf-8") != own_hash(folder):
        found.add(f"manifest.json is not what {own} says")
    for name in sorted((there | hashes.keys()) - set(MANIFEST)):
        if name not in PARTS and not re.fullmatch(r"islands/[^/]+\.nir", name):
            found.add(f"{name} is no file of a bundle{'' if name in hashes else ', and is not in the manifest'}")
        elif name not in hashes:
            found.add(f"{name} is not in the manifest")
        elif name not in there:
            found.add(f"{name} is missing")
        elif (size := (folder / name).stat().st_size) > LARGEST:
            found.add(f"{name} has {size:,} bytes, at most {LARGEST:,} are read")
        elif sha256(folder / name) != hashes[name]:
            found.add(f"{name} was altered: its sha256 is not the manifest's")
    for name in set(PARTS) - hashes.keys() - there:
        found.add(f"{name} is missing, and not in the manifest")


def _plain_files(folder: Path, found: Findings) -> set[str]:
    """Names of the files of a bundle's folder and of its islands; links and whatever is no file are problems."""
    names, paths = set(), sorted(folder.iterdir())
    while paths:
        path = paths.pop()
        name, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
        if stat.S_ISREG(mode):
            names.add(name)
        elif stat.S_ISDIR(mode) and name == "islands":
            paths += sorted(path.iterdir())
        else:
            kind = f"a link to {os.readlink(path)}" if stat.S_ISLNK(mode) else "no file"
            found.add(f"{name} is {kind}: a bundle holds files alone, and islands/")
    return names


def _read_all(bundle: Bundle) -> None:
    """Every file, so that the first one that cannot be what it should is refused before anything is done with it."""
    for part in ("weights", "sizes", "sentences", "traces", "events", "cost", "islands"):
        getattr(bundle, part)


def _check_statements(bundle: Bundle, found: Findings) -> None:
    manifest, trace = bundle.manifest, bundle.trace
    wanted = statements(trace, bundle.nodes, bundle.classes, bundle.sentences["logits"])
    kind = "int8" if any(name.endswith("/scale") for name in bundle.stored_weights) else WEIGHTS[0]
    wanted["weights"] = kind
    for key, value in wanted.items():
        if manifest.get(key, value if key in SINCE else None) != value:
            found.add(f"manifest.json: {key} is not what the files say")
    units = sum(spikes.shape[-1] for spikes in trace.spikes.values())
    steps = {"sentences": wanted["sentences"], "tokens": wanted["tokens"], "steps": wanted["tokens"] * units}
    for compared in ("exported", *["integers"] * in_integers(bundle.nodes, kind)):
        stated = manifest.get("checks", {}).get(compared, {})
        for key, value in (steps | {"different_spikes": 0, "different_predictions": 0}).items():
            if stated.get(key) != value:
                found.add(f"manifest.json: {key} of checks.{compared} must be {value}, got {stated.get(key)!r}")
    if unknown := manifest.keys() - wanted.keys() - {"schema", "versions", "checks", "sha256"}:
        found.add(f"manifest.json: {', '.join(sorted(unknown))} is unknown")


def _check_words(bundle: Bundle, found: Findings) -> None:
    """A token id has one token, and the letters of a token are in its word; nothing more is known of texts."""
    named: dict[int, str] = {}
    ids, tokens, words = (bundle.sentences[key] for key in ("ids", "tokens", "words"))
    for sample, step in np.argwhere(bundle.real).tolist():
        token, word = str(tokens[sample, step]), str(words[sample, step])
        if named.setdefault(int(ids[sample, step]), token) != token:
            found.add(f"sentences.npz: id {ids[sample, step]} has two tokens, sample {sample}, step {step}")
        letters = "" if re.fullmatch("<0x[0-9A-F]{2}>", token) else re.sub("[^A-Za-z0-9]", "", token)
        if letters not in re.sub("[^A-Za-z0-9]", "", word):
            found.add(f"sentences.npz: word {word!r} does not hold its token {token!r}, sample {sample}, step {step}")
            return


def _check_neurons(bundle: Bundle, found: Findings) -> dict:
    steps = 0
    for node in bundle.neurons:
        trace = bundle.traces[node["name"]]
        _, spikes = run_neurons(node, trace["current"])
        different = (spikes != trace["spikes"]) & bundle.real[..., None]
        found.first("traces.h5: spikes are not what the currents give", node["name"], different)
        steps += int(bundle.real.sum()) * spikes.shape[-1]
    return {"populations": len(bundle.neurons), "steps": steps}


def _check_events(bundle: Bundle, found: Findings) -> None:
    events, names = bundle.events
    if np.array_equal(events, events_of(bundle.trace)):
        return
    found.add("events.npz: not the spikes and values of traces.h5, in order")
    for number, name in enumerate(names):
        mine, fired = events[events["population"] == number], bundle.traces[name]["spikes"] != 0
        grid = np.zeros_like(fired)
        grid[mine["sample"], mine["t"], mine["index"]] = True
        found.first("events.npz and traces.h5 differ", name, grid != fired)


def _check_islands(bundle: Bundle, found: Findings) -> None:
    left = set(bundle.islands)
    for node in bundle.neurons:
        graphs = islands_for(bundle.nodes, node, bundle.sizes[node["name"]], bundle.weights)
        for file, graph in graphs.items():
            if file not in left:
                found.add(f"islands/{file} is missing")
            elif not islands.same(bundle.islands[file], graph):
                found.add(f"islands/{file} is not the graph's population {node['name']}")
            left.discard(file)
    for file in left:
        found.add(f"islands/{file} is no population's")
