"""Sentences as a bundle has them, left-aligned, and in groups of like length."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from ..observe.traces import real_first


def left_aligned(batch: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """input_ids `(B, T)` with the real tokens in front and 0 behind, and lengths `(B,)`."""
    mask, front = real_first(batch)
    return (batch["input_ids"].cpu() * mask).gather(1, front).numpy(), mask.sum(1).numpy()


def by_length(lengths: np.ndarray, size: int = 32) -> Iterator[np.ndarray]:
    """Sentences in groups of `size` and of like length, as row numbers."""
    order = np.argsort(lengths, kind="stable")
    yield from (order[start : start + size] for start in range(0, len(order), size))


def batch_of(ids: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Some of the sentences of `left_aligned` as a model takes them, cut to the longest of them."""
    T = int(lengths[rows].max())
    mask = torch.arange(T) < torch.from_numpy(lengths[rows])[:, None]
    return {"input_ids": torch.from_numpy(ids[rows, :T]), "attention_mask": mask.long()}
