"""What adapters do, seen from outside: counts over real tokens, in anybody's loop, on any model, gone afterwards."""

import pytest
import torch
from helpers import adapted, fresh_classifier, padded_batch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from spikegpt_lora import SpikeLoraConfig
from spikegpt_lora.adapters import SpikeGate
from spikegpt_lora.observe.adapters import observe_adapters

BATCH = padded_batch([7, 4, 4, 8, 9, 2], seed=6)
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def trained(**config):
    return adapted(fresh_classifier(pad_token_id=0), SpikeLoraConfig(task_type="SEQ_CLS", r=4, **config))


@pytest.mark.parametrize("time", ["pointwise", "token"])
def test_counts_are_those_of_the_real_tokens_one_sentence_at_a_time(time):
    model, given = trained(spikelora_time=time), BATCH
    with observe_adapters(model, membranes=True) as together:
        model(**given)
    with observe_adapters(model, membranes=True) as alone:
        for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True):
            model(input_ids=ids[None, mask.bool()])
    a, b = together.activity(), alone.activity()
    assert a.sparsity == pytest.approx(b.sparsity, abs=1e-12) and 0.2 < a.sparsity < 0.98
    assert a.contribution == pytest.approx(b.contribution, rel=1e-9) and a.dead_ranks == b.dead_ranks
    for name, module in a.modules.items():
        assert module["firing"] == pytest.approx(b.modules[name]["firing"], abs=1e-12)
        assert module["membrane"] == pytest.approx(b.modules[name]["membrane"], rel=1e-9)


def test_it_leaves_nothing_behind():
    model = trained()
    with observe_adapters(model) as seen:
        model(**BATCH)
    before = seen.activity()
    model(**BATCH)
    assert seen.activity() == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_training_with_checkpointing_is_counted_once():
    model = trained().train()
    counts = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        with observe_adapters(model) as seen:
            model(**BATCH).logits.sum().backward()
        counts.append(seen.activity())
    assert counts[0] == counts[1]


def test_learned_settings_are_shown():
    module = next(iter(seen_once(trained(spikelora_learn="both", spikelora_tau=3.0)).modules.values()))
    assert module["threshold"] == pytest.approx(0.1, rel=1e-5) and module["tau"] == pytest.approx(3.0, rel=1e-5)


def seen_once(model, given=None):
    with observe_adapters(model) as seen:
        model(**(given or BATCH))
    return seen.activity()


def test_a_larger_spike_fires_once_and_counts_as_many():
    model = trained()
    one = seen_once(model)
    for module in model.modules():
        if isinstance(module, SpikeGate):
            module.register_forward_hook(lambda gate, inputs, spikes: -2 * spikes)
    other = seen_once(model)
    name, module = next(iter(one.modules.items()))
    assert other.modules[name]["sparsity"] == module["sparsity"] and 0 < module["sparsity"] < 1
    assert other.modules[name]["firing"] == [2 * spikes for spikes in module["firing"]]


def test_plain_lora_has_a_contribution_and_no_spikes():
    model = get_peft_model(fresh_classifier(), LoraConfig(r=2))
    activity = seen_once(model)
    assert activity.sparsity is None and activity.dead_ranks is None and activity.contribution == 0.0


def test_poolers_are_left_out_by_name():
    model = get_peft_model(BertModel(BertConfig(vocab_size=37, **TINY)), SpikeLoraConfig(target_modules=["dense"]))
    activity = seen_once(model)
    assert activity.left_out == ["base_model.model.pooler.dense"] and len(activity.modules) == 3


def test_models_that_read_no_ids_are_counted_whole():
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, **TINY)
    model = get_peft_model(ViTModel(config), SpikeLoraConfig(target_modules=["q_proj"]))
    activity = seen_once(model, {"pixel_values": torch.randn(2, 1, 8, 8)})
    assert 0 < activity.sparsity <= 1


def test_without_adapters_there_is_nothing_to_see():
    with observe_adapters(nn.Sequential(nn.Linear(2, 2))) as seen:
        pass
    assert seen.activity() is None


def test_without_a_real_token_it_says_so():
    with observe_adapters(trained()) as seen:
        pass
    with pytest.raises(ValueError, match="at least one batch with a real token"):
        seen.activity()
