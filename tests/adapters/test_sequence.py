"""Adapters in token time inside whole models: mask, stretches, streaming, checkpointing, and what is refused."""

import copy
import pickle

import pytest
import torch
from helpers import SIZES, adapted, fresh_classifier, largest_difference
from transformers import (
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5Model,
)

from spikegpt_lora import SpikeGPTForCausalLM, SpikeLoraConfig
from spikegpt_lora.adapters import sequence

TOKEN = {"spikelora_time": "token", "spikelora_v_threshold": 0.2, "r": 4}
TINY = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def in_token_time(model, **config):
    return adapted(model, SpikeLoraConfig(**TOKEN | config), "lora_", seed=1)


@pytest.fixture
def classifier(classifier):
    return in_token_time(classifier, task_type="SEQ_CLS")


@pytest.fixture
def lm(lm):
    return in_token_time(lm)


@pytest.fixture
def bert():
    torch.manual_seed(0)
    return in_token_time(BertModel(BertConfig(**TINY), add_pooling_layer=False), target_modules=["query", "value"])


def padded(ids, left):
    pad = torch.zeros(len(ids), 3, dtype=torch.long)
    parts = [(pad, 0), (ids, 1)] if left else [(ids, 1), (pad, 0)]
    return {
        "input_ids": torch.cat([part for part, _ in parts], dim=1),
        "attention_mask": torch.cat([torch.full_like(part, real) for part, real in parts], dim=1),
    }


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(classifier, ids, left):
    assert largest_difference(classifier(**padded(ids, left)).logits, classifier(ids).logits) < 1e-12


def test_time_matters(classifier, ids):
    """The gates do remember: without membranes the answer is another one."""
    for module in classifier.modules():
        if hasattr(module, "lora_gate"):
            module.lora_gate["default"].time = "pointwise"
    pointwise = classifier(ids).logits
    for module in classifier.modules():
        if hasattr(module, "lora_gate"):
            module.lora_gate["default"].time = "token"
    assert largest_difference(classifier(ids).logits, pointwise) > 1e-3


def test_stretches_and_single_tokens_give_what_the_whole_gives(lm, ids):
    whole = lm(ids, use_cache=True)
    logits, state = [], None
    for stretch in (ids[:, :4], ids[:, 4:5], ids[:, 5:]):
        output = lm(stretch, state=state, use_cache=True)
        logits.append(output.logits)
        state = output.state
    assert largest_difference(torch.cat(logits, dim=1), whole.logits) < 1e-10
    assert largest_difference(state.adapters, whole.state.adapters) < 1e-12
    assert state.adapters.shape == (len(ids), 4 * 6 * SIZES["n_layer"])
    assert torch.equal(state.select(torch.tensor([2, 0])).adapters, state.adapters[[2, 0]])


def test_generation_with_the_state_is_generation_without(lm, ids):
    written = [
        lm.generate(input_ids=ids, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False)
    ]
    assert torch.equal(*written)


def test_a_state_of_other_adapters_is_refused(lm, ids):
    state = lm(ids, use_cache=True).state
    state["adapters"] = state.adapters[:, 1:]
    with pytest.raises(ValueError, match=r"holds 71 membranes, the active adapters have 72 units"):
        lm(ids, state=state)


@pytest.mark.parametrize("which", ["classifier", "bert"])
def test_checkpointing_gives_the_same_gradients(request, which, ids):
    model, batch, gradients = request.getfixturevalue(which).train(), padded(ids, left=True), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(0)
        output = model(**batch)
        (output.logits if which == "classifier" else output.last_hidden_state).pow(3).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) >= 8
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_mask_is_that_of_its_own_forward_even_if_another_one_came_between(bert, ids):
    """The backward of a first batch recomputes after the forward of a second one with another mask."""
    bert.train().gradient_checkpointing_enable({"use_reentrant": False})
    for module in bert.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    alone = bert(**padded(ids, left=True)).last_hidden_state.pow(3).sum()
    parameters = [p for p in bert.parameters() if p.requires_grad]
    expected = torch.autograd.grad(alone, parameters)
    first = bert(**padded(ids, left=True)).last_hidden_state.pow(3).sum()
    bert(**padded(ids, left=False))
    assert all(map(torch.equal, torch.autograd.grad(first, parameters), expected))


def test_a_bert_reads_left_and_right_padding_alike_where_positions_do(bert, ids):
    batches = [padded(ids, left) for left in (True, False)]
    positions = torch.arange(ids.shape[1])
    batches[0]["position_ids"] = torch.cat([torch.zeros(3, dtype=torch.long), positions])[None].expand(len(ids), -1)
    batches[1]["position_ids"] = torch.cat([positions, positions[-1:].expand(3)])[None].expand(len(ids), -1)
    hidden = [bert(**batch).last_hidden_state for batch in batches]
    assert largest_difference(hidden[0][:, 3:], hidden[1][:, :-3]) < 1e-12


