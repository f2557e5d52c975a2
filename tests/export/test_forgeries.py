"""Bundles that were tampered with, hashes remade: the command names file and reason, and never ends in a traceback."""

import json
import os
import shutil
import sys
import warnings
import zipfile

import h5py
import numpy as np
import pytest
from builders import batch_of, edit, put, reseal, rewrite, small

from spikegpt_lora.export import export_bundle, simulators
from spikegpt_lora.export.__main__ import main
from spikegpt_lora.export.manifest import own_hash
from spikegpt_lora.export.results import NOT_PROVEN

LIF = "/nodes/blocks.0.lif1/observables"
NESTED = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    return export_bundle(small(), batch_of(), tmp_path_factory.mktemp("right") / "bundle", event_driven=True)


@pytest.fixture
def copy(right, tmp_path, monkeypatch):
    monkeypatch.setattr(simulators, "installed", dict)  # no simulator: what they find is found by the other parts too
    return shutil.copytree(right, tmp_path / "bundle")


def checked(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export", "check", str(folder)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status = main()
    said = capsys.readouterr()
    assert "Traceback" not in said.err and "not foreseen" not in said.err
    return status, said.out + said.err


def cut(name, size=0.5):
    def forge(folder):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(size * len(whole))])

    return forge


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def manifest(**changes):
    return lambda folder: edit(folder / "manifest.json", lambda content: content.update(changes))


def without(name, key):
    return lambda folder: edit(folder / name, lambda content: content.pop(key))


def graph(change):
    return lambda folder: edit(folder / "graph.json", lambda content: change(content["nodes"]))


def node(kind, **changes):
    """Other settings of the first node of a kind."""
    return graph(lambda nodes: next(one for one in nodes if one["op"] == kind).update(changes))


def npz(name, **changes):
    return lambda folder: rewrite(folder / name, **changes)


def cost(*path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return lambda folder: edit(folder / "cost.json", change)


def traces(change):
    def forge(folder):
        with h5py.File(folder / "traces.h5", "r+") as file:
            change(file)

    return forge


def island(change):
    def forge(folder):
        with h5py.File(folder / "islands" / "blocks.0.lif1.nir", "r+") as file:
            change(file["node"])

    return forge


def replaced(path, make):
    """Another object in place of a data set or group."""

    def change(file):
        if path in file:
            del file[path]
        make(file)

    return change


def virtual(file):
    layout = h5py.VirtualLayout((4, 11, 12), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (4, 11, 12))
    file.create_virtual_dataset(f"{LIF}/current/data", layout)


def linked(name, target):
    def forge(folder):
        (folder / name).rename(folder.parent / "moved")
        (folder / name).symlink_to(folder.parent / "moved" if target is None else target)

    return forge


def member(name, array, of="weights.npz", header=None, compression=zipfile.ZIP_DEFLATED):
    """One more array in an .npz file; header: the shape that it says it has."""

    def forge(folder):
        with zipfile.ZipFile(folder / of, "a", compression) as archive, archive.open(f"{name}.npy", "w") as file:
            if header is None:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=True)
            else:
                content = {"descr": "<f4", "fortran_order": False, "shape": header}
                np.lib.format.write_array_header_1_0(file, content)
                file.write(np.asarray(array, "<f4").tobytes())

    return forge


def bomb(folder):
    with zipfile.ZipFile(folder / "weights.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("emb.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f4", "fortran_order": False, "shape": (1 << 10, 75_000)}
            )
            for _ in range(75):
                file.write(bytes(1 << 22))


def twice_as_many_sums(nodes):
    """Sums of sums of one layer, 2^40 of it."""
    at = next(i for i, one in enumerate(nodes) if one["name"] == "blocks.0.lif1")
    source = nodes[at]["inputs"][0]
    for depth in range(40):
        nodes.insert(at + depth, {"name": f"sum{depth}", "op": "add", "inputs": [source, source]})
        source = f"sum{depth}"
    nodes[at + 40]["inputs"] = [source]


def swapped(folder):
    edit(folder / "graph.json", lambda content: content["labels"].reverse())


def turned_round(folder):
    rewrite(folder / "weights.npz", score=lambda x: x[::-1])
    rewrite(folder / "sentences.npz", logits=lambda x: x[:, ::-1])


