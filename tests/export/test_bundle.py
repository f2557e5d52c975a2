"""The bundle and its check, on a small model: what is right passes, whatever is altered is found and named."""

import copy as copy_module
import json
import shutil
import subprocess
import sys

import h5py
import nir
import numpy as np
import pytest
import torch
from builders import batch_of, edit, put, reseal, rewrite, small
from helpers import everything
from peft import AdaLoraConfig, LoraConfig, get_peft_model

from spikegpt_lora.adapters import SpikeGate
from spikegpt_lora.convert.weights import quantize, quantized_copy
from spikegpt_lora.export import (
    AddressEventDataset,
    Bundle,
    EventDataset,
    check_bundle,
    export_bundle,
    islands,
    simulators,
    to_tonic,
)
from spikegpt_lora.export.__main__ import main
from spikegpt_lora.export.graph import graph_of
from spikegpt_lora.export.interpreter import Program
from spikegpt_lora.export.reruns import unable
from spikegpt_lora.export.sentences import left_aligned
from spikegpt_lora.model import SpikeGPTModel
from spikegpt_lora.utils.files import UNFINISHED

ADAPTED = ["none", "lora", "graded", "binary", "token"]


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    return export_bundle(small(), batch_of(), tmp_path_factory.mktemp("bundle") / "graded", event_driven=True)


@pytest.fixture
def copy(graded, tmp_path):
    """The bundle, to be spoilt."""
    return shutil.copytree(graded, tmp_path / "bundle")


@pytest.mark.parametrize(("adapter", "weights"), [*((one, "float32") for one in ADAPTED), ("graded", "int8")])
def test_a_bundle_is_right_in_every_mode(adapter, weights, tmp_path):
    for name in simulators.SIMULATORS.values():
        pytest.importorskip(name)
    folder = export_bundle(small(adapter), batch_of(), tmp_path / "bundle", weights=weights)
    results = check_bundle(folder)
    assert results["problems"] == [] and results["passed"]
    for simulator in results["simulators"].values():
        assert simulator["neurons"]["wrong"] == simulator["with_weights"]["wrong"] == 0
        assert simulator["neurons"]["islands"] == len(Bundle(folder).neurons)
        assert simulator["with_weights"]["islands"] >= 2  # lif1 of each block, and with adapters their gates
    assert check_bundle(folder) == results


def test_a_check_only_reads(copy, tmp_path, monkeypatch, capsys):
    for path in [*copy.rglob("*"), copy]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = everything(copy)
    monkeypatch.setattr(sys, "argv", ["export", "check", str(copy), "--write", str(tmp_path / "results")])
    assert main() == 0
    said = capsys.readouterr().out
    assert everything(copy) == before
    assert sorted(path.name for path in (tmp_path / "results").glob("[!.]*")) == ["check.json", "check.txt"]
    assert (tmp_path / "results" / "check.txt").read_text() == said
    assert json.loads((tmp_path / "results" / "check.json").read_text())["passed"]


@pytest.mark.parametrize("inside", [".", "islands", "new/folder"])
def test_results_are_never_written_into_the_bundle(inside, copy, monkeypatch, capsys):
    before = everything(copy)
    monkeypatch.setattr(sys, "argv", ["export", "check", str(copy), "--write", str(copy / inside)])
    assert main() == 2 and "lies in the bundle, which a check only reads" in capsys.readouterr().err
    assert everything(copy) == before


def test_thresholds_of_each_rank_are_left_out_by_name_where_a_simulator_takes_only_one(tmp_path):
    for package in simulators.SIMULATORS.values():
        pytest.importorskip(package)
    model = small("token")
    gate = next(module for module in model.modules() if isinstance(module, SpikeGate))
    thresholds = torch.linspace(0.5, 1.5, 4, dtype=torch.float64)
    gate.threshold_now = lambda: thresholds
    node = next(n for n in graph_of(model).nodes if n["op"] == "lif" and isinstance(n["v_threshold"], list))
    reasons = {simulator: unable(simulator, node) for simulator in simulators.SIMULATORS}
    one = "it takes one v_threshold a population"
    assert reasons == {"snnTorch": one, "Norse": None, "spikingjelly": one}
    assert unable("spikingjelly", node | {"tau": 1.0, "v_threshold": 1.0}) == "it takes no tau of 1"


