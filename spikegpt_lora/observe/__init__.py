"""Observers of a running model: its spikes, what its adapters do, what its matrices read, what its operations cost."""
