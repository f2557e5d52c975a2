"""Spikes of other levels than 0 and 1: every file of a bundle carries them, and its check passes."""

import shutil

import numpy as np
import pytest
import torch
from builders import batch_of, edit, reseal, small

from spikegpt_lora.export import (
    AddressEventDataset,
    Bundle,
    EventDataset,
    check_bundle,
    draw_all,
    export_bundle,
    interpreter,
    simulators,
)
from spikegpt_lora.export.event_driven import EventDriven
from spikegpt_lora.export.graph import Graph
from spikegpt_lora.export.islands import island
from spikegpt_lora.export.pictures import firing_rates
from spikegpt_lora.neurons.lif import LIF

NAME, LEVELS, THRESHOLD = "blocks.1.lif1", [-1, 0, 1, 2, 3], 4.0
A_GATE = "blocks.1.att.key.lora_gate.default"


class Steps(LIF):
    """s = the whole thresholds in h, from -1 to 3; v = h - s V_theta."""

    def forward(self, x, carry=None, mask=None):
        v, spikes = x.new_zeros(x.shape[0], x.shape[2]), []
        for t in range(x.shape[1]):
            h = v + (x[:, t] - v) / self.tau
            spikes.append(torch.clamp(torch.floor(h / self.v_threshold), -1, 3))
            v = h - spikes[-1] * self.v_threshold
        return torch.stack(spikes, dim=1)


def steps(node, x, v):
    h = v + (x - v) / x.dtype.type(node["tau"])
    spikes = np.clip(np.floor(h / x.dtype.type(node["v_threshold"])), -1, 3)
    return h, spikes, h - spikes * x.dtype.type(node["v_threshold"])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """One population of the model gives whole numbers, and the graph and the interpreter know it as an operation."""
    model, add = small(), Graph.add
    base = next(module for module in model.modules() if hasattr(module, "blocks"))
    base.blocks[1].lif1 = Steps(v_threshold=THRESHOLD)

    def add_steps(graph, name, op, inputs, **settings):
        changes = {"op": "steps", "levels": LEVELS} if name == NAME else {"op": op}
        return add(graph, name, inputs=inputs, **settings | changes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Graph, "add", add_steps)
        patch.setitem(interpreter.NEURONS, "steps", steps)
        yield Bundle(export_bundle(model, batch_of(), tmp_path_factory.mktemp("levels") / "bundle", event_driven=True))


def test_the_check_passes_and_names_what_no_simulator_runs(bundle):
    results = check_bundle(bundle.folder)
    assert results["passed"], results["problems"]
    reason = "NIR has no node for its operation, steps"
    for name in simulators.installed():
        assert results["simulators"][name]["left_out"][NAME] == reason
    assert not any(NAME in file for file in bundle.islands)
    with pytest.raises(ValueError, match=f"{NAME} can be no island: {reason}"):
        island(next(node for node in bundle.nodes if node["name"] == NAME), 12)


def test_traces_and_events_hold_the_levels_and_binary_populations_are_as_ever(bundle):
    spikes = bundle.traces[NAME]["spikes"]
    assert spikes.dtype == np.int8 and set(np.unique(spikes)) == set(LEVELS)
    assert {trace["spikes"].dtype for name, trace in bundle.traces.items() if name != NAME} == {np.dtype(bool)}
    events, names = bundle.events
    mine = events[events["population"] == names.index(NAME)]
    assert np.array_equal(mine["value"], spikes[mine["sample"], mine["t"], mine["index"]])
    said = {one["name"]: one for one in bundle.manifest["populations"]}
    assert said[NAME]["kind"] == "integer" and said[NAME]["islands"] == [] and said["emb"]["kind"] == "binary"
    assert NAME in bundle.manifest["host"]["operations"]["steps"]


def test_data_sets_give_the_spikes_and_of_a_graded_gate_ones(bundle):
    names = [NAME, A_GATE]
    wanted = [bundle.traces[name]["spikes"][0] for name in names]
    data, events = EventDataset(bundle.folder, names), AddressEventDataset(bundle.folder, names)[0][0]
    assert np.array_equal(data[0][0].numpy(), np.concatenate(wanted, axis=1))
    assert np.array_equal(data[0][0].numpy()[events["t"] // 100, events["x"]], events["p"])


def test_a_spike_of_k_adds_its_columns_k_times(bundle):
    program, lengths = EventDriven(bundle.folder, np.float64), bundle.sentences["lengths"]
    program.run(bundle.sentences["ids"], lengths)
    rows = program.forms["blocks.1.ln2"]["columns"].shape[1]
    spikes = bundle.traces[NAME]["spikes"].astype(int)
    assert program.additions["blocks.1.ln2", NAME] == np.abs(spikes).sum() * rows
    counts = bundle.cost["as_executed"]["populations"][NAME]
    assert counts["outputs"] - counts["zeros"] == np.count_nonzero(spikes)


def test_pictures_show_the_share_that_spikes(bundle, tmp_path):
    assert len(draw_all(bundle, tmp_path)) == 4
    fired = bundle.traces[NAME]["spikes"][0] != 0
    assert firing_rates(bundle)[NAME][0] == pytest.approx(fired.mean())


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ([0, 1, 2], "traces.h5 has spikes of blocks.1.lif1 that are none of [0, 1, 2]"),
        ([0, 1], "traces.h5 must have spikes of blocks.1.lif1 as bool"),
        ([3, 0], "levels must be whole numbers of -128 to 127 in rising order"),
        ([0, 300], "levels must be whole numbers of -128 to 127 in rising order"),
    ],
)
def test_other_levels_than_the_spikes_are_found(levels, words, bundle, tmp_path):
    copy = shutil.copytree(bundle.folder, tmp_path / "copy")

    def change(graph):
        next(node for node in graph["nodes"] if node["name"] == NAME)["levels"] = levels

    edit(copy / "graph.json", change)
    reseal(copy)
    assert any(words in line for line in check_bundle(copy)["problems"])


def test_spikes_that_a_node_does_not_name_are_never_written(tmp_path):
    model = small()
    base = next(module for module in model.modules() if hasattr(module, "blocks"))
    base.blocks[0].lif2 = Steps(v_threshold=THRESHOLD)
    with pytest.raises(ValueError, match=r"blocks.0.lif2 gives -1, 0, 1, 2, 3, and its levels are \[0, 1\]"):
        export_bundle(model, batch_of(), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())
