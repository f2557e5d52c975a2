"""SpikeGPT, a spiking language model, with LoRA and SpikeLoRA adapters.

Importing the package registers the model with transformers' Auto classes and SpikeLoRA with peft; it prints nothing,
compiles nothing and changes no setting of torch or logging.
"""

from .adapters import SparsityCallback, SpikeLoraConfig, SpikeLoraModel, calibrate_thresholds
from .checkpoint import embedded_checkpoint, load_upstream_checkpoint, save_upstream_checkpoint
from .config import SpikeGPTConfig
from .export import export_bundle
from .model import SpikeGPTForCausalLM, SpikeGPTForSequenceClassification, SpikeGPTModel, SpikeGPTState
from .observe.adapters import observe_adapters
from .observe.operations import count_operations
from .observe.traces import SpikeTrace, record_spikes
from .ops.wkv import wkv, wkv_reference
from .tasks.registry import load_task

__version__ = "0.3.0.dev0"

__all__ = [
    "SparsityCallback",
    "SpikeGPTConfig",
    "SpikeGPTForCausalLM",
    "SpikeGPTForSequenceClassification",
    "SpikeGPTModel",
    "SpikeGPTState",
    "SpikeLoraConfig",
    "SpikeLoraModel",
    "SpikeTrace",
    "calibrate_thresholds",
    "count_operations",
    "embedded_checkpoint",
    "export_bundle",
    "load_task",
    "load_upstream_checkpoint",
    "observe_adapters",
    "record_spikes",
    "save_upstream_checkpoint",
    "wkv",
    "wkv_reference",
]
