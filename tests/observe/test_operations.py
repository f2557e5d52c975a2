"""Operations as they are executed: NeuroBench's numbers, and only real tokens."""

import json
from itertools import chain

import pytest
import torch
from helpers import SIZES, adapted, fresh_classifier, padded_batch
from torch import nn

from spikegpt_lora import SpikeLoraConfig
from spikegpt_lora.neurons.lif import LIF
from spikegpt_lora.observe.books import as_json
from spikegpt_lora.observe.energy import ENERGY, arithmetic_energy
from spikegpt_lora.observe.operations import count_operations

# What `neurobench_of(network(), inputs(kind))` returned with NeuroBench 2.3.0. Its operations are per sample: 5 steps.
NEUROBENCH = {
    "real": {
        "Footprint": 544,
        "ConnectionSparsity": 0.08,
        "ActivationSparsity": 0.8,
        "SynapticOperations": {"Effective_MACs": 250.5, "Effective_ACs": 51.25, "Dense": 625.0},
    },
    "binary": {
        "Footprint": 544,
        "ConnectionSparsity": 0.08,
        "ActivationSparsity": 0.88125,
        "SynapticOperations": {"Effective_MACs": 32.75, "Effective_ACs": 129.0, "Dense": 625.0},
    },
}


def grid(rows, columns):
    """A matrix of multiples of 1/8, zero at every eleventh place: the same on every machine, and sums are exact."""
    i, j = torch.arange(rows)[:, None], torch.arange(columns)
    return ((i * 7 + j * 3) % 11 - 5) / 8


def network():
    net = nn.Sequential(nn.Linear(6, 8), LIF(), nn.Linear(8, 7, bias=False), nn.ReLU(), nn.Linear(7, 3))
    with torch.no_grad():
        for linear in (net[0], net[2], net[4]):
            linear.weight.copy_(grid(*linear.weight.shape))
        net[0].bias.fill_(0.75)
        net[4].bias.fill_(0.5)
    return net


def inputs(kind, samples=4, steps=5):
    """`(samples, steps, 6)`: multiples of 1/2, some of them 0; or 0 and 1."""
    real = (grid(samples * steps, 6) * 4).view(samples, steps, 6)
    return real if kind == "real" else (real > 0).float()


def neurobench_of(net, x):
    from neurobench.benchmarks import Benchmark
    from neurobench.metrics import static, workload
    from neurobench.models import TorchModel

    model = TorchModel(net)
    model.activation_modules = [LIF]  # its own list, ReLU and sigmoid, would be counted too
    data = torch.utils.data.DataLoader([(row, 0) for row in x], batch_size=len(x))
    metrics = [static.Footprint, static.ConnectionSparsity], [workload.ActivationSparsity, workload.SynapticOperations]
    return Benchmark(model, data, [], [], metrics).run(quiet=True)


def as_neurobench(seen):
    """Our counts in NeuroBench's words and per sample."""
    sums = {"Effective_MACs": seen.effective_macs, "Effective_ACs": seen.effective_acs, "Dense": seen.dense_macs}
    return {
        "Footprint": seen.footprint,
        "ConnectionSparsity": round(seen.connection_sparsity, 4),
        "ActivationSparsity": seen.activation_sparsity,
        "SynapticOperations": {key: value * seen.tokens / seen.sentences for key, value in sums.items()},
    }


@pytest.mark.parametrize("kind", NEUROBENCH)
def test_counts_are_those_that_neurobench_gave(kind):
    x = inputs(kind)
    assert as_neurobench(count_operations(network(), [{"input": x}])) == NEUROBENCH[kind]
    halves = count_operations(network(), [{"input": x[:2]}, {"input": x[2:]}])
    assert as_neurobench(halves) == NEUROBENCH[kind]


@pytest.mark.parametrize("kind", NEUROBENCH)
def test_counts_are_those_that_neurobench_gives(kind):
    pytest.importorskip("neurobench")
    assert neurobench_of(network(), inputs(kind)) == NEUROBENCH[kind]


def classifier(**config):
    return adapted(fresh_classifier(pad_token_id=0), SpikeLoraConfig(task_type="SEQ_CLS", r=4, **config))


def batch(left=False):
    return padded_batch([9, 2, 5, 7, 3, 4], left, seed=6)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("gate", ["graded", "binary"])
def test_padding_does_not_count(gate, left):
    model, given = classifier(spikelora_gate=gate), batch(left)
    alone = [{"input_ids": ids[None, m.bool()]} for ids, m in zip(given["input_ids"], given["attention_mask"])]
    together = count_operations(model, [given | {"labels": torch.zeros(6)}])
    assert together == count_operations(model, alone)
    assert (together.tokens, together.sentences) == (30, 6)
    assert 0 < together.activation_sparsity < 1