def test_the_interpreter_and_the_event_driven_form_have_the_models_spikes(graded):
    cost, exported = json.loads((graded / "cost.json").read_text()), Bundle(graded).manifest["checks"]["exported"]
    for compared in (exported, cost["event_driven"]["compared"]):
        assert compared["different_spikes"] == compared["different_predictions"] == 0
        assert compared["steps"] > 1000 and compared["largest_logit_difference"] < 1e-9


def test_no_addition_is_lost_between_layers(graded):
    cost = json.loads((graded / "cost.json").read_text())["event_driven"]
    assert sum(layer["additions"] for layer in cost["layers"].values()) == pytest.approx(cost["additions"])
    assert cost["layers"].keys() == json.loads((graded / "cost.json").read_text())["as_executed"]["layers"].keys() - {
        "score"
    }


@pytest.mark.parametrize("simulator", simulators.SIMULATORS)
def test_the_control_island_fails_only_with_a_threshold_that_is_wrong_on_purpose(simulator):
    pytest.importorskip(simulators.SIMULATORS[simulator])
    control = simulators.self_test(simulator)
    assert control["ties"] > 10 and control["wrong"] == 0 and control["wrong_on_purpose"] > 10


def test_spikingjelly_fires_at_the_files_threshold_and_the_others_above_it():
    for package in simulators.SIMULATORS.values():
        pytest.importorskip(package)
    node = {"name": "one", "op": "lif", "tau": 2.0, "v_threshold": 1.0, "v_reset": 0.0, "from_rest": False}
    below = np.nextafter(np.float32(1), np.float32(0))  # where a file's threshold lies: the model does not fire there
    current = np.full((1, 1, 1), 2 * below)
    fired = {
        simulator: simulators.replay(simulator, islands.island(node, 1), current) for simulator in simulators.SIMULATORS
    }
    assert {simulator: bool(spikes.all()) for simulator, spikes in fired.items()} == {
        simulator: simulator in simulators.FIRE_AT for simulator in simulators.SIMULATORS
    }
    assert simulators.blind("spikingjelly", node) == 1 - below and simulators.blind("Norse", node) is None


def test_one_byte_anywhere_is_found(copy):
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    assert len(files) > 20
    for path in files:
        whole = path.read_bytes()
        at = len(whole) // 2
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            results = check_bundle(copy)
        except ValueError:  # a manifest that can't be read any more
            assert path.name == "manifest.json"
        else:
            assert not results["passed"] and path.name in " ".join(results["problems"])
        path.write_bytes(whole)
    path.unlink()
    assert f"{path.relative_to(copy)} is missing" in check_bundle(copy)["problems"]


def test_a_spike_altered_with_its_hash_is_named_by_every_part_of_the_check(copy):
    name, sample, step, unit = "blocks.1.lif1", 2, 3, 5
    with h5py.File(copy / "traces.h5", "r+") as file:
        found = []
        file.visititems(lambda path, item: found.append(path) if isinstance(item, h5py.Dataset) else None)
        path = next(p for p in found if name in p and "spikes" in p)
        file[path][sample, step, unit] = not file[path][sample, step, unit]
    reseal(copy)
    problems = check_bundle(copy)["problems"]
    where = f"population {name}, sample {sample}, step {step}, neuron {unit}"
    kinds = ["traces.h5: spikes are not", "events.npz and traces.h5", "interpreter:"]
    kinds += [f"{simulator}, island:" for simulator in simulators.installed()]
    for kind in kinds:
        assert any(line.startswith(kind) and where in line for line in problems), (kind, problems)


def other_threshold(folder):
    file = folder / "islands" / "blocks.0.lif1.nir"
    graph = nir.read(file)
    graph.nodes["lif"].v_threshold = np.nextafter(graph.nodes["lif"].v_threshold.astype(np.float32), np.float32(9))
    nir.write(str(file), graph)


def other_neuron(folder):
    def change(graph):
        next(node for node in graph["nodes"] if node["name"] == "blocks.1.lif2")["v_threshold"] = 0.3

    edit(folder / "graph.json", change)


