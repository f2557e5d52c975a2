"""Bit planes: the same logits from products with -1, 0 and 1 alone."""

import pytest
import torch
from helpers import SIZES, adapted, fresh_classifier, lively, padded_batch
from torch import nn

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM, SpikeLoraConfig
from spikegpt_lora.convert.planes import PlanesLinear, as_planes
from spikegpt_lora.observe.operations import count_operations
from spikegpt_lora.ops.spike_linear import SpikeLinear

DESIGNS = {"M": {"token_shift": "rows"}, "H": {"token_shift": "channels"}}


def spiking(design):
    return fresh_classifier(matrix_spikes="integer", spike_levels=7, pooling="last_mean", **DESIGNS[design])


def spikelora(model, gate):
    config = SpikeLoraConfig(task_type="SEQ_CLS", r=4, spikelora_gate=gate, target_modules="all-linear")
    return adapted(model, config, "lora_")


def batch():
    return padded_batch([9, 2, 5], seed=6)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("gate", [None, "binary", "graded"])
@torch.no_grad()
def test_logits_are_the_models_and_every_input_is_minus_one_zero_or_one(design, gate):
    model = spiking(design) if gate is None else spikelora(spiking(design), gate)
    planes, real = as_planes(model)
    seen = {}
    for name, module in planes.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, args, name=name: seen.setdefault(name, []).append(args[0]))
    assert (planes(**batch()).logits - model(**batch()).logits).abs().max() < 1e-12
    others = [name for name in seen if not all(set(x.unique().tolist()) <= {-1, 0, 1} for x in seen[name])]
    assert sorted(others) == sorted(real) and bool(real) == (gate == "graded")
    assert max(map(len, seen.values())) > 2 and len(seen) >= 7 * 3 + 1


@pytest.mark.parametrize("design", DESIGNS)
@torch.no_grad()
def test_a_language_model_streams_its_planes(design):
    config = SpikeGPTConfig(**SIZES, matrix_spikes="integer", spike_levels=3, **DESIGNS[design])
    model = lively(SpikeGPTForCausalLM(config))
    (planes, real), ids = as_planes(model), batch()["input_ids"]
    assert not real and isinstance(planes.head, PlanesLinear)
    whole, state, logits = model(ids).logits, None, []
    for t in range(ids.shape[1]):
        output = planes(ids[:, t : t + 1], state=state, use_cache=True)
        state, logits = output.state, [*logits, output.logits]
    assert (torch.cat(logits, dim=1) - whole).abs().max() < 1e-11


@pytest.mark.parametrize("design", DESIGNS)
def test_all_operations_are_accumulations(design):
    model = spiking(design)
    assert count_operations(model, [batch()]).effective_macs > 0
    counted = count_operations(as_planes(model)[0], [batch()])
    assert counted.effective_macs == 0 and counted.effective_acs > 0
    reads = count_operations(model, [batch()])
    assert counted.effective_acs == pytest.approx(sum(one.plane_additions for one in reads.layers.values()))


@pytest.mark.parametrize("design", DESIGNS)
def test_neurobench_says_so_too(design):
    pytest.importorskip("neurobench")
    from neurobench.benchmarks import Benchmark
    from neurobench.metrics import workload
    from neurobench.models import TorchModel

    class Logits(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            with torch.no_grad():
                return self.model(input_ids=ids).logits

    ids = torch.randint(1, 37, (4, 6), generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.DataLoader([(row, 0) for row in ids], batch_size=4)

    def counted(model):
        metrics = [], [workload.SynapticOperations]
        return Benchmark(TorchModel(Logits(model)), data, [], [], metrics).run(quiet=True)["SynapticOperations"]

    planes = counted(as_planes(spiking(design))[0])
    assert planes["Effective_MACs"] == 0 and planes["Effective_ACs"] > 0
    assert counted(spiking(design))["Effective_MACs"] > 0


@torch.no_grad()
def test_scaled_columns_and_every_digit():
    linear, q = SpikeLinear(5, 3).double(), torch.tensor([[-127.0, 0, 1, 64, -3], [5, -5, 0, 0, 16129]]).double()
    scale = torch.rand(5, dtype=torch.float64)
    assert torch.allclose(PlanesLinear(linear, "it")(q, scale=scale), linear(q, scale=scale), rtol=0, atol=1e-10)
    assert torch.equal(PlanesLinear(linear, "it")(0 * q), torch.zeros(2, 3).double())


def test_what_cannot_be_planes_is_refused_by_name():
    with pytest.raises(ValueError, match="matrix_spikes='integer'"):
        as_planes(fresh_classifier())
    layer = PlanesLinear(SpikeLinear(5, 3), "blocks.0.att.key")
    with pytest.raises(ValueError, match="blocks.0.att.key runs as bit planes, which have no gradient"):
        layer(torch.ones(1, 5))
    with torch.no_grad(), pytest.raises(ValueError, match="blocks.0.att.key must read whole numbers"):
        layer(torch.full((1, 5), 0.5))
    model = spiking("M")
    model.spikegpt.blocks[1].att.key = nn.Linear(12, 12)
    with pytest.raises(ValueError, match="spikegpt.blocks.1.att.key must be a SpikeLinear"):
        as_planes(model)


def test_the_model_itself_stays_as_it_is():
    model = spiking("M")
    as_planes(model)
    assert not any(isinstance(module, PlanesLinear) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
