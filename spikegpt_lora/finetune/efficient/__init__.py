"""Callbacks of a stock Trainer that make a step of fine-tuning cheaper: equations and verdicts in README.md."""

from .backward import DropBackward
from .channels import SparseChannels, SparseConfig
from .skip import SkipBatches
from .trunk import CachedTrunk, CountsCollator, cached_trunk

__all__ = [
    "CachedTrunk",
    "CountsCollator",
    "DropBackward",
    "SkipBatches",
    "SparseChannels",
    "SparseConfig",
    "cached_trunk",
]
