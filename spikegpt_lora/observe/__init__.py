"""Looking on while a model reads: its spikes, what its adapters do, what its operations cost."""
