"""Sentences as a bundle has them, left-aligned, and in groups of like length."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from ..forward import real_first


def left_aligned(batch: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """input_ids `(B, T)` with the real tokens in front and 0 behind, and lengths `(B,)`."""
    mask, front = real_first(batch)
    return (batch["input_ids"].cpu() * mask).gather(1, front).numpy(), mask.sum(1).numpy()


def by_length(lengths: np.ndarray, size: int = 32) -> Iterator[np.ndarray]:
    """Sentences in groups of `size` and of like length, as row numbers."""
    order = np.argsort(lengths, kind="stable")
    yield from (order[start : start + size] for start in range(0, len(order), size))


def batches_by_length(batch: Mapping, size: int = 32) -> list[tuple[np.ndarray, dict[str, torch.Tensor]]]:
    """Sentences in groups of like length, as row numbers and as a model takes them: left-aligned, cut to the longest.

    Args:
        batch: input_ids `(B, T)`, attention_mask. size: of a group, at most.

    Returns:
        of each group rows `(b,)`, and input_ids and attention_mask `(b, longest)`.
    """
    (ids, lengths), groups = left_aligned(batch), []
    for rows in by_length(lengths, size):
        T = int(lengths[rows].max())
        mask = torch.arange(T) < torch.from_numpy(lengths[rows])[:, None]
        groups.append((rows, {"input_ids": torch.from_numpy(ids[rows, :T]), "attention_mask": mask.long()}))
    return groups
