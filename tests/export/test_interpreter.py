"""The exported graph, run by numpy alone: the model's own spikes and predictions, in both forms."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import ADAPTERS, model_with, sentences
from helpers import SIZES, current
from torch import nn

import spikegpt_lora.export.interpreter
from spikegpt_lora import record_spikes
from spikegpt_lora.export.event_driven import EventDriven
from spikegpt_lora.export.graph import graph_of
from spikegpt_lora.export.interpreter import NEURONS, OPERATIONS, Program
from spikegpt_lora.export.simulators import run_neurons
from spikegpt_lora.neurons.lif import LIF
from spikegpt_lora.ops.backend import default_backend


@pytest.mark.parametrize("kind", [Program, EventDriven])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("pooling", ["last", "last_mean"])
def test_every_spike_and_every_logit_is_the_models_own(kind, adapter, pooling, tmp_path):
    model, (ids, lengths, batch) = model_with(adapter, pooling=pooling), sentences()
    graph_of(model).save(tmp_path)
    trace = record_spikes(model, batch)
    logits, seen = kind(tmp_path, np.float64).run(ids.numpy(), lengths.numpy(), trace.spikes)
    for name, spikes in trace.spikes.items():
        assert np.array_equal(seen[name], spikes), name
    assert 0.02 < np.mean([spikes.mean() for spikes in trace.spikes.values()]) < 0.98
    assert np.abs(logits - model(**batch).logits.detach().numpy()).max() < 1e-9


def test_soft_reset_and_other_constants_are_carried(tmp_path):
    model = model_with("none", lif_v_reset=None, lif_tau=3.0, lif_v_threshold=0.7)
    ids, lengths, batch = sentences()
    graph_of(model).save(tmp_path)
    logits, _ = Program(tmp_path, np.float64).run(ids.numpy(), lengths.numpy())
    assert np.abs(logits - model(**batch).logits.detach().numpy()).max() < 1e-9


@pytest.mark.parametrize("settings", [{}, {"tau": 3.0, "v_threshold": 0.7}, {"v_reset": None}, {"v_reset": -0.2}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_population_alone_has_the_models_membranes_and_spikes_bit_for_bit(settings, dtype):
    neuron, x = LIF(**settings), current(3, 9, 4, dtype=dtype)
    node = {"op": "lif", "tau": 2.0, "v_threshold": 1.0, "v_reset": 0.0, "from_rest": False} | settings
    h, spikes = run_neurons(node, x.numpy())
    with default_backend("reference"):
        wanted, membrane = neuron.step(x)
    assert h.dtype == x.numpy().dtype and np.array_equal(spikes, wanted.numpy()) and 0 < spikes.mean() < 1
    reset = h[:, -1] - spikes[:, -1] if node["v_reset"] is None else node["v_reset"]
    assert np.array_equal(np.where(spikes[:, -1], reset, h[:, -1]).astype(h.dtype), membrane.numpy())
    each, _ = run_neurons(node | {"from_rest": True}, x.numpy())
    alone = [run_neurons(node, x.numpy()[:, t : t + 1])[0] for t in range(9)]
    assert np.array_equal(each, np.concatenate(alone, axis=1))


def test_every_operation_has_its_equation():
    assert all(getattr(Program, name).__doc__ for name in OPERATIONS)
    assert all(function.__doc__ for function in NEURONS.values())


def test_a_sentence_alone_is_what_it_is_in_a_batch(tmp_path):
    graph_of(model_with("graded")).save(tmp_path)
    ids, lengths, _ = sentences()
    program = Program(tmp_path, np.float64)
    together, _ = program.run(ids.numpy(), lengths.numpy())
    for row, length in enumerate(lengths.tolist()):
        alone, _ = program.run(ids[row : row + 1, :length].numpy(), np.array([length]))
        assert np.abs(alone[0] - together[row]).max() < 1e-12


def test_additions_are_counted_where_they_are_made(tmp_path):
    """Embedding spikes and earlier LIF spikes, each one column of every layer that reads the norm, now and then."""
    model, (ids, lengths, batch) = model_with("none"), sentences()
    graph_of(model).save(tmp_path)
    program = EventDriven(tmp_path, np.float64)
    program.run(ids.numpy(), lengths.numpy())
    spikes = {name: int(values.sum()) for name, values in record_spikes(model, batch).spikes.items()}
    C, expected, so_far = SIZES["n_embd"], 0, spikes["emb"]
    for i in range(SIZES["n_layer"]):
        expected += so_far * 2 * 3 * C  # key, value and receptance of SRWKV
        so_far += spikes[f"blocks.{i}.lif1"]
        expected += so_far * 2 * (4 * C + C)  # key and receptance of SRFFN
        so_far += spikes[f"blocks.{i}.lif2"]
    assert sum(program.additions.values()) == expected and sum(program.products.values()) > 0
    tokens, rows = int(lengths.sum()), 2 * (3 * C + 5 * C) * SIZES["n_layer"]
    assert program.rescaling["products"] == 4 * rows * tokens  # two a row for ln0 and two for the norm itself


ALONE = """
import sys
for name in ("torch", "spikegpt_lora", "transformers", "spikingjelly"):
    sys.modules[name] = None  # importing any of them now raises