def extra(name, content=b"import os"):
    def forge(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return forge


def first_word(words):
    return put(words, (0, 0), words[0, 1])


def renamed(nodes):
    nodes[3]["name"] = "\x1b[2J\ud800"


# id (those of B.. as they were found): what is done, words of the problem line; where hashes are not remade: False
WRONG = {
    "B04 no sha256": (without("manifest.json", "sha256"), "manifest.json must hold sha256", False),
    "B05 sha256 a list": (manifest(sha256=["a"]), "manifest.json must hold sha256", False),
    "B06 a path that leads out": (
        lambda f: edit(f / "manifest.json", lambda m: m["sha256"].update({"../../../etc/passwd": "0"})),
        "../../../etc/passwd is no file of a bundle",
        False,
    ),
    "B07 no checks": (without("manifest.json", "checks"), "manifest.json: sentences of checks.exported must be 4"),
    "checks a list": (manifest(checks=[]), "statements: could not be checked"),
    "B10 no hash of the manifest": (
        lambda f: (f / "manifest.json.sha256").unlink(),
        "manifest.json is not what manifest.json.sha256 says",
        False,
    ),
    "B11 weights cut": (cut("weights.npz"), "weights.npz is no .npz file to be read"),
    "B12 graph cut": (cut("graph.json"), "graph.json is no whole JSON file"),
    "B13 traces cut": (cut("traces.h5"), "traces.h5 cannot be read"),
    "sentences cut": (cut("sentences.npz", 0.9), "sentences.npz is no .npz file to be read"),
    "events empty": (cut("events.npz", 0), "events.npz is no .npz file to be read"),
    "B14 NaN weights": (
        npz("weights.npz", **{"blocks.0.att.key": lambda x: put(x, (0, 0), np.nan)}),
        "weights.npz holds values that are not finite in blocks.0.att.key",
    ),
    "B15 a bomb": (bomb, "its arrays take up 314,572,928 bytes"),
    "B15 a shape of 40 GB": (
        member("more", np.zeros(3), header=(10**10,)),
        "more says that it holds 40,000,000,000 bytes",
    ),
    "a negative shape": (member("more", np.zeros(3), header=(-3,)), "more says that it holds -12 bytes"),
    "B16 pickled objects": (member("more", np.array([{}])), "more holds pickled objects"),
    "an array twice": (member("score", np.zeros(3)), "weights.npz is no .npz file to be read: it holds score twice"),
    "another compression": (member("more", np.zeros(3), compression=zipfile.ZIP_LZMA), "compression that numpy does"),
    "a weight that nothing reads": (member("more", np.zeros(3, "f4")), "no node reads more"),
    "a scale of nothing": (member("more/scale", np.float32(1)), "weights.npz holds more/scale, the scale of nothing"),
    "a scale of 3": (
        member("score/scale", np.float32(3)),
        "weights.npz must hold score as int8 times a float32 power of two",
    ),
    "weights of float64": (npz("weights.npz", score=np.float64), "weights.npz must hold score as float32, got float64"),
    "B17 ids beyond the vocabulary": (
        npz("sentences.npz", ids=lambda x: put(x, (0, 0), 1 << 40)),
        "sentences.npz must have ids of 0 to 36",
    ),
    "negative ids": (npz("sentences.npz", ids=lambda x: put(x, (0, 0), -1)), "must have ids of 0 to 36"),
    "ids of one dimension": (npz("sentences.npz", ids=np.ravel), "must have ids of shape (B, T)"),
    "ids behind the end": (npz("sentences.npz", ids=lambda x: put(x, (1, 5), 3)), "ids behind a sentence's end"),
    "B18 events missing": (lambda f: (f / "events.npz").unlink(), "events.npz is missing"),
    "B19 other lengths": (npz("sentences.npz", lengths=lambda x: x[::-1] - 1), "must have lengths of 1 to 11 tokens"),
    "B20 lengths of 0": (npz("sentences.npz", lengths=lambda x: put(x, 1, 0)), "must have lengths of 1 to 11 tokens"),
    "B21 other words": (npz("sentences.npz", words=first_word), "does not hold its token"),
    "a token with two names": (npz("sentences.npz", tokens=first_word, words=first_word), "has two tokens"),
    "B22 labels flipped": (npz("sentences.npz", labels=lambda x: 1 - x), "manifest.json: right is not"),
    "labels beyond the classes": (npz("sentences.npz", labels=lambda x: x + 7), "must have labels below 2"),
    "labels of text": (npz("sentences.npz", labels=lambda x: x.astype(str)), "must have labels as integer"),
    "B23 an island cut": (cut("islands/blocks.0.lif1.nir"), "blocks.0.lif1.nir cannot be read"),
    "B25 a graph 100,000 deep": (text("graph.json", NESTED), "graph.json is no whole JSON file (nested too deeply)"),
    "a graph that is none": (text("graph.json", "{}"), "graph.json must be 'spikegpt_lora/graph/1'"),
    "B26 an unknown operation": (
        node("sigmoid", op="relu"),
        "graph.json: unknown operation 'relu', in node blocks.0.att.sigmoid",
    ),
    **{
        f"B27-33 operation {op!r}": (node("sigmoid", op=op), f"unknown operation {op!r}")
        for op in ("run", "step", "__init__", "__class__", "__setattr__", "classify", ["lif"])
    },
    "B34 an input that comes later": (node("layernorm", inputs=["ln_out"]), "ln_out must stand before what reads it"),
    "B35 tau 0": (node("lif", tau=0), "tau must be a power of two"),
    "tau of text": (node("lif", tau="2"), "tau must be a number"),
    "thresholds of NaN": (node("lif", v_threshold=float("nan")), "v_threshold must be a number"),
    "thresholds of other units": (node("lif", v_threshold=[1.0, 1.0, 1.0]), "v_threshold must be a number, or"),
    "B36 a weight that is not there": (node("linear", weight="gone"), "weight must be in weights.npz, got 'gone'"),
    "B37 a weight of another shape": (npz("weights.npz", score=lambda x: x[:, :-1]), "weight must be (2, 12)"),
    "B38 class names swapped": (swapped, "manifest.json: classes is not what the files say"),
    "B39 no nodes": (graph(lambda nodes: nodes.clear()), "nodes must be a list"),
    "no pool": (graph(lambda nodes: nodes.pop()), "graph.json: the last node alone must be a pool"),
    "B41 a node twice": (graph(lambda nodes: nodes.append(nodes[5])), "must have a name of its own"),
    "a node that is a list": (graph(lambda nodes: nodes.append([])), "must be an object"),
    "sums of sums": (graph(twice_as_many_sums), "interpreter: another current than recorded: population blocks.0.lif1"),
    "a name that moves the cursor": (graph(renamed), "must stand before what reads it"),
    "B42 currents of NaN": (
        traces(lambda f: f[f"{LIF}/current/data"].__setitem__((0, 0, 0), np.nan)),
        "traces.h5: spikes are not what the currents give: population blocks.0.lif1, sample 0",
    ),
    "B43 16 TB of fill value": (
        traces(
            replaced(
                f"{LIF}/current/data",
                lambda f: f.create_dataset(f"{LIF}/current/data", (1 << 14, 1 << 14, 1 << 14), "f4", chunks=(64,) * 3),
            )
        ),
        "traces.h5 would take up",
    ),
    "a chunk of 16 TB": (
        traces(
            replaced(
                f"{LIF}/current/data",
                lambda f: f.create_dataset(
                    f"{LIF}/current/data", (4, 11, 12), "f4", maxshape=(None,) * 3, chunks=(1 << 9, 1 << 9, 1 << 9)
                ),
            )
        ),
        "traces.h5 would take up",
    ),
    "B44 a population less": (traces(lambda f: f.__delitem__("/nodes/blocks.0.lif1")), "other populations"),
    "B45 storage in /etc/passwd": (
        traces(
            replaced(
                f"{LIF}/current/data",
                lambda f: f.create_dataset(f"{LIF}/current/data", (4, 11, 12), "f4", external="/etc/passwd"),
            )
        ),
        f"traces.h5 keeps {LIF}/current/data in another file",
    ),
    "B46 a soft link": (
        traces(replaced("/nodes/emb", lambda f: f.__setitem__("/nodes/emb", h5py.SoftLink("/nodes")))),
        "traces.h5 holds a link, emb, to somewhere else",
    ),
    "B47 an external link": (
        traces(replaced("/nodes/emb", lambda f: f.__setitem__("/nodes/emb", h5py.ExternalLink("/etc/passwd", "/")))),
        "traces.h5 holds a link, emb, to somewhere else",
    ),
    "B48 a virtual data set": (traces(replaced(f"{LIF}/current/data", virtual)), "in another file"),
    "B49 currents of float64": (
        traces(
            replaced(
                f"{LIF}/current/data", lambda f: f.create_dataset(f"{LIF}/current/data", data=np.zeros((4, 11, 12)))
            )
        ),
        "traces.h5 must have current of blocks.0.lif1 as float32 (4, 11, 12)",
    ),
    "B50 spikes of other sentences": (
        traces(replaced(f"{LIF}/spikes/data", lambda f: f.create_dataset(f"{LIF}/spikes/data", (5, 11, 12), bool))),
        "traces.h5 must have spikes of blocks.0.lif1 as bool (4, 11, 12)",
    ),
    "spikes behind the end": (
        traces(lambda f: f[f"{LIF}/spikes/data"].__setitem__((1, 5, 0), True)),
        "traces.h5 has spikes of blocks.0.lif1 behind a sentence's end",
    ),
    "an attribute that is an array": (
        traces(lambda f: f["nodes/emb"].attrs.create("more", np.zeros(9))),
        "traces.h5 has an attribute, more of /nodes/emb, that is no scalar",
    ),
    "B51 an island inside itself": (
        island(lambda n: n["nodes"].__setitem__("more", n)),
        "blocks.0.lif1.nir holds /node",
    ),
    "an island of islands": (
        island(lambda n: n.create_group("/".join(["node"] * 40))),
        "blocks.0.lif1.nir has groups more than 8 deep",
    ),
    "B52 an unknown node": (
        island(lambda n: n["nodes/lif/type"].__setitem__((), "Evil")),
        "blocks.0.lif1.nir cannot be read",
    ),
    "another kind of node": (
        island(lambda n: n["nodes/input/type"].__setitem__((), "Output")),
        "blocks.0.lif1.nir",
    ),
    "B53 islands a link": (linked("islands", None), "islands is a link to", False),
    "B54 a file a link": (linked("graph.json", None), "graph.json is a link to", False),
    "B55 costs a list": (text("cost.json", "[]"), "cost.json must hold a JSON object"),
    "B56 effective MACs 1": (cost("as_executed", "effective_macs", value=1.0), "cost.json: as_executed.effective_macs"),
    "B57 no layers": (lambda f: edit(f / "cost.json", lambda c: c["as_executed"].pop("layers")), "as_executed must"),
    "energy of another chip": (
        cost("as_executed", "constants", "fp32_mac", value=0.1),
        "cost.json: as_executed.constants.fp32_mac",
    ),
    "fewer additions": (cost("event_driven", "additions", value=7.0), "cost.json: event_driven.additions is 7.0"),
    "fewer additions of an earlier version": (
        lambda f: edit(f / "cost.json", lambda c: c["event_driven"].update(additions=7.0, shortest={}, table={})),
        "cost.json: event_driven.additions is 7.0",
    ),
    "costs of text": (cost("as_executed", "tokens", value="many"), "cost.json: as_executed.tokens is 'many'"),
    "costs that do not exist": (cost("more", value=1), "cost.json: more is unknown"),
    "a file of 16 TiB": (lambda f: os.truncate(f / "cost.json", (1 << 44) - 4096), "bytes, at most", False),
    "B58 a program": (extra("evil.py"), "evil.py is no file of a bundle"),
    "a program among the islands": (extra("islands/evil.py"), "islands/evil.py is no file of a bundle"),
    "a folder": (extra("more/graph.json"), "more is no file: a bundle holds files alone"),
    "an island of nothing": (
        lambda f: shutil.copy(f / "islands/blocks.0.lif1.nir", f / "islands/more.nir"),
        "islands/more.nir is no population's",
    ),
    "B60 score and logits turned round": (turned_round, "manifest.json: right is not what the files say"),
    "an event of no neuron": (
        npz("events.npz", events=lambda x: put(x, -1, (0, 0, 0, 1 << 20, 1.0))),
        "events.npz has an event of a neuron that its population has not",
    ),
    "an event of no population": (
        npz("events.npz", events=lambda x: put(x, -1, (0, 0, 99, 0, 1.0))),
        "events.npz has an event whose population is none of",
    ),
    "events of another type": (npz("events.npz", events=lambda x: x["sample"]), "events.npz must hold records"),
    "other weights said": (manifest(weights="int8"), "manifest.json: weights is not what the files say"),
    "something else said": (manifest(license="mine"), "manifest.json: license is unknown"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_named_and_the_exit_status_is_1(kind, copy, monkeypatch, capsys):
    forge, words, *hashes_remade = WRONG[kind]
    forge(copy)
    if not hashes_remade:
        reseal(copy)
    elif kind != "B10 no hash of the manifest":
        (copy / "manifest.json.sha256").write_text(own_hash(copy))
    status, said = checked(copy, monkeypatch, capsys)
    lines = [line for line in said.splitlines() if line.startswith("WRONG")]
    assert status == 1 and any(words in line for line in lines), said
    assert all(line.isprintable() for line in said.splitlines())
    assert said.rstrip().endswith("the bundle is NOT right")


def test_what_nobody_touched_is_right(copy, monkeypatch, capsys):
    status, said = checked(copy, monkeypatch, capsys)
    assert status == 0, said
    assert "WRONG" not in said and NOT_PROVEN in said


def test_costs_that_only_earlier_versions_counted_are_said_not_to_be_recomputed(copy, monkeypatch, capsys):
    cost("event_driven", "shortest", value={"additions": float(7)})(copy)
    reseal(copy)
    status, said = checked(copy, monkeypatch, capsys)
    assert status == 0 and "costs: event_driven.shortest of an earlier version, no longer recomputed" in said, said


NONE = {
    "B02 manifest cut": (cut("manifest.json"), "is no whole JSON file"),
    "B03 manifest a list": (text("manifest.json", "[]"), "must hold a JSON object"),
    "B08 manifest 100,000 deep": (text("manifest.json", NESTED), "nested too deeply"),
    "a manifest of 20 MB": (text("manifest.json", " " * 20_000_000), "must be at most"),
    "no schema": (text("manifest.json", "{}"), "its manifest.json cannot be read ('schema')"),
    "B09 another schema": (manifest(schema="other/2"), "is a bundle of schema 'other/2'"),
    "a schema that is a list": (manifest(schema=[1]), "is a bundle of schema [1]"),
    "B90 no folder": (shutil.rmtree, "No such file or directory"),
    "B91 a file": (lambda f: (shutil.rmtree(f), f.write_text("")), "Not a directory"),
    "B92 an empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), "No such file or directory"),
    "a manifest that is a link": (linked("manifest.json", None), "manifest.json is no file"),
    "a manifest that never ends": (
        lambda f: ((f / "manifest.json").unlink(), os.mkfifo(f / "manifest.json")),
        "manifest.json is no file",
    ),
}


@pytest.mark.parametrize("kind", NONE)
def test_what_is_no_bundle_is_said_and_the_exit_status_is_2(kind, copy, monkeypatch, capsys):
    forge, words = NONE[kind]
    forge(copy)
    status, said = checked(copy, monkeypatch, capsys)
    assert status == 2 and words in said and str(copy) in said and len(said.splitlines()) == 1


def test_what_right_does_not_mean_is_said_where_nobody_can_find_out(copy, monkeypatch, capsys):
    """B38 and B60 by a forger who writes the manifest anew: another right bundle, of another model."""
    swapped(copy)
    turned_round(copy)
    rewrite(copy / "sentences.npz", labels=lambda x: 1 - x)
    names = json.loads((copy / "graph.json").read_text())["labels"]
    manifest(classes=names)(copy)
    reseal(copy)
    status, said = checked(copy, monkeypatch, capsys)
    assert status == 0, said
    assert said.rstrip().endswith(f"the bundle is right\n{NOT_PROVEN}")
