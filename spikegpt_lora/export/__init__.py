"""Neuromorphic export: a classifier as a bundle of files (`bundle.py`), and proof that they are right (`check.py`)."""

from ..convert.weights import WEIGHTS
from .bundle import Bundle
from .check import check_bundle
from .events import AddressEventDataset, EventDataset, to_tonic
from .pictures import draw_all
from .results import summary, write_results
from .sentences import batches_by_length
from .write import export_bundle, first_difference

__all__ = [
    "AddressEventDataset",
    "Bundle",
    "EventDataset",
    "WEIGHTS",
    "batches_by_length",
    "check_bundle",
    "draw_all",
    "export_bundle",
    "first_difference",
    "summary",
    "to_tonic",
    "write_results",
]
