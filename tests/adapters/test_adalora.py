"""SpikeLoRA with AdaLoRA: the gate on A x before the singular values, pruning, saving, refusals."""

import pytest
import torch
from helpers import largest_difference
from peft import PeftModel, get_peft_model
from torch import nn

from spikegpt_lora.adapters import SpikeAdaLoraConfig

SCHEDULE = {"init_r": 8, "target_r": 3, "total_step": 40, "tinit": 5, "tfinal": 10, "deltaT": 1, "lora_alpha": 8}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def adapted(**settings):
    torch.manual_seed(1)
    settings = SCHEDULE | {"target_modules": ["0"], "spikelora_v_threshold": 0.005} | settings
    return get_peft_model(net(), SpikeAdaLoraConfig(**settings))


@pytest.fixture(scope="module")
def trained():
    model = adapted()
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for step in range(40):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model.eval(), x


def test_a_layer_computes_the_equation(trained):
    model, x = trained
    layer = model.base_model.model[0]
    a = x @ layer.lora_A["default"].T
    fires = a / 2 >= 0.005
    added = (a * fires * layer.lora_E["default"].T) @ layer.lora_B["default"].T * 8 / (8 + 1e-5)
    assert 0.1 < fires.float().mean() < 0.9
    assert largest_difference(layer(x), layer.base_layer(x) + added) < 1e-5


def test_ranks_are_pruned_and_the_rest_has_learned(trained):
    singular = trained[0].base_model.model[0].lora_E["default"].flatten()
    assert (singular != 0).sum() == 3 and singular.abs().max() > 0.1


def test_saved_adapters_come_back_without_the_pruned_ranks(trained, tmp_path):
    model, x = trained
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path).eval()
    assert type(loaded.peft_config["default"]) is SpikeAdaLoraConfig
    assert loaded.base_model.model[0].lora_gate["default"].units == 3
    assert largest_difference(loaded(x), model(x)) < 1e-5  # sums of three terms, not of eight with five zeros


def test_another_base_is_noticed(trained, tmp_path):
    trained[0].save_pretrained(tmp_path)
    torch.manual_seed(7)
    other = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    with pytest.raises(ValueError, match="'default' belongs to another base model .which has no name.: 32 of 32"):
        PeftModel.from_pretrained(other, tmp_path)


def test_merging_is_refused(trained):
    with pytest.raises(RuntimeError, match="'default' cannot be merged"):
        trained[0].merge_and_unload()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="use_spikelora must be True"):
        adapted(use_spikelora=False)
    with pytest.raises(ValueError, match="spikelora_per_rank must be False where ranks are pruned"):
        adapted(spikelora_per_rank=True)
    with pytest.raises(ValueError, match="adapts torch.nn.Linear, got ReLU"):
        adapted(target_modules=["1"])
