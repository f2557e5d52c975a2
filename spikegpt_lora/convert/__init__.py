"""Turning a trained model into another form of itself.

spikes before every matrix     spiking.py, calibrate.py, saliency.py, cost.py
those as a chip holds them     fold.py; planes.py: as additions of bit planes
SpikeLLM's, on any model       transformers_models.py, spiking_linear.py, salient_channels.py, int_weights.py,
                               clipping.py
other weights                  weights.py, on int8 grids; generation.py, packed, to write fast
"""