def test_nothing_outlives_a_call_that_fails(classifier, ids):
    before = classifier(ids).logits
    with pytest.raises(ValueError, match="attention_mask"):
        classifier(ids, attention_mask=torch.ones(1, 1))
    assert torch.equal(classifier(ids).logits, before)


def test_disabled_adapters_leave_no_trace(classifier, lm, ids):
    with lm.disable_adapter():
        assert lm(ids, use_cache=True).state.adapters is None
    assert lm(ids, use_cache=True).state.adapters is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_gates_of_their_own(lm, ids, copied):
    other = copied(lm)
    for module in other.modules():
        if hasattr(module, "lora_gate"):
            module.lora_gate["default"].v_threshold = 100.0
    before = lm(ids).logits
    assert not torch.equal(other(ids).logits, before) and torch.equal(lm(ids).logits, before)


def test_a_batch_of_several_adapters_sees_its_own_rows(ids):
    model = in_token_time(fresh_classifier(), task_type="SEQ_CLS", modules_to_save=None)
    model.add_adapter("other", SpikeLoraConfig(task_type="SEQ_CLS", **TOKEN | {"r": 2, "spikelora_v_threshold": 0.1}))
    model = model.double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".other." in name and "lora_" in name:
                torch.nn.init.normal_(p)
    batch, names = padded(ids, left=True), ["default", "other", "__base__", "other"]
    mixed = model(**batch, adapter_names=names, use_cache=False).logits
    for row, name in enumerate(names):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        assert largest_difference(mixed[row], model(**alone, adapter_names=[name], use_cache=False).logits[0]) < 1e-12


def llama(**config):
    torch.manual_seed(0)
    return in_token_time(LlamaForCausalLM(LlamaConfig(**TINY)), target_modules=["q_proj", "v_proj"], **config)


def test_cached_generation_of_another_model_is_refused_and_uncached_works(ids):
    model = llama()
    with pytest.raises(ValueError, match="holds tokens whose membranes are not known.*use_cache=False"):
        model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, use_cache=False).shape == (4, 12)


class UnknownMemory:
    """What a later transformers might hand on in a cache's place."""


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("memory", [UnknownMemory(), (torch.zeros(4, 2, 3, 8),)])
def test_a_memory_that_cannot_be_looked_into_is_refused(ids, name, memory):
    with pytest.raises(ValueError, match="tokens whose membranes are not known"):
        llama()(input_ids=ids, **{name: memory})


def test_a_forward_without_visible_tokens_is_refused(ids):
    model = llama()
    with pytest.raises(ValueError, match="needs input_ids or inputs_embeds"):
        sequence._mask({"pixel_values": ids}, model)


def test_packed_sequences_are_refused(ids):
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with pytest.raises(ValueError, match="position_ids start again within a row, so several texts are packed"):
        llama()(input_ids=ids[:1], position_ids=positions)


def test_a_mask_that_is_no_row_of_tokens_is_refused(ids):
    with pytest.raises(ValueError, match=r"needs an attention_mask \(B, T\)"):
        llama()(input_ids=ids, attention_mask=torch.zeros(4, 1, 9, 9).double())


def test_debertas_projections_of_relative_positions_are_refused_by_name():
    config = DebertaV2Config(
        **TINY, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=8
    )
    with pytest.raises(ValueError, match="query_proj reads DeBERTa's relative positions too"):
        in_token_time(DebertaV2Model(config), target_modules=["query_proj", "value_proj"])
    model = in_token_time(DebertaV2Model(config), target_modules=["value_proj", "dense"])
    assert model(input_ids=torch.ones(2, 5).long()).last_hidden_state.shape == (2, 5, 16)


def test_an_encoder_decoder_is_refused():
    config = T5Config(vocab_size=37, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="T5Model reads two sequences in one forward"):
        in_token_time(T5Model(config), target_modules=["q"])


def test_a_pooler_is_refused_when_it_is_called(ids):
    torch.manual_seed(0)
    model = in_token_time(BertModel(BertConfig(**TINY)), target_modules=["pooler.dense"])
    with pytest.raises(ValueError, match=r"got activations \(4, 4\) for tokens .*leave this module out"):
        model(input_ids=ids)


def test_gates_are_trained_through_time(lm, ids):
    lm.train()
    state = lm(ids[:, :4], use_cache=True).state
    lm(ids[:, 4:], state=state, use_cache=True).logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lm.parameters() if p.requires_grad)
    assert isinstance(lm.base_model.model, SpikeGPTForCausalLM)
