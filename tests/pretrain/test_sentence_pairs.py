"""Which sentence comes next: what counts as a pair, what is drawn, and what its loss says."""

import math

import numpy as np
import pytest
import torch

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM
from spikegpt_lora.pretrain.sentence_pairs import SentencePairs
from spikegpt_lora.pretrain.tokenizer import train_tokenizer

SIGNS = [".", "!", "?", "..."]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"word{i} of many words ." for i in range(20)] + SIGNS, 200)


def tokens_of(documents, tokenizer):
    return np.array([i for text in documents for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])


@pytest.fixture(scope="module")
def documents():
    return [" ".join(f"word{i} " * (5 + (i + j) % 7) + SIGNS[j % 4] for j in range(6)) for i in range(20)]


def pairs(tokens, tokenizer, count=4, seed=0):
    return SentencePairs(tokens, tokenizer, count, n_embd=8, seed=seed)


def test_pairs_are_neighbours_within_one_document(documents, tokenizer):
    tokens = tokens_of(documents, tokenizer)
    drawn = pairs(tokens, tokenizer)
    assert len(drawn.first) == 20 * 5 - 2  # of a document five have a next one; the first and last of all are not used
    for first in drawn.first:
        between = tokens[drawn.starts[first] : drawn.stops[first]]
        assert tokenizer.eos_token_id not in between and drawn.stops[first] == drawn.starts[first + 1]


def test_too_short_and_too_long_sentences_are_left_out(tokenizer):
    texts = ["word1 . " + "word2 " * 9 + ". " + "word3 " * 9 + ". " + "word4 " * 70 + "."] * 2
    drawn = SentencePairs(tokens_of(texts * 8, tokenizer), tokenizer, 1, n_embd=8, seed=0)
    lengths = drawn.stops - drawn.starts
    assert len(drawn.first) == 16 and set(lengths[drawn.first]) == set(lengths[drawn.first + 1])


def test_a_step_draws_each_sentence_and_its_neighbour(documents, tokenizer):
    ids, mask = pairs(tokens_of(documents, tokenizer), tokenizer).draw(3)
    texts = [tokenizer.decode(row[kept.bool()]).split()[0] for row, kept in zip(ids, mask, strict=True)]
    assert len(texts) == 8 and texts[:4] == texts[4:]  # a document here repeats one word
    assert ids.shape == mask.shape and mask.sum(dim=1).max() == mask.shape[1]


def test_a_draw_depends_on_seed_and_step_alone(documents, tokenizer):
    tokens = tokens_of(documents, tokenizer)
    one, again, other = pairs(tokens, tokenizer), pairs(tokens, tokenizer), pairs(tokens, tokenizer, seed=1)
    one.draw(0)
    assert torch.equal(one.draw(5)[0], again.draw(5)[0])
    assert not all(torch.equal(one.draw(step)[0], other.draw(step)[0]) for step in range(3))


def test_training_on_pairs_finds_neighbours_that_share_their_words(documents, tokenizer):
    torch.manual_seed(0)
    model = SpikeGPTForCausalLM(SpikeGPTConfig(vocab_size=len(tokenizer), n_embd=8, n_layer=1, dropout=0.0))
    task = pairs(tokens_of(documents, tokenizer), tokenizer)
    optimizer = torch.optim.Adam([*model.spikegpt.parameters(), *task.parameters()], lr=1e-2)
    losses = []
    for step in range(60):
        loss = task.loss(model, step, bf16=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.6 * math.log(4)


def test_a_text_with_too_few_pairs_is_refused(tokenizer):
    with pytest.raises(ValueError, match="4 pairs a step need 32 pairs .* the text has 0"):
        pairs(tokens_of(["word1 " * 9 + ". " + "word2 " * 9 + ". " + "word3 " * 9 + "."], tokenizer), tokenizer)
