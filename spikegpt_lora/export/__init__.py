"""Neuromorphic export: a classifier as a bundle of files (`bundle.py`), and proof that they are right (`check.py`)."""

from .bundle import Bundle
from .check import check_bundle
from .events import AddressEventDataset, EventDataset, to_tonic
from .write import export_bundle

__all__ = ["AddressEventDataset", "Bundle", "EventDataset", "check_bundle", "export_bundle", "to_tonic"]
