"""Packed weights: what is held, that a model speaks as its rounded self, and what is refused."""

import pytest
import torch
from helpers import SIZES
from peft import LoraConfig, get_peft_model
from torch import nn

from spikegpt_lora import (
    SpikeGPTConfig,
    SpikeGPTForCausalLM,
    SpikeGPTForSequenceClassification,
    count_operations,
)
from spikegpt_lora.convert.generation import WEIGHTS, pack, pack_weights
from spikegpt_lora.ops.packed_linear import PackedLinear


@pytest.fixture
def lm32(lm):
    return lm.float()


def test_int8_is_the_nearest_number_on_each_rows_grid():
    weight = torch.randn(9, 40, generator=torch.Generator().manual_seed(0))
    held, scale = pack(weight, "int8")
    assert held.dtype == torch.int8 and held.abs().amax(dim=1).tolist() == [127] * 9
    assert bool(((held * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all())


def test_a_row_of_zeros_stays_one():
    held, scale = pack(torch.zeros(2, 3), "int8")
    assert not held.any() and scale.tolist() == [1, 1]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_matrix_is_packed_and_the_embedding_is_not(lm32, weights):
    matrices = sum(isinstance(module, nn.Linear) for module in lm32.modules())
    assert pack_weights(lm32, weights) is lm32
    packed = [module for module in lm32.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == matrices == 22 and lm32.get_output_embeddings() is lm32.head is packed[-1]
    assert {module.weight.dtype for module in packed} == {getattr(torch, weights)}
    assert lm32.get_input_embeddings().weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in lm32.parameters())


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("tokens", [1, 9], ids=["few rows", "many rows"])
def test_the_logits_are_those_of_the_rounded_weights(lm32, ids, weights, tokens):
    rounded = {}
    for name, module in lm32.named_modules():
        if isinstance(module, nn.Linear):
            held, scale = pack(module.weight.detach(), weights)
            rounded[name] = held.float() if scale is None else held.float() * scale[:, None]
    for name, weight in rounded.items():
        lm32.get_submodule(name).weight.data = weight
    expected = lm32(ids[:, :tokens]).logits
    torch.testing.assert_close(pack_weights(lm32, weights)(ids[:, :tokens]).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_it_generates_and_its_state_goes_on(lm32, ids, weights):
    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    model = pack_weights(lm32, weights)
    whole = model.generate(ids, **settings, max_new_tokens=6)
    begun = model.generate(ids, **settings, max_new_tokens=3, return_dict_in_generate=True)
    settings["attention_mask"] = settings["attention_mask"][:, :1]
    rest = model.generate(begun.sequences[:, -1:], state=begun.state, **settings, max_new_tokens=3)
    assert torch.equal(rest[:, 1:], whole[:, -3:])


def test_it_says_what_it_holds(lm32):
    assert "(head): PackedLinear(in_features=12, out_features=37, weights=int8)" in repr(pack_weights(lm32, "int8"))


def test_buffers_move_with_the_model(lm32):
    head = pack_weights(lm32, "int8").to("meta").head
    assert head.weight.is_meta and head.scale.is_meta


def test_packed_weights_are_neither_saved_nor_loaded(lm32, tmp_path):
    saved = lm32.state_dict()
    pack_weights(lm32, "bfloat16")
    with pytest.raises(ValueError, match="packed weights are not saved: save the model before"):
        lm32.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights cannot be loaded into packed ones"):
        lm32.load_state_dict(saved)


def test_counting_operations_names_what_it_does_not_count(lm32, ids):
    assert "head" in count_operations(pack_weights(lm32, "int8"), [{"input_ids": ids}]).left_out


def test_an_unmerged_adapter_is_refused_and_a_merged_one_is_packed(lm32):
    model = get_peft_model(lm32, LoraConfig(task_type="CAUSAL_LM", target_modules=["key"])).eval()
    for one in (model, model.base_model.model):
        with pytest.raises(ValueError, match="of a peft model, pack what merge_and_unload"):
            pack_weights(one, "int8")
    assert isinstance(pack_weights(model.merge_and_unload(), "int8").spikegpt.blocks[0].att.key, PackedLinear)


REFUSED = {
    "training": (lambda lm: lm.float().train(), "int8", r"cannot be trained: call model.eval\(\)"),
    "float64": (lambda lm: lm, "int8", r"blocks.0.att.key must be a float32 matrix .* call model.float\(\)"),
    "a classifier": (
        lambda lm: SpikeGPTForSequenceClassification.from_language_model(lm),
        "int8",
        "of a SpikeGPTForCausalLM without adapters, got a SpikeGPTForSequenceClassification",
    ),
    "integer spikes": (
        lambda lm: SpikeGPTForCausalLM(SpikeGPTConfig(**SIZES, matrix_spikes="integer")).eval(),
        "int8",
        "matrices that read real numbers, and this model's read integer spikes",
    ),
    "int4": (lambda lm: lm.float(), "int4", "weights must be one of bfloat16, int8, got 'int4'"),
}


@pytest.mark.parametrize("prepare, weights, message", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_the_model_as_it_was(lm, prepare, weights, message):
    model = prepare(lm)
    with pytest.raises(ValueError, match=message):
        pack_weights(model, weights)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
