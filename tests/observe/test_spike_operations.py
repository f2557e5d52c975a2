"""What integer spikes cost: reads and additions counted from the inputs of every matrix, energy by its equation."""

import json

import pytest
import torch
from helpers import fresh_classifier, padded_batch
from torch import nn

from spikegpt_lora.observe.books import as_json, spikes_json, totals
from spikegpt_lora.observe.energy import ENERGY, PLACES, real_valued, with_reads
from spikegpt_lora.observe.operations import count_operations

DESIGNS = {"M": {"token_shift": "rows"}, "H": {"token_shift": "channels"}}


def spiking(design, **config):
    return fresh_classifier(matrix_spikes="integer", spike_levels=7, pad_token_id=0, **DESIGNS[design], **config)


def batch(left=False):
    return padded_batch([9, 2, 5, 7, 3, 4], left, seed=6)


def count(x, outputs=5):
    return count_operations(nn.Linear(x.shape[-1], outputs, bias=False), [{"input": x}]).layers[""]


def test_reads_planes_and_units_are_those_of_the_numbers():
    layer = count(torch.tensor([[0.0, -3.0, 6.0], [1.0, 0.0, -7.0]]))
    assert layer.spikes == "integer" and layer.largest_spike == 7
    assert layer.weight_reads == 4 * 5 / 2
    assert layer.plane_additions == (2 + 2 + 1 + 3) * 5 / 2
    assert layer.unary_additions == (3 + 6 + 1 + 7) * 5 / 2


@pytest.mark.parametrize("value", [0.5, 1e-9, torch.inf])
def test_one_real_number_makes_a_layer_real(value):
    x = torch.ones(2, 2, 3)
    assert count(x).spikes == "integer"
    x[1, 1, 2] = value
    layer = count(x)
    assert layer.spikes == "real" and layer.largest_spike is layer.plane_additions is layer.unary_additions is None
    assert layer.weight_reads == 3 * 5


@pytest.mark.parametrize("design", DESIGNS)
def test_every_matrix_of_an_integer_model_reads_integers(design):
    seen = count_operations(spiking(design), [batch()])
    assert len(seen.layers) == 7 * 3 + 1 and {one.spikes for one in seen.layers.values()} == {"integer"}
    assert all(0 < one.weight_reads <= one.dense_macs for one in seen.layers.values())
    assert all(one.weight_reads <= one.plane_additions <= one.unary_additions for one in seen.layers.values())
    assert seen.layers["blocks.1.ffn.value"].largest_spike in [k * k for k in range(8)]


@pytest.mark.parametrize("left", [False, True])
def test_padding_adds_nothing(left):
    model, given = spiking("M"), batch(left)
    alone = [{"input_ids": ids[None, m.bool()]} for ids, m in zip(given["input_ids"], given["attention_mask"])]
    assert count_operations(model, [given]) == count_operations(model, alone)


def test_a_float_models_numbers_are_what_they_were_and_its_blocks_have_no_additions():
    seen = count_operations(fresh_classifier(pad_token_id=0), [batch()])
    assert "spikes" not in as_json(seen) and "largest_spike" not in as_json(seen)["layers"]["score"]
    blocks = totals(seen, blocks=True)
    assert (
        blocks["plane_additions"] is blocks["unary_additions_share"] is None and 0 < blocks["weight_reads_share"] <= 1
    )
    assert "spiking" not in blocks["energy"]["dram"]["1"]


def test_energy_is_its_equation_and_break_even_is_where_both_are_equal():
    dense, reads, additions = 1000.0, 400.0, 600.0
    found = with_reads(dense, reads, additions)
    for place, pj in PLACES.items():
        for tokens in (1, 8):
            one = found[place][str(tokens)]
            assert one["dense_int8"] == pytest.approx(dense * (pj / 4 / tokens + 0.23))
            assert one["spiking"] == pytest.approx(reads * pj / 4 + additions * 0.1)
            at = with_reads(dense, one["break_even"] * dense, one["break_even"] * dense * additions / reads)
            assert at[place][str(tokens)]["spiking"] == pytest.approx(one["dense_int8"])
    assert found["dram"]["1"]["skipping_int8"] == pytest.approx(reads * (160 + 0.23))
    assert found["dram"]["8"]["skipping_int8"] == pytest.approx(dense / 8 * 160 + reads * 0.23)
    assert {"8": found["sram_8_kib"]["8"]["break_even"]} == {"8": pytest.approx((1.25 / 8 + 0.23) / (1.25 + 0.15))}


def test_totals_are_the_sum_of_the_layers_and_json_holds_plain_numbers():
    seen = count_operations(spiking("H"), [batch()])
    found = spikes_json(seen)
    for kind in ("weight_reads", "plane_additions", "unary_additions"):
        every = {name: getattr(one, kind) for name, one in seen.layers.items()}
        assert found["all"][kind] == pytest.approx(sum(every.values()))
        assert found["blocks"][kind] == pytest.approx(sum(every.values()) - every["score"])
    content = as_json(seen)
    assert content["spikes"] == found and json.loads(json.dumps(content, allow_nan=False)) == content


def test_what_stays_real_is_counted_from_sizes_and_needs_no_exp_with_powers_of_two():
    model = spiking("M")
    parts = real_valued(model.config)
    L, C = model.config.n_layer, model.config.n_embd
    assert parts["lif"]["multiplications"] == 2 * L * C and set(parts) == set(
        count_operations(model, [batch()]).real_valued
    )
    assert parts["token_shift"]["additions"] == L * (3 * C + 4 * C + C)
    assert parts["norms"]["multiplications"] == L * (2 * C + 2 * 8 * C)
    shifted = real_valued(spiking("M", wkv_powers_of_two=True).config)["wkv"]
    assert shifted["multiplications"] == 5 * L * C < parts["wkv"]["multiplications"] == 31 * L * C
    assert real_valued(spiking("H").config)["norms"]["multiplications"] == L * 6 * C
    assert ENERGY["int32_add"] == 0.1
