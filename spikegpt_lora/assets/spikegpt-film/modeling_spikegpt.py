"""What `auto_map` in config.json names: with `trust_remote_code=True`, transformers imports this file, and with it the
package spikegpt_lora, which holds the code of these classes and makes all Auto classes know them. Where it is not
installed, transformers says `pip install spikegpt_lora`."""

from spikegpt_lora import (  # noqa: F401
    SpikeGPTConfig,
    SpikeGPTForCausalLM,
    SpikeGPTForSequenceClassification,
    SpikeGPTModel,
)
