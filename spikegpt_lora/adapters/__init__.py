"""SpikeLoRA as a peft method: importing this package makes `peft` know the type SPIKELORA, and stock LoRA know which
modules of a SpikeGPT to adapt."""

from peft.tuners.lora import LoraModel
from peft.utils import register_peft_method

from .config import PRESETS, SpikeLoraConfig
from .gate import SpikeGate
from .layer import SpikeLoraLinear, fused
from .model import SpikeLoraModel
from .sparsity import SparsityCallback, SparsityController, calibrate_thresholds

__all__ = [
    "SparsityCallback",
    "SparsityController",
    "SpikeGate",
    "SpikeLoraConfig",
    "SpikeLoraLinear",
    "SpikeLoraModel",
    "calibrate_thresholds",
    "fused",
]

register_peft_method(name="spikelora", config_cls=SpikeLoraConfig, model_cls=SpikeLoraModel, prefix="lora_")
LoraModel.target_module_mapping["spikegpt"] = PRESETS["rkv+srffn"]
