"""Neuromorphic export: a classifier as a bundle of files (`bundle.py`), and proof that they are right (`check.py`)."""

from .bundle import Bundle, export_bundle
from .check import check_bundle
from .events import EventDataset, to_tonic

__all__ = ["Bundle", "EventDataset", "check_bundle", "export_bundle", "to_tonic"]
