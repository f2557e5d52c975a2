"""Bundles of models whose matrices read integer spikes: their integers are in every file, and simulators give them too,
through neuron, matrix and neuron."""

import json
import shutil

import h5py
import numpy as np
import pytest
from builders import DESIGNS, batch_of, edit, put, reseal, spiking

from spikegpt_lora.export import Bundle, check_bundle, draw_all, export_bundle, interpreter, simulators, summary
from spikegpt_lora.export.encoders import Population, encoder_graph, path_graph
from spikegpt_lora.export.event_driven import EventDriven
from spikegpt_lora.export.simulators import run_neurons, self_test_integers
from spikegpt_lora.neurons.multilevel import IntegerSpikes

NAME = "blocks.1.att.spike_output"
SIMULATORS = pytest.mark.parametrize("simulator", simulators.SIMULATORS)
KINDS = {"M": ("none", "float32"), "H": ("none", "int8"), "adapted": ("binary", "float32")}


@pytest.fixture(scope="module", params=KINDS)
def bundle(request, tmp_path_factory):
    adapter, weights = KINDS[request.param]
    model = spiking(request.param if request.param in DESIGNS else "M", adapter, pooling="last_mean")
    for module in model.modules():
        if isinstance(module, IntegerSpikes):
            module.most[::3] = 2  # levels of a channel's own
    folder = tmp_path_factory.mktemp(request.param) / "bundle"
    return Bundle(export_bundle(model, batch_of(), folder, weights=weights))


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle.folder, tmp_path / "copy")


def problems(folder):
    reseal(folder)
    return "\n".join(check_bundle(folder)["problems"])


def test_the_check_passes_and_every_simulator_gives_every_integer_and_spike(bundle):
    results = check_bundle(bundle.folder)
    assert results["passed"], results["problems"]
    integer = [node for node in bundle.neurons if node["op"] == "integer_spikes"]
    tokens = int(bundle.real.sum())
    for name in simulators.installed():
        found = results["simulators"][name]
        assert found["integers"]["steps"] == tokens * sum(bundle.sizes[node["name"]] for node in integer)
        assert found["integers"]["islands"] == len(integer) and found["integers"]["wrong"] == 0
        assert found["paths"]["islands"] > 0 and found["paths"]["wrong"] == 0
        assert f"{found['paths']['steps']:,} spikes" in summary(results)
    assert results["interpreter"]["sentences_with_a_flip"] == 0


def test_schema_levels_and_kinds_are_said(bundle):
    assert bundle.manifest["schema"] == "spikegpt_lora/bundle/2" and bundle.integer
    said = {one["name"]: one for one in bundle.manifest["populations"]}
    assert said[NAME]["kind"] == "integer" and said[NAME]["levels"] == list(range(-7, 8))
    assert said["blocks.0.ffn.spike_value"]["levels"] == [k * k for k in range(8)]
    assert said[NAME]["islands"] == [f"islands/{NAME}.nir"]
    assert "levels" not in said["blocks.1.lif1"] and "integer spikes" in bundle.manifest["conventions"]


def test_events_hold_the_integers(bundle):
    events, names = bundle.events
    mine, spikes = events[events["population"] == names.index(NAME)], bundle.traces[NAME]["spikes"]
    assert np.array_equal(mine["value"], spikes[mine["sample"], mine["t"], mine["index"]])
    assert len(mine) == np.count_nonzero(spikes) and len(np.unique(spikes)) > 4
    assert len(draw_all(bundle, bundle.folder.parent / "pictures")) == 4


def test_costs_are_those_of_integer_spikes(bundle):
    spikes = bundle.cost["as_executed"]["spikes"]
    real = [name for name, one in spikes["layers"].items() if one["spikes"] == "real"]
    assert not real and 0 < spikes["blocks"]["weight_reads_share"] < 1
    assert spikes["blocks"]["energy"]["dram"]["8"]["break_even"] < 1 and spikes["real_valued_energy"] > 0


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (("layers", "blocks.0.att.key", "plane_additions"), "spikes.layers.blocks.0.att.key.plane_additions is"),
        (("blocks", "weight_reads"), "spikes.blocks.weight_reads is"),
        (("layers", "score", "largest_spike"), "spikes.layers.score.largest_spike is"),
    ],
)
def test_other_costs_are_found(place, words, copy):
    def change(cost):
        inside = cost["as_executed"]["spikes"]
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = int(inside[place[-1]] * 2)

    edit(copy / "cost.json", change)
    assert f"cost.json: as_executed.{words}" in problems(copy)


def test_an_integer_that_the_current_does_not_give_is_found_by_all(copy, bundle):
    with h5py.File(copy / "traces.h5", "r+") as file:
        spikes = file[f"nodes/{NAME}/observables/spikes/data"]
        spikes[0, 2, 1] = 1 if spikes[0, 2, 1] != 1 else 2
    found = problems(copy)
    assert f"traces.h5: spikes are not what the currents give: population {NAME}, sample 0, step 2, neuron 1" in found
    for simulator in simulators.installed():
        assert f"{simulator}, population: population {NAME}, sample 0, step 2, neuron 1" in found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"most": [7] * 11}, "most must be whole numbers of 1 to 127, 12 of them"),
        ({"scale": [0.0] * 12}, "scale must be numbers above 0, 12 of them"),
        ({"squared": True}, "signed and squared must be true or false, and not both true"),
        ({"levels": [-7, 0, 7]}, "levels must be [-7, -6"),
    ],
)
def test_an_integer_neuron_that_cannot_be_is_refused(change, words, copy):
    def altered(graph):
        next(node for node in graph["nodes"] if node["name"] == NAME).update(change)

    edit(copy / "graph.json", altered)
    assert words in problems(copy)


