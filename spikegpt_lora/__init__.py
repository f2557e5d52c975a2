"""SpikeGPT, a spiking language model, with LoRA and SpikeLoRA adapters.

Importing the package registers the model with transformers' Auto classes and SpikeLoRA with peft; it prints nothing,
compiles nothing and changes no setting of torch or logging.
"""

from .adapters import SpikeLoraConfig, SpikeLoraModel
from .checkpoint import embedded_checkpoint, load_upstream_checkpoint, save_upstream_checkpoint
from .config import SpikeGPTConfig
from .export import export_bundle
from .model import SpikeGPTForCausalLM, SpikeGPTForSequenceClassification, SpikeGPTModel, SpikeGPTState
from .observe.traces import SpikeTrace, record_spikes
from .ops.wkv import wkv, wkv_reference
from .tasks.registry import load_task

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
