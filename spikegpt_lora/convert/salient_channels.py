"""Which input channels of a linear layer get more spikes: SpikeLLM's optimal brain spiking, and what it is judged by.

    first-order   mean over tokens of x_c (W^T W x)_c: the paper's score, its sign kept, as in its code
    absolute      mean over tokens of |x_c (W^T W x)_c|: the same without cancelling
    magnitude     max over tokens of |x_c|
    random        nothing of the model

Source: Xing et al. 2024, arXiv 2407.04752, theorem 1. The score is a heuristic: with respect to the layer's output, the
gradient of its squared error is twice the error that rounding makes, not W x, which the proof puts in its place.
"""

import torch
from torch import Tensor

SCORES = ("first-order", "absolute", "magnitude", "random")


def scores_of(rows: Tensor, weight: Tensor, score: str, generator: torch.Generator | None = None) -> Tensor:
    """A number a channel, the higher the more salient.

    Args:
        rows: tokens of the layer's input `(N, inputs)`.
        weight: `(outputs, inputs)`.
        score: one of SCORES.
        generator: of "random".

    Raises:
        ValueError: another score.
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    if score == "random":
        return torch.rand(weight.shape[1], generator=generator)
    if score == "magnitude":
        return rows.abs().amax(0)
    products = rows * (rows @ weight.T @ weight)
    return products.mean(0) if score == "first-order" else products.abs().mean(0)


def salient(scores: Tensor, share: float) -> Tensor:
    """The `share` of the channels with the highest scores `(channels,)`, as bool; at least one if share is above 0."""
    count = max(1, round(share * len(scores))) if share > 0 else 0
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[scores.argsort(descending=True, stable=True)[:count]] = True
    return chosen
