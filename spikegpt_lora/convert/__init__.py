"""Turning a trained model into another form of itself: spiking.py, calibrate.py, saliency.py and cost.py, spikes before
every matrix; weights.py, on int8 grids; generation.py, to write fast."""
