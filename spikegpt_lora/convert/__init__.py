"""Turning a trained model into another form of itself: weights.py, on int8 grids; generation.py, to write fast."""
