"""Kneser-Ney: a probability distribution after every context, and equal to the formula written out."""

from collections import Counter

import numpy as np
import pytest

from spikegpt_lora.pretrain.kneser_ney import KneserNey

VOCAB = 31  # the last never occurs, some do once or twice
TOKENS = np.minimum(np.random.default_rng(0).geometric(0.2, 400), 30) - 1


@pytest.mark.parametrize("context", [[], [3], [1, 2, 3], [0, 5, 30], [30, 30, 30], [1, 2, 3, 4, 5]])
@pytest.mark.parametrize("order", [1, 2, 4])
def test_probabilities_sum_to_one_after_any_context(context, order):
    model = KneserNey(TOKENS, VOCAB, order)
    total = sum(np.exp(-model.nats(np.array([*context, token]))[-1]) for token in range(VOCAB))
    assert total == pytest.approx(1, abs=1e-12)


def formula(tokens, order):
    """The same, one n-gram at a time: returns P(token | context)."""
    grams = [Counter(map(tuple, np.lib.stride_tricks.sliding_window_view(tokens, n))) for n in range(1, order + 1)]
    counts = [Counter() for _ in range(order)]
    counts[-1] = grams[-1]
    for n in range(order - 1):
        counts[n] = Counter(gram[1:] for gram in grams[n + 1])
        counts[n] |= Counter(dict.fromkeys(grams[n], 1))  # the one that begins the text

    def discount(n, count):
        of = [sum(c == k for c in counts[n].values()) for k in range(5)]
        y, k = of[1] / (of[1] + 2 * of[2]), min(count, 3)
        return min(max(k - (k + 1) * y * (of[k + 1] / of[k] if of[k] else 0), 0.1), k - 0.1)

    def probability(context, token):
        if context is None:
            return 1 / VOCAB
        n = len(context)
        shorter = probability(context[1:] if n else None, token)
        after = {gram: count for gram, count in counts[n].items() if gram[:-1] == context}
        if not after:
            return shorter
        left = sum(discount(n, count) for count in after.values())
        mine = after.get((*context, token), 0)
        return (mine - (discount(n, mine) if mine else 0) + left * shorter) / sum(after.values())

    return probability


@pytest.mark.parametrize("order", [1, 2, 3])
def test_it_is_the_formula(order):
    text = np.array([4, 4, 1, 0, 30, 2, 3, 3, 3, 5, 17, 0, 1, 0, 1, 0])
    model, probability = KneserNey(TOKENS, VOCAB, order), formula(TOKENS, order)
    expected = [
        -np.log(probability(tuple(text[max(0, i - order + 1) : i].tolist()), text[i])) for i in range(len(text))
    ]
    assert np.allclose(model.nats(text), expected, atol=1e-12)


def test_longer_contexts_help_where_the_text_repeats():
    text = np.tile([0, 1, 2, 0, 2, 1], 50)
    losses = [KneserNey(text, VOCAB, order).nats(text).mean() for order in (1, 2, 3)]
    assert losses[0] > losses[1] > losses[2]
