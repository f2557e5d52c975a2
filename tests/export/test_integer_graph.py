"""The graph of models whose matrices read integer spikes, run by numpy alone, and in integer arithmetic."""

import json

import numpy as np
import pytest
import torch
from builders import ADAPTERS, DESIGNS, sentences, spiking
from helpers import fresh_classifier

from spikegpt_lora import SpikeLoraConfig, record_spikes
from spikegpt_lora.convert.fold import FoldedLinear, fold_scales
from spikegpt_lora.convert.weights import quantized_copy
from spikegpt_lora.export.graph import INTEGER_SCHEMA, SCHEMA, graph_of
from spikegpt_lora.export.interpreter import Program
from spikegpt_lora.export.verify import in_float64

SHIFTS = {"exp": {}, "shifts": {"wkv_powers_of_two": True}}


def agrees(model, program, least=0.02):
    """`program` gives the spikes and logits of `model`, float64."""
    ids, lengths, batch = (x if isinstance(x, dict) else x.numpy() for x in sentences())
    trace = record_spikes(model, batch)
    logits, seen = program.run(ids, lengths, trace.spikes)
    for name, spikes in trace.spikes.items():
        assert np.array_equal(seen[name], spikes), name
        assert (spikes != 0).mean() > least, name
    with torch.no_grad():
        assert np.abs(logits - model(**batch).logits.numpy()).max() < 1e-9


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("shifts", SHIFTS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_spike_and_every_logit_is_the_models_own(design, shifts, adapter, tmp_path):
    model = quantized_copy(spiking(design, adapter, **SHIFTS[shifts]))
    graph_of(model).save(tmp_path)
    agrees(in_float64(model), Program(tmp_path, np.float64), least=0)


@pytest.mark.parametrize("pooling", ["last", "mean", "last_mean"])
def test_the_score_is_pooled_after_its_product(pooling, tmp_path):
    model = quantized_copy(spiking("M", pooling=pooling))
    graph_of(model).save(tmp_path)
    agrees(in_float64(model), Program(tmp_path, np.float64))


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("adapter", ["none", "binary"])
def test_integer_arithmetic_gives_the_rounded_models_spikes_and_logits(design, adapter, tmp_path):
    model = quantized_copy(spiking(design, adapter, pooling="last_mean"), "int8")
    graph_of(model).save(tmp_path, int8=True)
    program = Program(tmp_path, np.float64, integers=True)
    matrices = {node["name"] for node in program.nodes if node["op"] == "linear"}
    assert matrices == program.integers.keys() and len(matrices) >= 7 * 3 + 1
    agrees(in_float64(model), program, least=0)


def test_integer_arithmetic_is_refused_where_a_matrix_reads_real_numbers(tmp_path):
    ids, lengths = (x.numpy() for x in sentences()[:2])
    graph_of(quantized_copy(spiking("M", "graded"), "int8")).save(tmp_path / "graded", int8=True)
    with pytest.raises(ValueError, match=r"lora_B.default reads real numbers"):
        Program(tmp_path / "graded", np.float64, integers=True).run(ids, lengths)
    graph_of(quantized_copy(spiking("M"))).save(tmp_path / "float")
    with pytest.raises(ValueError, match="blocks.0.att.key is no matrix of int8"):
        Program(tmp_path / "float", integers=True)


@pytest.mark.parametrize("design", DESIGNS)
def test_folding_changes_nothing_but_rounding_and_once(design):
    model, (_, _, batch) = spiking(design, "binary").double(), sentences()
    with torch.no_grad():
        before = model(**batch).logits
        folded = fold_scales(model)
        assert (folded(**batch).logits - before).abs().max() < 1e-9
        assert (
            sum(type(module) is FoldedLinear for module in folded.modules()) == 7 * 3 + 2
        )  # the score twice: before and under the adapter
        again = {name: p.clone() for name, p in folded.state_dict().items()}
        assert all(torch.equal(p, again[name]) for name, p in fold_scales(folded).state_dict().items())


def test_a_gain_of_0_is_refused_by_name():
    model = spiking("M")
    model.spikegpt.blocks[1].ln2.weight.data[3] = 0
    with pytest.raises(ValueError, match=r"a norm of spikegpt.blocks.1 has a gain of 0"):
        quantized_copy(model)


def test_a_float_models_graph_is_of_the_first_schema(tmp_path):
    for model, schema in ((fresh_classifier(), SCHEMA), (spiking("H"), INTEGER_SCHEMA)):
        graph_of(model).save(tmp_path)
        assert json.loads((tmp_path / "graph.json").read_text())["schema"] == schema


def test_rows_can_be_mixed_without_integer_spikes(tmp_path):
    model = fresh_classifier(token_shift="rows").float()
    graph_of(model).save(tmp_path)
    agrees(model.double(), Program(tmp_path, np.float64))


def test_spikelora_on_every_matrix_is_exported(tmp_path):
    assert isinstance(ADAPTERS["binary"], SpikeLoraConfig) and ADAPTERS["binary"].spikelora_gate == "binary"
    names = {node["name"] for node in graph_of(spiking("M", "binary")).nodes}
    assert {"blocks.1.att.output.lora_gate.default", "blocks.1.ffn.value.lora_A.default"} <= names


def test_exponents_are_whole_and_weights_of_wkv_are_shifts(tmp_path):
    graph = graph_of(spiking("M", wkv_powers_of_two=True))
    graph.save(tmp_path)
    decays, firsts = (graph.weights[f"blocks.1.att.{name}"] for name in ("decay", "first"))
    shifts = {2.0**-n for n in range(1, 16)}
    assert set(decays.tolist()) <= shifts | {1 - shift for shift in shifts}
    assert np.array_equal(firsts, np.round(firsts))


def test_wkv_of_shifts_survives_any_k_and_a_long_text(tmp_path):
    """No sum runs over or dies away, however far the weights of tokens lie apart."""
    program, C = Program.__new__(Program), 3
    program.dtype = np.dtype(np.float32)
    program.weights = {"d": np.array([2.0**-15, 0.5, 1 - 2.0**-15], np.float32), "u": np.zeros(C, np.float32)}
    node, state, generator = {"name": "wkv", "decay": "d", "first": "u"}, {}, np.random.default_rng(0)
    for t in range(3000):
        k = (
            generator.choice([-300.0, 0.0, 300.0], (2, C)).astype(np.float32)
            if t % 100
            else np.full((2, C), -300.0, "f")
        )
        v = generator.uniform(1, 2, (2, C)).astype(np.float32)
        y = program.wkv_powers_of_two(node, [k, v], state.get("wkv"), state)
        assert np.isfinite(y).all() and (y >= 0.99).all() and (y <= 2.01).all()
