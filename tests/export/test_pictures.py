"""Pictures of a bundle: what is drawn is what the bundle holds, with its words and units beside it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from builders import model_with
from helpers import SIZES, padded_batch
from matplotlib.image import imread

from spikegpt_lora.export import pictures
from spikegpt_lora.export.write import Bundle, export_bundle

LENGTHS = [12, 1, 8, 5, 7, 8, 9]  # five sentences reach position 7, four position 8, two position 9


def bundle_of(adapter, folder, **options):
    return Bundle(export_bundle(model_with(adapter).float(), padded_batch(LENGTHS, seed=5), folder, **options))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return bundle_of("graded", tmp_path_factory.mktemp("adapted") / "bundle", event_driven=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return bundle_of("none", tmp_path_factory.mktemp("plain") / "bundle")


def texts(labels):
    return [label.get_text() for label in labels]


@pytest.mark.parametrize("kind", ["adapted", "plain"])
def test_every_picture_is_a_png_with_something_on_it(kind, request, tmp_path):
    paths = pictures.draw_all(request.getfixturevalue(kind), tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["raster.png", "firing.png", "sparsity.png", "cost.png"]
    for path in paths:
        image = imread(path)  # fails on what is no PNG
        colours = np.unique((255 * image[..., :3]).astype(int) @ [1, 256, 256**2])
        assert min(image.shape[:2]) > 400 and len(colours) > 10, path.name


def test_a_rasters_time_axis_has_the_sentences_own_words(adapted, figures, tmp_path):
    pictures.draw_raster(adapted, tmp_path / "raster.png", sentence=3)
    words = adapted.sentences["words"][3, :5]
    assert (words[1:] != words[:-1]).all()  # so that none is taken for a part of the word before
    assert texts(figures[0].axes[-1].get_xticklabels()) == list(words)


def test_a_sentences_panels_hold_its_spikes_and_no_others(adapted):
    trace = pictures.sentence_trace(adapted, 2)
    spikes = {name: seen["spikes"][2] for name, seen in adapted.traces.items()}
    assert np.array_equal(trace.spikes["block 1 lif2"][0], spikes["blocks.1.lif2"])
    assert sum(panel.sum() for panel in trace.spikes.values()) == sum(panel.sum() for panel in spikes.values()) > 0
    assert trace.lengths.tolist() == [8]


def test_a_blocks_gates_are_stacked_in_the_order_that_the_panel_names(adapted):
    spikes = pictures.sentence_trace(adapted, 0).spikes
    (title,) = [title for title in spikes if title.startswith("block 1 gates")]
    assert title == "block 1 gates, from below: att.key, value, receptance, ffn.key, receptance, value"
    order = ("att.key", "att.value", "att.receptance", "ffn.key", "ffn.receptance", "ffn.value")
    for i, module in enumerate(order):
        gate = adapted.traces[f"blocks.1.{module}.lora_gate.default"]["spikes"][0]
        assert np.array_equal(spikes[title][0, :, 4 * i : 4 * i + 4], gate), module


def test_a_sentence_that_is_not_there_is_refused(adapted, tmp_path):
    with pytest.raises(IndexError):
        pictures.draw_all(adapted, tmp_path, sentence=len(LENGTHS))


def test_populations_follow_the_depth_and_not_the_alphabet():
    names = ["emb", "blocks.2.att.key.lora_gate.default", "blocks.2.lif1", "blocks.10.lif1"]
    bundle = SimpleNamespace(manifest={"populations": [{"name": name} for name in names]})
    assert pictures.populations(bundle) == (["emb", "blocks.2.lif1", "blocks.10.lif1"], names[1:2])


def test_an_adapter_of_another_name_is_named():
    assert pictures.readable("blocks.3.att.key.lora_gate.default") == "block 3 att.key"
    assert pictures.readable("blocks.3.att.key.lora_gate.films") == "block 3 att.key (films)"


def test_rates_are_of_real_tokens_and_add_up_to_the_manifests(adapted):
    rates = pictures.firing_rates(adapted)
    for population in adapted.manifest["populations"]:
        of_sentences = rates[population["name"]]
        assert np.average(of_sentences, weights=LENGTHS) == pytest.approx(population["firing_rate"])
        alone = adapted.traces[population["name"]]["spikes"][3, :5]
        assert of_sentences[3] == pytest.approx(alone.mean())


def test_the_line_by_depth_is_the_rates_and_the_axis_says_the_unit(adapted, figures, tmp_path):
    pictures.draw_firing_by_depth(adapted, tmp_path / "firing.png")
    layers, gates = figures[0].axes
    rate = {population["name"]: population["firing_rate"] for population in adapted.manifest["populations"]}
    depth = ["emb", *(f"blocks.{i}.lif{k}" for i in range(SIZES["n_layer"]) for k in (1, 2))]
    assert layers.lines[0].get_ydata() == pytest.approx([rate[name] for name in depth])
    assert texts(layers.get_xticklabels()) == [name.replace("blocks.", "block ").replace(".", " ") for name in depth]
    assert layers.get_ylabel() == "firing rate, spikes / (neuron · token)"
    key = [rate[f"blocks.{i}.att.key.lora_gate.default"] for i in range(SIZES["n_layer"])]
    (line,) = [line for line in gates.lines if line.get_label() == "att.key"]
    assert line.get_ydata() == pytest.approx(key)


def test_silence_at_a_position_is_counted_over_the_sentences_that_reach_it(adapted):
    shares = pictures.silent_share(adapted)
    for name, seen in adapted.traces.items():
        at = [np.concatenate([~seen["spikes"][i, t] for i in range(7) if LENGTHS[i] > t]) for t in range(7)]
        assert shares[name] == pytest.approx([silent.mean() for silent in at]), name


def test_with_few_sentences_the_positions_that_all_reach_are_left(adapted):
    assert len(pictures.silent_share(adapted, fewest=3)["emb"]) == 8
    assert len(pictures.silent_share(adapted, fewest=99)["emb"]) == 1


def test_the_sparsity_map_has_a_row_a_population_and_a_bar_with_its_unit(adapted, figures, tmp_path):
    pictures.draw_sparsity_map(adapted, tmp_path / "sparsity.png")
    layers, gates, bar = figures[0].axes
    shares = pictures.silent_share(adapted)
    assert layers.images[0].get_array().data[1] == pytest.approx(100 * shares["blocks.0.lif1"])
    assert texts(layers.get_yticklabels())[1] == "block 0 lif1"
    assert texts(gates.get_yticklabels())[0] == "block 0 att.key" and len(gates.get_yticklabels()) == 6 * 3
    assert bar.get_ylabel() == "silent neurons, %"
    assert gates.get_xlabel() == "position in the sentence, tokens (5 of 7 sentences reach the last)"


def test_layers_are_summed_by_group_in_the_order_of_the_model():
    layers = {
        "blocks.10.att.key": {"a": 1.0},
        "blocks.2.ffn.key": {"a": 2.0},
        "blocks.2.att.value": {"a": 4.0, "b": 0.5},
        "blocks.2.att.key": {"a": 8.0},
        "blocks.2.att.key.lora_B.default": {"a": 16.0},
        "blocks.2.ffn.key.lora_A.default": {"a": 32.0},
        "score": {"a": 64.0},
    }
    groups = pictures.operations_by_group(layers, ("a", "b"))
    assert {group: values.tolist() for group, values in groups.items()} == {
        "block 2 att W0": [12.0, 0.5],
        "block 2 ffn W0": [2.0, 0.0],
        "block 2 adapters A": [32.0, 0.0],
        "block 2 adapters B": [16.0, 0.0],
        "block 10 att W0": [1.0, 0.0],
        "score": [64.0, 0.0],
    }
    assert list(groups) == [
        "block 2 att W0", "block 2 ffn W0", "block 2 adapters A", "block 2 adapters B", "block 10 att W0", "score",
    ]  # fmt: skip


def test_both_forms_have_a_panel_of_their_own_on_one_scale(adapted, figures, tmp_path):
    pictures.draw_cost(adapted, tmp_path / "cost.png")
    executed, events = figures[0].axes
    legends = [
        (axis.get_legend().get_title().get_text(), texts(axis.get_legend().get_texts())) for axis in (executed, events)
    ]
    assert [title for title, _ in legends] == ["as executed", "event-driven form"]
    kinds = [[text.partition(":")[0] for text in labels] for _, labels in legends]
    assert kinds == [["dense MACs", "effective MACs", "effective ACs"], ["additions", "products"]]
    assert executed.get_xlim() == events.get_xlim() and executed.get_xlabel() == "operations / token"


def test_bars_are_as_long_as_the_counts(adapted, figures, tmp_path):
    pictures.draw_cost(adapted, tmp_path / "cost.png")
    cost = json.loads((adapted.folder / "cost.json").read_text(encoding="utf-8"))
    totals = [cost["as_executed"][key] for key in ("dense_macs", "effective_macs", "effective_acs")]
    totals += [cost["event_driven"][key] for key in ("additions", "products")]
    bars = [container for axis in figures[0].axes for container in axis.containers]
    assert [sum(bar.get_width() for bar in container) for container in bars] == pytest.approx(totals)


def test_without_the_event_driven_form_there_is_one_panel(plain, figures, tmp_path):
    pictures.draw_cost(plain, tmp_path / "cost.png")
    (axis,) = figures[0].axes
    assert texts(axis.get_yticklabels())[:3] == ["block 0 att W0", "block 0 ffn W0", "block 1 att W0"]


@pytest.mark.parametrize(
    "value, text", [(0, "0"), (17.44, "17.4"), (999.7, "1 k"), (460_800, "461 k"), (3_702_818.9, "3.7 M")]
)
def test_numbers_are_rounded_to_three_digits(value, text):
    assert pictures._rounded(value) == text
