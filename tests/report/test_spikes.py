"""A sentence's raster shows every spike, each population's dead neurons and whose band it is; firing is by block."""

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from spikegpt_lora import SpikeTrace
from spikegpt_lora.report.spikes import DEAD, OPPOSITE, SPIKE, draw_sentence, firing_by_block, shown_sentences

GATE = "blocks.0.att.key.lora_gate.default"


def trace_of(spikes, lengths=None, labels=None):
    spikes = {name: np.array(one, dtype=np.int8) for name, one in spikes.items()}
    B, T = next(iter(spikes.values())).shape[:2]
    words = np.array([[f"w{t}" for t in range(T)]] * B)
    return SpikeTrace(spikes, {}, np.array(lengths or [T] * B), words, words, np.array(labels or [0] * B))


def drawn(trace, sentence, others):
    axis = Figure().subplots()
    draw_sentence(trace, sentence, others, axis)
    return axis, [np.asarray(image.get_array()) for image in axis.images]


def test_neurons_stand_in_the_order_of_how_often_they_fire_with_the_dead_ones_in_red_at_the_foot():
    sentence, other = [[0, 0, 1], [0, 0, 0]], [[0, 1, 1], [0, 0, 1]]
    trace = trace_of({"emb": [sentence, other]})
    axis, (image,) = drawn(trace, 0, trace)
    assert (image[0, 0] == to_rgba(SPIKE)).all() and image[0, 1, 3] == 0  # the third, which fires most
    assert (image[1, :, 3] == 0).all()  # silent here, not dead
    assert (image[2] == to_rgba(DEAD)).all()
    assert [label.get_text() for label in axis.get_yticklabels()] == ["emb, 1 dead"]


def test_a_stronger_spike_is_darker_and_a_negative_one_of_another_colour():
    trace = trace_of({"blocks.0.att.spike_output": [[[-4], [2], [0]]]})
    _, (image,) = drawn(trace, 0, trace)
    assert image[0, 0] == pytest.approx(to_rgba(OPPOSITE))
    assert image[0, 1, :3] == pytest.approx(to_rgba(SPIKE)[:3]) and image[0, 1, 3] == pytest.approx(0.7)
    assert image[0, 2, 3] == 0


def test_a_sentence_of_ones_own_is_ordered_by_others_and_what_fires_in_it_is_not_dead():
    own, others = trace_of({"emb": [[[0, 1]]]}), trace_of({"emb": [[[1, 0]], [[1, 0]]]})
    _, (image,) = drawn(own, 0, others)
    assert image[0, 0, 3] == 0 and (image[1, 0] == to_rgba(SPIKE)).all()


def test_bands_are_named_by_module_blocks_have_borders_and_tokens_their_words():
    ones = [[[1]] * 3]
    trace = trace_of({"emb": ones, GATE: ones, "blocks.0.lif1": ones, "blocks.1.lif1": ones}, [2])
    axis, images = drawn(trace, 0, trace)
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == ["emb", "block 0 att.key gate", "lif1", "block 1 lif1"]
    assert [image.shape[:2] for image in images] == [(1, 2)] * 4
    widths = [line.get_linewidth() for line in axis.lines]
    assert widths[1] == widths[3] > widths[2] == widths[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["w0", "w1"] * 2  # below and above


def test_one_short_sentence_of_each_class_is_shown():
    trace = trace_of({"emb": np.zeros((5, 9, 1))}, [9, 8, 3, 4, 7], [1, 0, 1, 1, 0])
    assert shown_sentences(trace, longest=4) == [4, 2]  # of class 0 all are long: the shortest


def test_firing_is_the_share_of_neurons_and_real_tokens_by_block_and_kind():
    spikes = {
        "emb": [[[1], [0]]],
        GATE: [[[1, 0], [0, 0]]],
        "blocks.0.lif1": [[[1], [0]]],
        "blocks.1.lif1": [[[1], [1]]],
        "blocks.1.ffn.spike_value": [[[-2, 0], [0, 0]]],
    }
    assert firing_by_block(trace_of(spikes)) == {
        "after SRWKV": [0.5, 1.0],
        "read by SRFFN's matrices": [0.25],
        "adapters' gates": [0.25],
    }
    padded = {"blocks.0.lif2": [[[1], [0]]]}
    assert firing_by_block(trace_of(padded, [1])) == {"after SRFFN": [1.0]}
