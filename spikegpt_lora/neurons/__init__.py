"""Neurons: what turns real currents into spikes."""
