"""Programs to be read from top to bottom, and run: `python recipes/NAME.py`, `python -m spikegpt_lora.recipes.NAME`."""
