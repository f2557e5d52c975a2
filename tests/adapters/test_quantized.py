"""QLoRA: SpikeLoRA on the 4-bit and 8-bit linears of bitsandbytes (extra "qlora"; skipped where it is missing)."""

import copy

import pytest
import torch
from helpers import largest_difference
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from spikegpt_lora import SpikeLoraConfig

bnb = pytest.importorskip("bitsandbytes")


@pytest.fixture(params=["Linear4bit", "Linear8bitLt"])
def net(request):
    torch.manual_seed(0)
    if request.param == "Linear4bit":
        linear = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    else:
        linear = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    return nn.Sequential(linear).to("cpu")  # quantises


def adapted(net, **settings):
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(net), SpikeLoraConfig(target_modules=["0"], r=4, **settings))
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    return model


@pytest.mark.parametrize("use_spikelora", [True, False])
def test_a_quantised_layer_computes_the_equation_and_learns(net, use_spikelora):
    model, x = adapted(net, use_spikelora=use_spikelora, spikelora_v_threshold=0.2), torch.randn(3, 5, 64)
    layer = model.base_model.model[0]
    a = x @ layer.lora_A["default"].weight.T
    passed = a * (a / 2 >= 0.2) if use_spikelora else a
    expected = layer.base_layer(x) + passed @ layer.lora_B["default"].weight.T * layer.scaling["default"]
    assert largest_difference(model(x), expected) < 1e-4
    model(x).sum().backward()
    assert layer.lora_A["default"].weight.grad.any() and layer.lora_B["default"].weight.grad.any()


def test_saved_adapters_come_back_and_merging_is_refused(net, tmp_path):
    model = adapted(net, spikelora_v_threshold=0.3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)
    saved, read = (get_peft_model_state_dict(one) for one in (model, loaded))  # outputs of two quantised copies differ
    assert saved.keys() == read.keys() and all(torch.equal(saved[key], read[key]) for key in saved)
    assert type(loaded.base_model.model[0]) is type(model.base_model.model[0])
    assert loaded.base_model.model[0].lora_gate["default"].v_threshold == 0.3
    with pytest.raises(RuntimeError, match="cannot be merged"):
        model.merge_and_unload()


def test_a_quantised_base_is_not_compared_with_the_one_that_the_adapter_was_saved_with(net, tmp_path):
    plain = nn.Sequential(nn.Linear(64, 64, bias=False))
    for saved, loaded in ((net, plain), (plain, net), (net, net)):
        adapted(saved).save_pretrained(tmp_path)
        fingerprint = SpikeLoraConfig.from_pretrained(tmp_path).spikelora_base_fingerprint
        assert (fingerprint is None) == (saved is net)
        PeftModel.from_pretrained(copy.deepcopy(loaded), tmp_path)