sys.path.insert(0, {folder!r})
from interpreter import Program
import numpy as np
logits, _ = Program({bundle!r}, np.float64).run(np.array({ids}), np.array({lengths}))
print(logits.tolist())
"""


def test_it_runs_as_a_single_file_with_numpy_alone(tmp_path):
    model, (ids, lengths, batch) = model_with("graded"), sentences()
    graph_of(model).save(tmp_path / "bundle")
    source = Path(spikegpt_lora.export.interpreter.__file__)
    (tmp_path / "interpreter.py").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    code = ALONE.format(
        folder=str(tmp_path), bundle=str(tmp_path / "bundle"), ids=ids.tolist(), lengths=lengths.tolist()
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.abs(np.array(json.loads(done.stdout)) - model(**batch).logits.detach().numpy()).max() < 1e-9


@pytest.mark.parametrize("kind", ["weights", "operation"])
def test_the_interpreter_refuses_by_name_what_it_cannot_run(kind, tmp_path, monkeypatch, capsys):
    graph = graph_of(model_with("none"))
    if kind == "weights":  # which spikes would hide: NaN >= threshold is False
        graph.weights["blocks.1.att.key"][0, 0] = np.nan
    else:
        graph.nodes[3]["op"] = "__class__"
    graph.save(tmp_path)
    words = {
        "weights": "weights.npz holds values that are not finite in blocks.1.att.key",
        "operation": "graph.json has an unknown operation, '__class__' of ",
    }
    with pytest.raises(ValueError, match=words[kind]):
        Program(tmp_path)
    monkeypatch.setattr(sys, "argv", ["interpreter.py", str(tmp_path)])
    assert spikegpt_lora.export.interpreter.main() == 2
    assert words[kind] in capsys.readouterr().err


def test_models_and_values_that_cannot_be_exported_are_refused_by_name():
    with pytest.raises(ValueError, match="Linear holds no SpikeGPTForSequenceClassification to export"):
        graph_of(nn.Linear(2, 2))
    model = model_with("none")
    model.spikegpt.blocks[1].att.key.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="blocks.1.att.key.weight holds values that are not finite"):
        graph_of(model)
    with pytest.raises(ValueError, match="blocks.0.lif1 must divide its input by tau"):
        graph_of(model_with("none", lif_decay_input=False))
    model = model_with("none")
    model.spikegpt.blocks[0].ffn.key = nn.Linear(12, 48)
    with pytest.raises(ValueError, match="blocks.0.ffn.key must be a torch.nn.Linear without bias"):
        graph_of(model)
