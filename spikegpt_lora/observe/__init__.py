"""Observers of a running model: its spikes, what its adapters do, what its operations cost."""