class Reading(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, inputs_embeds, attention_mask=None):
        return self.linear(inputs_embeds)


def test_padding_does_not_make_a_binary_input_real():
    given = {"inputs_embeds": torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])}
    assert not count_operations(Reading(), [given]).layers["linear"].binary_input
    layer = count_operations(Reading(), [given | {"attention_mask": torch.tensor([[1, 0]])}]).layers["linear"]
    assert layer.binary_input and (layer.effective_acs, layer.effective_macs, layer.input_density) == (3, 0, 0.5)


@pytest.mark.parametrize("gate", ["graded", "binary"])
def test_only_what_a_binary_gate_feeds_accumulates(gate):
    layers = count_operations(classifier(spikelora_gate=gate, target_modules="all-linear"), [batch()]).layers
    fed = {name: layer for name, layer in layers.items() if "lora_B" in name}
    for name, layer in layers.items():
        accumulates = gate == "binary" and name in fed
        assert layer.binary_input == accumulates and (layer.effective_acs > 0) == accumulates
        assert layer.effective_acs + layer.effective_macs <= layer.dense_macs
    assert len(fed) == 7 * SIZES["n_layer"] and all(0 < layer.input_density < 1 for layer in fed.values())


def test_names_are_paths_in_the_base_model():
    seen = count_operations(classifier(target_modules=["key"]), [batch()])
    assert {name for name in seen.layers if "blocks.0.att.key" in name} == {
        "blocks.0.att.key",
        "blocks.0.att.key.lora_A.default",
        "blocks.0.att.key.lora_B.default",
    }
    assert "score" in seen.layers and not seen.left_out
    assert {name for name in seen.populations if "blocks.0.att" in name} == {"blocks.0.att.key.lora_gate.default"}
    assert {"blocks.2.lif1", "blocks.2.lif2"} < seen.populations.keys()


def test_a_classifier_counts_once_a_sentence():
    seen = count_operations(classifier(), [batch()])
    assert seen.layers["score"].dense_macs * seen.tokens == pytest.approx(seen.sentences * SIZES["n_embd"] * 2)
    assert seen.layers["blocks.0.ffn.key"].dense_macs == SIZES["n_embd"] * 4 * SIZES["n_embd"]


def test_an_exception_leaves_nothing_behind():
    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    model = classifier().train()
    model.get_submodule("base_model.model.spikegpt.blocks.1").eval()
    before, modes = hooks(), [m.training for m in model.modules()]
    with pytest.raises(ValueError, match="input_ids must be in"):
        count_operations(model, [batch(), {"input_ids": torch.tensor([[SIZES["vocab_size"]]])}])
    assert hooks() == before and [m.training for m in model.modules()] == modes


def test_footprint_is_the_bytes_of_all_tensors():
    net = network()
    net.register_buffer("steps", torch.zeros(3, dtype=torch.int16))
    tensors = chain(net.parameters(), net.buffers())
    assert count_operations(net, [{"input": inputs("real")}]).footprint == sum(len(bytes_of(t)) for t in tensors)


def bytes_of(tensor):
    return tensor.detach().numpy().tobytes()


def test_matrices_that_are_not_counted_are_named():
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Linear(4, 2))
    assert count_operations(model, [{"input": torch.ones(1, 1, 6)}]).left_out == ["0"]


def test_without_a_real_token_it_says_so():
    with pytest.raises(ValueError, match="at least one batch with a real token"):
        count_operations(network(), [])


def test_energy_is_counts_times_constants():
    assert arithmetic_energy(10, 100) == pytest.approx({"fp32": 10 * 4.6 + 100 * 0.9, "int8": 10 * 0.23 + 100 * 0.03})
    for kind in ("fp32", "int8"):
        assert ENERGY[f"{kind}_mac"] == pytest.approx(ENERGY[f"{kind}_multiply"] + ENERGY[f"{kind}_add"])


def test_json_holds_plain_numbers_in_order():
    seen = count_operations(classifier(), [batch()])
    seen.layers["blocks.10.att.key"] = seen.layers["blocks.0.att.key"]
    content = as_json(seen)
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    keys = [name for name in content["layers"] if name.endswith("att.key")]
    assert keys == [f"blocks.{i}.att.key" for i in (0, 1, 2, 10)]
    assert content["arithmetic_energy"]["dense_int8"] == pytest.approx(content["dense_macs"] * 0.23)
