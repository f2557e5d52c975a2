"""Paired comparisons between methods that were run on the same seeds and tested on the same sentences."""

from dataclasses import dataclass

import numpy as np


@dataclass
class PairedDifference:
    """Accuracy of a minus accuracy of b, in points of 1.

    difference: mean over seeds and sentences; low, high: 95 % bootstrap interval over sentences; per_seed: each seed's
    difference. `is_noise`: the interval holds 0.
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
        resamples: bootstrap resamples of the sentences (a sentence keeps all its seeds, in both methods).

    Raises:
        ValueError: shapes differ or are empty.
    """
    a, b = np.asarray(correct_a, dtype=float), np.asarray(correct_b, dtype=float)
    if a.shape != b.shape or a.ndim != 2 or a.size == 0:
        raise ValueError(f"both must be (seeds, sentences) of one shape and not empty, got {a.shape} and {b.shape}")
    by_sentence = (a - b).mean(axis=0)
    # Resampling sentences is drawing how often each value occurs: exact, and small even for many sentences.
    values, counts = np.unique(by_sentence, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(by_sentence), counts / counts.sum(), size=resamples)
    means = draws @ values / len(by_sentence)
    low, high = np.quantile(means, [0.025, 0.975])
    return PairedDifference(float(by_sentence.mean()), float(low), float(high), (a - b).mean(axis=1).tolist())
