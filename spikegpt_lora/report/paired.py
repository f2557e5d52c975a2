"""Paired comparisons between methods that were run on the same seeds and tested on the same sentences.

A difference may be nothing but noise of two kinds, and each has an interval of its own:

    training noise    other seeds would have given other models: t interval on the differences of the seeds
    test-set noise    other sentences would have tested them: bootstrap over sentences of the mean over seeds

It is found where both exclude 0, with Holm's correction for as many comparisons as are made (`holm`); with one seed
nothing is known of training noise, so nothing is found. Where folds take the place of seeds, each tests sentences of
its own, and their training sentences overlap: the t interval is that of Nadeau & Bengio (2003, eq. 8).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import stats

POWER = 0.8  # with which a difference of the detectable size is seen


class Interval(NamedTuple):
    """Of 95 %."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of a minus accuracy of b, as fractions of 1.

    difference: mean over seeds and sentences. per_seed: each seed's, or each fold's.
    seeds, sentences: intervals over either; the first is None with one seed, and so is p_seeds.
    p_seeds, p_sentences: two-sided, of a difference of 0: by t, and by exact McNemar where each sentence was tested
        once, else by t over sentences.
    detectable: the difference that would have been seen in 80 of 100 such comparisons, in both ways; None with one
        seed.
    """

    difference: float
    per_seed: list[float]
    seeds: Interval | None
    sentences: Interval
    p_seeds: float | None
    p_sentences: float
    detectable: float | None

    @property
    def low(self) -> float:
        """Of both intervals the lower end."""
        return min(interval.low for interval in (self.seeds, self.sentences) if interval)

    @property
    def high(self) -> float:
        return max(interval.high for interval in (self.seeds, self.sentences) if interval)

    @property
    def p(self) -> float:
        """Of both: it is below a level only where both are; 1 with one seed."""
        return 1.0 if self.p_seeds is None else max(self.p_seeds, self.p_sentences)


def paired_difference(
    correct_a: Sequence, correct_b: Sequence, folds: bool = False, resamples: int = 2000, seed: int = 0
) -> PairedDifference:
    """Compare two methods by their per-sentence outcomes.

    Args:
        correct_a, correct_b: a row a seed, 1 where the prediction was right; same seeds, same sentences.
        folds: each row is of sentences of its own; else all rows are of the same ones.
        resamples, seed: of the bootstrap.

    Raises:
        ValueError: rows differ in number or length, or are empty.
    """
    a, b = ([np.asarray(row, dtype=float) for row in rows] for rows in (correct_a, correct_b))
    shapes = [[row.shape for row in rows] for rows in (a, b)]
    alike = folds or len(set(shapes[0])) == 1
    if shapes[0] != shapes[1] or not a or not alike or any(len(shape) != 1 or shape == (0,) for shape in shapes[0]):
        raise ValueError(
            f"both must be rows of outcomes, alike in number and length and not empty, got {shapes[0]} and {shapes[1]}"
        )
    rows = [mine - its for mine, its in zip(a, b)]
    of_seeds = np.array([row.mean() for row in rows])
    of_sentences = np.concatenate(rows) if folds else np.mean(rows, axis=0)
    once = folds or len(rows) == 1
    error = of_sentences.std(ddof=1) / np.sqrt(len(of_sentences)) if len(of_sentences) > 1 else 0.0
    seeds, p_seeds, detectable = _over_seeds(of_seeds, folds, error)
    return PairedDifference(
        difference=float(of_sentences.mean()),
        per_seed=of_seeds.tolist(),
        seeds=seeds,
        sentences=_over_sentences(of_sentences, resamples, seed),
        p_seeds=p_seeds,
        p_sentences=mcnemar(of_sentences) if once else _p(of_sentences.mean(), error, len(of_sentences) - 1),
        detectable=detectable,
    )


def seeds_interval(differences: Sequence[float]) -> Interval | None:
    """Of the mean of a difference by seed, of any measure (t); None with one seed."""
    return _over_seeds(np.asarray(differences), folds=False, error=0.0)[0]


def _over_seeds(
    differences: np.ndarray, folds: bool, error: float
) -> tuple[Interval | None, float | None, float | None]:
    """Interval, p and what is detectable; `error`: standard error over sentences."""
    count = len(differences)
    if count == 1:
        return None, None, None
    overlap = 1 / (count - 1) if folds else 0.0  # test over training sentences
    of_seeds, freedom = differences.std(ddof=1) * np.sqrt(1 / count + overlap), count - 1
    mean, half = differences.mean(), stats.t.ppf(0.975, freedom) * of_seeds
    seen = (stats.t.ppf(0.975, freedom) + stats.t.ppf(POWER, freedom)) * of_seeds
    seen = max(seen, (stats.norm.ppf(0.975) + stats.norm.ppf(POWER)) * error)
    return Interval(float(mean - half), float(mean + half)), _p(mean, of_seeds, freedom), float(seen)


def _p(mean: float, error: float, freedom: int) -> float:
    if error == 0 or freedom < 1:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, freedom))


def _over_sentences(differences: np.ndarray, resamples: int, seed: int) -> Interval:
    count = len(differences)
    low, high = np.quantile(_drawn(count, resamples, seed) @ differences / count, [0.025, 0.975])
    return Interval(float(low), float(high))


@lru_cache(maxsize=1)  # the comparisons of one table
def _drawn(count: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of `count` sentences was drawn, `(resamples, count)`."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float32)


def mcnemar(differences: np.ndarray) -> float:
    """Exact, two-sided: p of as uneven a share of the sentences on which one of the two was right alone.

    Args:
        differences: 1, 0 or -1 a sentence.
    """
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    return 1.0 if better + worse == 0 else float(stats.binomtest(better, better + worse).pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """`ps` corrected for their number (Holm 1979): below a level with a probability of at most that level where all of
    them are noise."""
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(np.argsort(ps, kind="stable")):
        largest = max(largest, (len(ps) - rank) * ps[place])
        corrected[place] = min(1.0, largest)
    return corrected
