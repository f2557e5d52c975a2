"""Saved models: all their weights come from their files, and are finite, whoever loads them."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from spikegpt_lora import SpikeGPTForCausalLM, SpikeGPTForSequenceClassification, SpikeGPTModel
from spikegpt_lora.checkpoint import load_model
from spikegpt_lora.config import read_config


@pytest.fixture
def folder(lm, tmp_path):
    lm.float().save_pretrained(tmp_path)
    return tmp_path


def spoil(folder, name, value):
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


LOADERS = [
    SpikeGPTModel,
    SpikeGPTForCausalLM,
    SpikeGPTForSequenceClassification,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_parameters_that_are_not_finite_are_refused_by_name(folder, loader, value):
    spoil(folder, "spikegpt.blocks.1.att.key.weight", value)
    with pytest.raises(ValueError, match="the weights of .* must be finite, got NaN or infinity in .*blocks.1.att.key"):
        loader.from_pretrained(folder)


def test_the_loading_report_is_still_to_be_had(folder):
    spoil(folder, "spikegpt.emb.weight", float("nan"))
    with pytest.raises(ValueError, match="spikegpt.emb.weight"):
        SpikeGPTForCausalLM.from_pretrained(folder, output_loading_info=True)


def test_a_model_without_values_may_be_made(folder):
    with torch.device("meta"):
        model = SpikeGPTForCausalLM(read_config(folder))
    assert model.spikegpt.emb.weight.is_meta


def test_a_new_head_may_be_missing_and_another_one_be_there(folder):
    model = load_model(SpikeGPTForSequenceClassification, folder, new_head=True)
    assert torch.equal(model.spikegpt.emb.weight, load_file(folder / "model.safetensors")["spikegpt.emb.weight"])
    with pytest.raises(ValueError, match="no SpikeGPT classifier: it has no score.weight; it has head.weight beside"):
        load_model(SpikeGPTForSequenceClassification, folder)


@pytest.mark.parametrize("layout", ["shards", "pytorch_model.bin", "base model"])
def test_other_layouts_of_a_saved_model_load_and_are_compared_too(lm, tmp_path, layout):
    if layout == "shards":
        lm.float().save_pretrained(tmp_path, max_shard_size="8KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    elif layout == "base model":
        lm.spikegpt.float().save_pretrained(tmp_path)
    else:
        lm.float().save_pretrained(tmp_path)
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    model = load_model(SpikeGPTForSequenceClassification, tmp_path, new_head=True)
    assert torch.equal(model.spikegpt.emb.weight, lm.spikegpt.emb.weight)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 10**7}))
    with pytest.raises(ValueError, match="says n_layer 10000000 for 3 of the weights"):
        load_model(SpikeGPTForSequenceClassification, tmp_path, new_head=True)


def test_peft_takes_a_model_without_a_warning(lm):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(lm, LoraConfig(r=2, target_modules=["key"]))
