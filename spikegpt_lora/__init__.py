"""SpikeGPT, a spiking language model, with LoRA and SpikeLoRA adapters.

Importing the package registers the model with transformers' Auto classes and SpikeLoRA with peft; it prints nothing,
compiles nothing and changes no setting of torch or logging.
"""

from .adapters import SpikeLoraConfig, SpikeLoraModel
from .checkpoint import embedded_checkpoint, load_upstream_checkpoint, save_upstream_checkpoint
from .config import SpikeGPTConfig
from .data import load_task
from .export import export_bundle
from .model import SpikeGPTForCausalLM, SpikeGPTForSequenceClassification, SpikeGPTModel, SpikeGPTState
from .trace import SpikeTrace, record_spikes
from .wkv import wkv, wkv_reference

__version__ = "0.2.0"

__all__ = [
    "SpikeGPTConfig",
    "SpikeGPTForCausalLM",
    "SpikeGPTForSequenceClassification",
    "SpikeGPTModel",
    "SpikeGPTState",
    "SpikeLoraConfig",
    "SpikeLoraModel",
    "SpikeTrace",
    "embedded_checkpoint",
    "export_bundle",
    "load_task",
    "load_upstream_checkpoint",
    "record_spikes",
    "save_upstream_checkpoint",
    "wkv",
    "wkv_reference",
]