def test_files_of_the_other_schema_are_refused(copy):
    edit(copy / "graph.json", lambda graph: graph.update(schema="spikegpt_lora/graph/1"))
    assert "graph.json must be 'spikegpt_lora/graph/2'" in problems(copy)


def test_other_islands_are_found(copy):
    with h5py.File(copy / "islands" / f"{NAME}.nir", "r+") as file:
        weight = file["node/nodes/encoder/weight"]
        weight[...] = put(weight[()], (0, 0), 2)
    assert f"islands/{NAME}.nir is not the graph's population {NAME}" in problems(copy)


@SIMULATORS
def test_a_check_that_cannot_fail_says_nothing(simulator):
    if simulator not in simulators.installed():
        pytest.skip(f"{simulator} is not installed")
    found = self_test_integers(simulator)
    assert found["wrong"] == 0 and found["wrong_on_purpose"] > 10 and found["steps"] > 50_000


def test_a_population_is_the_neuron_at_every_float_around_its_steps():
    node = {
        "name": "n",
        "op": "integer_spikes",
        "scale": [1.0] * 3,
        "most": [1, 4, 7],
        "signed": True,
        "squared": False,
    }
    steps = np.arange(-9, 9, dtype=np.float32) + np.float32(0.5)
    near = np.concatenate([steps, np.nextafter(steps, np.float32(-99)), np.nextafter(steps, np.float32(99))])
    currents = np.repeat(near[None, :, None], 3, axis=2)
    for changed in ({}, {"signed": False}, {"signed": False, "squared": True}):
        population = Population(node | changed)
        rows = np.concatenate([currents, np.ones_like(currents[..., :1])], axis=-1)
        fired = rows @ population.encoder().T > np.nextafter(np.float32(1), np.float32(0))
        _, integers = run_neurons(node | changed, currents)
        assert np.array_equal(population.integers(fired), integers)


def test_a_path_with_another_matrix_gives_other_spikes():
    node = {"name": "n", "op": "integer_spikes", "scale": [0.5] * 6, "most": [3] * 6, "signed": True, "squared": False}
    lif = {"name": "l", "op": "lif", "tau": 2.0, "v_threshold": 1.0, "v_reset": 0.0, "from_rest": False}
    generator = np.random.default_rng(0)
    weight, currents = generator.normal(size=(5, 6)), generator.normal(size=(4, 9, 6)).astype(np.float32)
    weight = weight.astype(np.float32)
    _, spikes = run_neurons(lif, run_neurons(node, currents)[1].astype(np.float32) @ weight.T)
    for simulator in simulators.installed():
        right = simulators.replay_path(simulator, node, path_graph(node, weight, lif), currents)
        wrong = simulators.replay_path(simulator, node, path_graph(node, weight[::-1], lif), currents)
        assert np.array_equal(right, spikes) and not np.array_equal(wrong, spikes)


def test_squares_that_are_no_byte_are_kept(tmp_path):
    model = spiking("M", spike_levels=15)
    for module in model.modules():
        if isinstance(module, IntegerSpikes):
            module.log_scale.data.sub_(3)
    bundle = Bundle(export_bundle(model, batch_of(), tmp_path / "bundle"))
    spikes = bundle.traces["blocks.0.ffn.spike_value"]["spikes"]
    assert spikes.dtype == np.int16 and spikes.max() == 225
    assert bundle.trace.spikes["blocks.0.ffn.spike_value"].dtype == np.int16
    assert bundle.traces[NAME]["spikes"].dtype == np.int8
    assert check_bundle(bundle.folder)["passed"]


def test_there_is_no_event_driven_form_of_what_reads_spikes_already(tmp_path, bundle):
    with pytest.raises(ValueError, match="every matrix of this model reads integer spikes already"):
        export_bundle(spiking("M"), batch_of(), tmp_path / "bundle", event_driven=True)
    with pytest.raises(ValueError, match="reads integer spikes already"):
        EventDriven(bundle.folder)


def test_an_encoder_is_what_its_file_says():
    node = {"name": "n", "op": "integer_spikes", "scale": [1.0] * 2, "most": [1, 2], "signed": True, "squared": False}
    graph = encoder_graph(node)
    assert graph.nodes["encoder"].weight.shape == (6, 3) and json.dumps(graph.metadata)
    assert [type(graph.nodes[name]).__name__ for name in graph.nodes] == ["Input", "Linear", "LIF", "Output"]
    assert np.all(graph.nodes["population"].tau == 1e-4)


def test_an_int8_bundle_ran_in_integers_too_and_one_that_did_not_is_found(tmp_path):
    folder = export_bundle(spiking("M", "binary"), batch_of(), tmp_path / "bundle", weights="int8")
    stated = Bundle(folder).manifest["checks"]["integers"]
    assert stated["different_spikes"] == stated["different_predictions"] == 0 and stated["steps"] > 1000
    assert stated["largest_logit_difference"] < 1e-9
    assert interpreter_main(folder, "--integers") == 0
    edit(folder / "manifest.json", lambda manifest: manifest["checks"].pop("integers"))
    assert "different_spikes of checks.integers must be 0, got None" in problems(folder)


def interpreter_main(folder, *options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["interpreter.py", str(folder), *options])
        return interpreter.main()


def test_a_graded_gate_keeps_a_bundle_from_integer_arithmetic(tmp_path, capsys):
    folder = export_bundle(spiking("M", "graded"), batch_of(), tmp_path / "bundle", weights="int8")
    assert "integers" not in Bundle(folder).manifest["checks"] and check_bundle(folder)["passed"]
    assert interpreter_main(folder, "--integers") == 2 and "reads real numbers" in capsys.readouterr().err
