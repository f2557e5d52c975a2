"""Paired comparisons between methods that were run on the same seeds and tested on the same sentences."""

from dataclasses import dataclass

import numpy as np


@dataclass
class PairedDifference:
    """Accuracy of a minus accuracy of b, in points of 1.

    difference: mean over seeds and sentences; low, high: 95 % bootstrap interval over sentences and, where there are
    several, over seeds; per_seed: each seed's difference. `is_noise`: the interval holds 0.
    """

    difference: float
    low: float
    high: float
    per_seed: list[float]

    @property
    def is_noise(self) -> bool:
        return self.low <= 0 <= self.high


def paired_difference(correct_a, correct_b, resamples: int = 2000, seed: int = 0) -> PairedDifference:
    """Compare two methods by their per-sentence outcomes.

    Args:
        correct_a, correct_b: `(seeds, sentences)`, 1 where the prediction was right; same seeds, same sentences.
        resamples: bootstrap resamples. Seeds and sentences are drawn on their own: a sentence keeps all its seeds, a
            seed all its sentences, in both methods. With few seeds the interval is on the narrow side.

    Raises:
        ValueError: shapes differ or are empty.
    """
    a, b = np.asarray(correct_a, dtype=float), np.asarray(correct_b, dtype=float)
    if a.shape != b.shape or a.ndim != 2 or a.size == 0:
        raise ValueError(f"both must be (seeds, sentences) of one shape and not empty, got {a.shape} and {b.shape}")
    difference, (seeds, sentences) = a - b, a.shape
    rng = np.random.default_rng(seed)
    # A resample is how often each sentence, and how often each seed, was drawn.
    of_sentences = rng.multinomial(sentences, np.full(sentences, 1 / sentences), size=resamples)
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    means = (of_sentences @ difference.T * of_seeds).sum(axis=1) / (seeds * sentences)
    low, high = np.quantile(means, [0.025, 0.975])
    return PairedDifference(float(difference.mean()), float(low), float(high), difference.mean(axis=1).tolist())
