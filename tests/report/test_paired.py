"""Paired differences: the mean, the interval, and when a difference is noise."""

import numpy as np
import pytest

from spikegpt_lora.report.paired import paired_difference


def outcomes(accuracy, shape=(3, 400), seed=0):
    return np.random.default_rng(seed).random(shape) < accuracy


def test_the_difference_is_the_mean_over_seeds_and_sentences():
    result = paired_difference([[1, 1, 0, 1], [1, 1, 1, 1]], [[1, 0, 0, 1], [0, 1, 1, 1]])
    assert result.difference == pytest.approx(0.25) and result.per_seed == [0.25, 0.25]


def test_equal_methods_differ_by_exactly_nothing():
    a = outcomes(0.9)
    result = paired_difference(a, a)
    assert (result.difference, result.low, result.high, result.is_noise) == (0, 0, 0, True)


def test_the_interval_is_as_wide_as_the_central_limit_says():
    a, b = outcomes(0.9, (1, 400), seed=1), outcomes(0.8, (1, 400), seed=2)
    result = paired_difference(a, b, resamples=20000)
    deviation = (a.astype(float) - b).mean(0).std() / np.sqrt(400)
    assert result.high - result.low == pytest.approx(2 * 1.96 * deviation, rel=0.05)
    assert result.low < result.difference < result.high and not result.is_noise


def test_seeds_that_disagree_widen_the_interval():
    b = outcomes(0.8, (1, 400), 2).repeat(3, 0)
    better = np.ones_like(b)
    agree, disagree = better, np.stack([better[0], b[1], ~b[2]])
    assert not paired_difference(agree, b).is_noise
    assert paired_difference(disagree, b).is_noise


def test_a_small_difference_is_called_noise():
    a = outcomes(0.9)
    b = a.copy()
    b[:, 0] = ~b[:, 0]
    assert paired_difference(a, b).is_noise


def test_seeds_of_a_sentence_are_not_counted_as_independent():
    a, b = outcomes(0.9, (1, 400), 1), outcomes(0.8, (1, 400), 2)
    once, thrice = paired_difference(a, b), paired_difference(np.repeat(a, 3, 0), np.repeat(b, 3, 0))
    assert (once.low, once.high) == pytest.approx((thrice.low, thrice.high))


@pytest.mark.parametrize("a, b", [(np.ones((2, 3)), np.ones((2, 4))), (np.ones(3), np.ones(3)), (np.ones((0, 3)),) * 2])
def test_unpaired_input_is_refused(a, b):
    with pytest.raises(ValueError, match=r"must be \(seeds, sentences\)"):
        paired_difference(a, b)
