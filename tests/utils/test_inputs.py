"""What a forward refuses: every argument that would be read wrongly, and gives finite numbers all the same."""

import pytest
import torch
from helpers import SIZES

from spikegpt_lora import SpikeGPTState

NAN = float("nan")


@pytest.fixture(params=["lm", "classifier", "base"])
def model(request):
    if request.param == "base":
        return request.getfixturevalue("lm").spikegpt
    return request.getfixturevalue(request.param)


def state_of(model, ids, **changes):
    state = model(ids, use_cache=True).state
    return SpikeGPTState(**{name: tensor.clone() for name, tensor in state.items()} | changes)


REFUSED = [
    ("sate", {"sate": 1}, TypeError, "has no argument sate; did you mean state"),
    ("unknown", {"zzz": 1}, TypeError, "has no argument zzz; it takes input_ids"),
    ("attentions", {"output_attentions": True}, ValueError, "output_attentions must be False"),
    ("past_key_values", {"past_key_values": ()}, ValueError, "past_key_values must be None: .* give it as state="),
    ("cache", {"cache": object()}, ValueError, "cache must be None"),
    ("packed", {"cu_seq_lens_q": torch.tensor([0, 4, 9])}, ValueError, "several texts are packed in a row"),
    ("token types", {"token_type_ids": torch.ones(4, 9).long()}, ValueError, "token_type_ids must be 0"),
    (
        "positions",
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])},
        ValueError,
        "start again within a row",
    ),
    ("additive mask", {"attention_mask": torch.tensor([[0.0, -torch.inf] + [0.0] * 7] * 4)}, ValueError, "must hold 1"),
    ("fractional mask", {"attention_mask": torch.full((4, 9), 0.5)}, ValueError, r"must hold 1 .* got \[0.5\]"),
    ("negative mask", {"attention_mask": -torch.ones(4, 9).long()}, ValueError, r"must hold 1 .* got \[-1\]"),
    ("mask of NaN", {"attention_mask": torch.full((4, 9), NAN)}, ValueError, "must hold 1"),
    ("mask a list", {"attention_mask": [[1] * 9] * 4}, ValueError, r"attention_mask must be \(4, 9\), got list"),
    ("state a dict", {"state": {}}, ValueError, "state must be a SpikeGPTState from an earlier call, got dict"),
    ("state empty", {"state": SpikeGPTState()}, ValueError, "state must be a SpikeGPTState"),
    ("mask as state", {"state": torch.ones(4, 9)}, ValueError, "state must be a SpikeGPTState .* got Tensor"),
]


@pytest.mark.parametrize("given, error, message", [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_an_argument_that_would_be_read_wrongly_is_refused(model, ids, given, error, message):
    with pytest.raises(error, match=message):
        model(ids, **given)


@pytest.mark.parametrize(
    "harmless",
    [
        {"output_attentions": None},
        {"output_attentions": False},
        {"past_key_values": None, "cache": None, "sate": None},
        {"token_type_ids": torch.zeros(4, 9).long()},
        {"position_ids": torch.arange(9)[None]},
        {"position_ids": torch.arange(3, 12).expand(4, 9)},
    ],
    ids=["attentions None", "attentions False", "caches None", "token types 0", "positions", "later positions"],
)
def test_what_stock_code_passes_to_every_model_changes_nothing(model, ids, harmless):
    assert torch.equal(model(ids, **harmless)[0], model(ids)[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_padded_rows_are_one_text(lm, ids, side):
    lengths = torch.tensor([9, 5, 1, 7])
    mask = torch.arange(9) < lengths[:, None]
    mask = mask if side == "right" else mask.flip(1)
    positions = (mask.cumsum(1) - 1).masked_fill(~mask, 1)  # as transformers' generation makes them
    masked = lm(ids, attention_mask=mask).logits
    assert torch.equal(lm(ids, attention_mask=mask, position_ids=positions).logits, masked)


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([[1, 2]], r"input_ids must be integers of shape \(B, T\), got list"),
        (torch.tensor([1, 2]), r"got torch.int64 \(2,\)"),
        (torch.ones(1, 2, 3).long(), r"got torch.int64 \(1, 2, 3\)"),
        (torch.ones(1, 2), r"got torch.float32 \(1, 2\)"),
        (torch.tensor([[SIZES["vocab_size"]]]), r"in 0 \.\.\. 36, got 37 \.\.\. 37: the tokenizer is another model's"),
        (torch.tensor([[-1, 3]]), r"in 0 \.\.\. 36, got -1 \.\.\. 3"),
        (torch.ones(2, 0).long(), r"at least one token per sequence, got input of shape \(2, 0\)"),
    ],
)
def test_tokens_that_are_none_are_refused(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        model(tokens)


@pytest.mark.parametrize("embeds", [torch.zeros(2, 3), torch.zeros(2, 3, 13), torch.zeros(2, 3, 12).long(), [[0.0]]])
def test_embeddings_of_another_shape_or_kind_are_refused(model, embeds):
    with pytest.raises(ValueError, match=r"inputs_embeds must be real numbers of shape \(B, T, 12\), got"):
        model(inputs_embeds=embeds)


@pytest.mark.parametrize("name", ["att_shift", "wkv", "att_membrane", "ffn_shift", "ffn_membrane"])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_state_that_is_not_finite_is_refused_by_name(lm, ids, name, value):
    state = state_of(lm, ids)
    state[name].view(-1)[0] = value
    with pytest.raises(ValueError, match=f"state must be finite, got NaN or infinity in {name}"):
        lm(ids, state=state)


def test_a_state_whose_sum_overflows_is_finite(lm, ids):
    state = state_of(lm.float(), ids)
    state.wkv[:, :, 2] = -3e38
    assert not state.wkv.sum().isfinite() and lm(ids, state=state).logits.isfinite().all()


def test_a_state_of_another_width_is_refused(lm, ids):
    with pytest.raises(ValueError, match="state must be of width 12, got 6"):
        lm(ids, state=state_of(lm, ids, wkv=torch.zeros(4, 3, 3, 6)))


@pytest.mark.parametrize("labels", [torch.full((4, 9), -100), torch.tensor([[5] + [-100] * 8] * 4)])
def test_labels_with_nothing_to_predict_are_refused(lm, ids, labels):
    with pytest.raises(ValueError, match="labels must hold at least one token to predict, got only -100"):
        lm(ids, labels=labels)


def test_a_cache_may_be_the_state_with_a_mask_of_the_whole_past(lm, ids):
    state = lm(ids[:, :6], use_cache=True).state
    whole = torch.ones(4, 9).long()
    assert torch.equal(lm(ids[:, 6:], attention_mask=whole, cache=state).logits, lm(ids[:, 6:], state=state).logits)
