"""Paired differences: each interval and p by hand, how often intervals hold the truth, and what is refused."""

import numpy as np
import pytest

from spikegpt_lora.report.paired import holm, mcnemar, paired_difference


def outcomes(accuracy, shape=(3, 400), seed=0):
    return np.random.default_rng(seed).random(shape) < accuracy


def ahead(*leads, sentences=100):
    """Rows of two methods, of which the first is right on so many sentences more, by seed; none is both's fault."""
    a = np.ones((len(leads), sentences))
    b = np.stack([np.arange(sentences) >= lead for lead in leads])
    return a, b


def test_the_difference_is_the_mean_over_seeds_and_sentences():
    result = paired_difference([[1, 1, 0, 1], [1, 1, 1, 1]], [[1, 0, 0, 1], [0, 1, 1, 1]])
    assert result.difference == pytest.approx(0.25) and result.per_seed == [0.25, 0.25]


def test_equal_methods_differ_by_exactly_nothing():
    a = outcomes(0.9)
    result = paired_difference(a, a)
    assert (result.difference, result.seeds, result.sentences, result.p) == (0, (0, 0), (0, 0), 1)


def test_the_interval_over_seeds_is_students():
    found = paired_difference(*ahead(1, 2, 3))  # mean 0.02, deviation 0.01, t(2) = 4.302653
    half = 4.302653 * 0.01 / 3**0.5
    assert found.seeds == pytest.approx((0.02 - half, 0.02 + half), abs=1e-7)
    assert found.p_seeds == pytest.approx(0.0741799, abs=1e-6)  # of t = 3.4641


def test_over_folds_the_variance_grows_by_the_share_of_the_test_sentences():
    """Nadeau & Bengio 2003, eq. 8: 1/k + 1/(k - 1) in place of 1/k."""
    seeds, folds = (paired_difference(*ahead(1, 2, 3), folds=folds) for folds in (False, True))
    width = [found.seeds.high - found.seeds.low for found in (seeds, folds)]
    assert width[1] / width[0] == pytest.approx(((1 / 3 + 1 / 2) / (1 / 3)) ** 0.5)


def test_folds_may_differ_in_size_and_each_sentence_counts_once():
    found = paired_difference([[1, 1, 1], [1, 1]], [[0, 1, 1], [1, 1]], folds=True)
    assert found.difference == pytest.approx(1 / 5) and found.per_seed == pytest.approx([1 / 3, 0])


def test_the_interval_over_sentences_is_as_wide_as_the_central_limit_says():
    a, b = outcomes(0.9, (2, 4000), seed=1), outcomes(0.8, (2, 4000), seed=2)
    found = paired_difference(a, b).sentences
    deviation = (a.astype(float) - b).mean(0).std() / np.sqrt(4000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.06)


def test_seeds_of_a_sentence_are_not_counted_as_independent():
    a, b = outcomes(0.9, (1, 400), 1), outcomes(0.8, (1, 400), 2)
    once, thrice = paired_difference(a, b), paired_difference(np.repeat(a, 3, 0), np.repeat(b, 3, 0))
    assert once.sentences == pytest.approx(thrice.sentences)


def test_mcnemar_is_the_binomials():
    """8 against 2: 2 (45 + 10 + 1) / 2^10."""
    assert mcnemar(np.array([1] * 8 + [-1] * 2 + [0] * 90)) == pytest.approx(112 / 1024)
    assert mcnemar(np.zeros(5)) == 1


@pytest.mark.parametrize(
    "ps, corrected", [([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]), ([0.4, 0.9], [0.8, 0.9]), ([0.02], [0.02]), ([], [])]
)
def test_holms_correction(ps, corrected):
    assert holm(ps) == pytest.approx(corrected)


def test_one_seed_finds_nothing():
    found = paired_difference(np.ones((1, 500)), np.zeros((1, 500)))
    assert (found.seeds, found.p_seeds, found.detectable, found.p) == (None, None, None, 1.0)
    assert found.sentences == (1, 1) and found.p_sentences < 1e-100


def test_what_only_one_noise_explains_is_not_found():
    """Seeds that agree on six sentences of a hundred, and seeds that disagree on many."""
    few = paired_difference(*ahead(4, 4, 4))
    assert few.p_seeds == 0 and few.p == few.p_sentences > 0.03
    torn = paired_difference(*ahead(60, 0, 0))
    assert torn.p_sentences < 1e-6 and torn.p == torn.p_seeds > 0.4


def test_a_difference_of_the_detectable_size_is_seen_four_times_in_five():
    rng, deviation, seen = np.random.default_rng(0), 0.01, 0
    sizes = []
    for _ in range(400):
        leads = np.clip(np.rint(1000 * (0.0185 + deviation * rng.standard_normal(5))), 0, None).astype(int)
        found = paired_difference(*ahead(*leads, sentences=1000))
        seen += found.p_seeds < 0.05
        sizes.append(found.detectable)
    # t(4): (2.776 + 0.941) * 0.01 / sqrt(5) = 0.0166, and a deviation of so few seeds is 6 % too small on average
    assert np.mean(sizes) == pytest.approx(0.0166 * 0.94, rel=0.05) and seen / 400 == pytest.approx(0.85, abs=0.06)


@pytest.mark.parametrize("count", [3, 5, 10])
def test_the_interval_over_seeds_holds_the_truth_as_often_as_it_says(count):
    """2,000 comparisons of two methods of equal accuracy, whose models differ from seed to seed."""
    rng, held = np.random.default_rng(count), 0
    easy = np.clip(rng.normal(0.93, 0.1, 200), 0.02, 0.98)
    for _ in range(2000):
        a, b = (rng.random((count, 200)) < easy + 0.02 * rng.standard_normal((count, 1)) for _ in range(2))
        found = paired_difference(a, b, resamples=1).seeds
        held += found.low <= 0 <= found.high
    assert 0.93 <= held / 2000 <= 0.97


@pytest.mark.parametrize("count", [3, 5, 10])
def test_the_interval_over_sentences_holds_the_truth_as_often_as_it_says(count):
    """2,000 test splits of 500 sentences for the same models, of which one knows what the other does not."""
    rng, held = np.random.default_rng(count), 0
    for _ in range(2000):
        known = rng.random((count, 500)) < 0.9
        a, b = known | (rng.random((count, 500)) < 0.3), known
        found = paired_difference(a, b, resamples=300).sentences
        held += found.low <= 0.03 <= found.high
    assert 0.92 <= held / 2000 <= 0.97


ROWS = [(np.ones((2, 3)), np.ones((2, 4))), (np.ones(3), np.ones(3)), (np.ones((0, 3)),) * 2, ([[1], [1, 1]],) * 2]


@pytest.mark.parametrize("a, b", ROWS)
def test_unpaired_input_is_refused(a, b):
    with pytest.raises(ValueError, match="both must be rows of outcomes, alike in number and length"):
        paired_difference(a, b)