FORGERIES = {
    "a threshold that was not lowered": (other_threshold, "blocks.0.lif1.nir is not the graph's population"),
    "an island that is gone": (
        lambda f: (f / "islands" / "blocks.0.lif2.nir").unlink(),
        "blocks.0.lif2.nir is missing",
    ),
    "another neuron": (other_neuron, "population blocks.1.lif2"),
    "another id": (lambda f: rewrite(f / "sentences.npz", ids=lambda x: put(x, (0, 2), 36 - x[0, 2])), "interpreter: "),
    "another logit": (
        lambda f: rewrite(f / "sentences.npz", logits=lambda x: put(x, (1, 0), np.nan)),
        "other logits than recorded for sample 1",
    ),
    "another weight": (
        lambda f: rewrite(f / "weights.npz", **{"blocks.1.att.output": lambda x: x * 1.01}),
        "another current than recorded: population blocks.1.lif1",
    ),
    "another value of an event": (
        lambda f: rewrite(f / "events.npz", events=lambda x: put(x, -1, (*x[-1].tolist()[:4], 9.0))),
        "not the spikes and values of traces.h5",
    ),
    "an event twice": (
        lambda f: rewrite(f / "events.npz", events=lambda x: np.concatenate([x, x[-1:]])),
        "not the spikes and values of traces.h5",
    ),
    "half a file": (
        lambda f: (f / "events.npz").write_bytes((f / "events.npz").read_bytes()[:500]),
        "events.npz is no .npz file to be read",
    ),
    "other costs": (
        lambda f: edit(
            f / "cost.json", lambda c: c["as_executed"]["layers"]["blocks.0.att.key"].update(dense_macs=1.0)
        ),
        "cost.json: as_executed.layers.blocks.0.att.key.dense_macs is 1.0",
    ),
    "other sizes": (
        lambda f: edit(f / "manifest.json", lambda m: m.update(sentences=9999)),
        "manifest.json: sentences is not what the files say",
    ),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_forgery_with_the_right_hashes_is_found(copy, kind):
    forge, message = FORGERIES[kind]
    forge(copy)
    reseal(copy)
    results = check_bundle(copy)
    assert not results["passed"] and any(message in line for line in results["problems"]), results["problems"]


def test_a_file_that_the_manifest_does_not_name_is_found(copy):
    (copy / "more.txt").write_text("more")
    assert check_bundle(copy)["problems"] == ["more.txt is no file of a bundle, and is not in the manifest"]


def test_a_graph_that_is_not_the_model_is_never_written(tmp_path, monkeypatch):
    monkeypatch.setattr(Program, "squared_relu", lambda self, node, inputs, state, after: inputs[0])
    with pytest.raises(ValueError, match="the interpreter does not compute what the model does"):
        export_bundle(small(), batch_of(), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_an_export_reads_the_sentences_three_times_and_copies_the_model_once(tmp_path, monkeypatch):
    """In float32 to record spikes and logits and to count operations, in float64 for the interpreter and its forms."""
    calls, model, deepcopy = [], small(), copy_module.deepcopy

    def copied(x, *memo):
        calls.extend(["copy"] * (isinstance(x, torch.nn.Module) and not memo))
        return deepcopy(x, *memo)

    base = next(module for module in model.modules() if isinstance(module, SpikeGPTModel))
    base.register_forward_hook(lambda module, inputs, output: calls.append(module.emb.weight.dtype))
    monkeypatch.setattr(copy_module, "deepcopy", copied)
    export_bundle(model, batch_of(), tmp_path / "bundle", event_driven=True)
    assert calls == ["copy", torch.float32, torch.float32, torch.float64]


def test_what_a_killed_export_left_is_gone_after_the_next(tmp_path):
    left = tmp_path / f"{UNFINISHED}bundle"
    left.mkdir()
    (left / "graph.json").write_text("half")
    export_bundle(small(), batch_of(), tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_adapters_that_the_graph_would_miss_are_refused(tmp_path):
    merged = small("lora")
    merged.merge_adapter()
    with pytest.raises(ValueError, match="adapter merged into W0"):
        export_bundle(merged, batch_of(), tmp_path / "bundle")
    wide = get_peft_model(small("none"), LoraConfig(target_modules=["score"], r=2))
    with pytest.raises(ValueError, match="score must be a torch.nn.Linear without bias or adapter"):
        export_bundle(wide, batch_of(), tmp_path / "bundle")
    singular = get_peft_model(small("none"), AdaLoraConfig(target_modules=["key"], total_step=10, tfinal=1))
    with pytest.raises(ValueError, match="AdaLoRA is not exported"):
        export_bundle(singular, batch_of(), tmp_path / "bundle")
    batch = batch_of()
    batch["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="sentence 1 has no token"):
        export_bundle(small(), batch, tmp_path / "bundle")


def test_files_are_read_by_stock_numpy_h5py_and_nir(graded):
    bundle = Bundle(graded)
    data = nir.read_data(str(graded / "traces.h5"))
    assert data.nodes["blocks.0.lif1"].observables["spikes"].data.dtype == bool
    with h5py.File(graded / "traces.h5") as file:
        assert file["nodes/blocks.0.lif1/observables/current/data"].dtype == np.float32
    kinds = {type(node) for path in (graded / "islands").iterdir() for node in nir.read(path).nodes.values()}
    assert kinds == {nir.Input, nir.Linear, nir.LIF, nir.Output}
    for name in ("events.npz", "sentences.npz", "weights.npz"):
        with np.load(graded / name, allow_pickle=False) as file:
            assert all(file[key].dtype != object for key in file.files)
    assert {p["name"] for p in bundle.manifest["populations"]} == set(bundle.traces)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lif_v_reset": None}, "blocks.0.lif1: a soft reset"),
        ({"lif_tau": 3.0}, "tau must be a power of two"),
        ({"lif_v_reset": 0.5}, "v_reset must be 0"),
    ],
)
def test_neurons_that_simulators_would_not_run_exactly_are_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_bundle(small("none", **change), batch_of(), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_bf16_unknown_modules_and_a_folder_that_exists_are_refused(tmp_path):
    with pytest.raises(ValueError, match="membranes kept in bfloat16"):
        export_bundle(small().bfloat16(), batch_of(), tmp_path / "bundle")
    with pytest.raises(FileExistsError, match="give another folder"):
        export_bundle(small(), batch_of(), tmp_path)
    with pytest.raises(ValueError, match="weights must be one of float32, int8"):
        export_bundle(small(), batch_of(), tmp_path / "bundle", weights="int4")
    model = small("none")
    model.spikegpt.blocks[1].dropout = torch.nn.GELU()
    with pytest.raises(ValueError, match="blocks.1.dropout is a GELU, for which the graph has no operation"):
        export_bundle(model, batch_of(), tmp_path / "bundle")


def test_the_model_that_is_exported_stays_as_it_is(tmp_path):
    model = small("graded")
    before = {name: p.clone() for name, p in model.state_dict().items() if isinstance(p, torch.Tensor)}
    export_bundle(model.train(), batch_of(), tmp_path / "bundle", weights="int8")
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items() if name in before)


def test_a_scaling_that_is_no_power_of_two_is_in_the_weight(tmp_path):
    model = small("graded")
    for module in model.modules():
        if hasattr(module, "scaling"):
            module.scaling["default"] = 1.3
    graph = graph_of(quantized_copy(model))
    graph.save(tmp_path)
    batch = batch_of()
    logits, _ = Program(tmp_path, np.float64).run(*left_aligned(batch))
    wanted = model.double()(batch["input_ids"], batch["attention_mask"]).logits.detach().numpy()
    assert np.abs(logits - wanted).max() < 1e-5


def test_int8_is_the_nearest_of_a_grid_of_powers_of_two_and_stays_there():
    weight = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).numpy()
    grid, scale = quantize(weight)
    assert grid.dtype == np.int8 and np.log2(scale) == np.round(np.log2(scale)) and np.abs(grid).max() > 63
    assert np.abs(grid * scale - weight).max() <= scale / 2
    again, same = quantize(grid * scale)
    assert same == scale and np.array_equal(again, grid)
    assert np.array_equal(quantize(np.zeros((2, 2), np.float32))[0], np.zeros((2, 2)))


def test_events_play_back_as_the_recorded_spikes(graded):
    bundle, names = Bundle(graded), ["blocks.1.lif2", "emb"]
    data = EventDataset(graded, names)
    assert len(data) == 4 and [label for _, label in data] == [0, 1, 1, 0]
    for i, (spikes, _) in enumerate(data):
        length = int(bundle.sentences["lengths"][i])
        for name in names:
            assert np.array_equal(spikes[:, data.slices[name]].numpy(), bundle.traces[name]["spikes"][i, :length])
    with pytest.raises(ValueError, match="no population 'lif9'"):
        EventDataset(graded, ["lif9"])


def test_tonic_arrays_hold_the_same_spikes_in_order_of_time(graded):
    data = EventDataset(graded)
    for (events, label, words), (spikes, same) in zip(to_tonic(graded), data, strict=True):
        grid = np.zeros(spikes.shape)
        grid[events["t"] // 100, events["x"]] = events["p"]
        assert events.dtype.names == ("t", "x", "p") and (np.diff(events["t"]) >= 0).all()
        assert np.array_equal(grid, spikes.numpy()) and label == same and len(words) == len(spikes)


def test_tonics_caches_take_the_pairs_of_events_and_label(graded, tmp_path):
    """As tonic's DiskCachedDataset does: an item is unpacked into two, each written by h5py, lzf if it is an array."""
    data, names = AddressEventDataset(graded), ["blocks.1.lif2"]
    for i, (events, label) in enumerate(data):
        with h5py.File(tmp_path / f"{i}_0.hdf5", "w") as file:
            file.create_dataset("data/0", data=events, compression="lzf")
            file.create_dataset("target/0", data=label)
        with h5py.File(tmp_path / f"{i}_0.hdf5") as file:
            assert np.array_equal(file["data/0"][()], events) and file["target/0"][()] == label
        assert data.words_of(i) == to_tonic(graded)[i][2] and len(data.words_of(i)) == data.lengths[i]
    assert len(AddressEventDataset(graded, names)[0][0]) == EventDataset(graded, names)[0][0].sum()


def test_graded_events_carry_what_is_passed_on(graded):
    bundle = Bundle(graded)
    with np.load(graded / "events.npz") as file:
        events, names = file["events"], file["populations"].tolist()
    name = next(n for n in names if ".lora_gate." in n)
    mine = events[events["population"] == names.index(name)]
    current = bundle.traces[name]["current"]
    assert len(mine) and np.array_equal(mine["value"], current[mine["sample"], mine["t"], mine["index"]])
    assert set(events["value"][events["population"] == names.index("emb")]) == {1.0}


def test_left_padding_gives_the_same_bundle(graded, tmp_path):
    batch = batch_of()
    rows = [(ids[mask.bool()], mask.sum()) for ids, mask in zip(batch["input_ids"], batch["attention_mask"])]
    left = {
        "input_ids": torch.stack([torch.cat([torch.zeros(11 - n, dtype=torch.long), ids]) for ids, n in rows]),
        "attention_mask": torch.stack([torch.cat([torch.zeros(11 - n), torch.ones(n)]).long() for _, n in rows]),
        "labels": batch["labels"],
    }
    other = Bundle(export_bundle(small(), left, tmp_path / "bundle"))
    for name, trace in Bundle(graded).traces.items():
        assert np.array_equal(other.traces[name]["spikes"], trace["spikes"]), name


def test_the_command_checks_a_bundle_in_a_process_of_its_own(graded):
    command = [sys.executable, "-m", "spikegpt_lora.export", "check", str(graded)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "the bundle is right" in done.stdout, done.stderr


def test_the_command_runs_the_event_driven_form_again(graded, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export", "event-driven", str(graded)])
    assert main() == 0
    said, form = capsys.readouterr().out, Bundle(graded).cost["event_driven"]
    assert "4 of 4 predictions as recorded" in said and f"a token: {form['additions']:,.0f} additions" in said


def test_the_command_says_what_it_found_in_its_exit_status(copy, tmp_path, monkeypatch, capsys):
    (copy / "events.npz").write_bytes(b"none")
    for folder, status, words in [(copy, 1, "WRONG  events.npz was altered"), (tmp_path, 2, "is no bundle")]:
        monkeypatch.setattr(sys, "argv", ["export", "check", str(folder)])
        assert main() == status
        said = capsys.readouterr()
        assert words in (said.out if status == 1 else said.err)
