"""The linear layer with a SpikeLoRA adapter: h = W0 x + s B (SN(A x) * A x); binary: h = W0 x + s B SN(A x).

SN(A x) are the spikes of the gate (gate.py): only where unit j fires is (A x)_j, or a 1, passed to B (SpikeLoRA, eq.
5). The gate depends on the input, so no fixed weight equals the adapter: it cannot be merged.

Rests on peft's LoRA variants (`lora_variants`, new in 0.20), which peft calls private: setup.py pins the version.
"""

from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from . import sequence
from .gate import SpikeGate

MERGE_REFUSED = (
    "SpikeLoRA adapter {!r} cannot be merged: its gate SN(A x) depends on the input x, so no fixed weight equals it. "
    "Keep the adapter unmerged (model.unload() drops it; a plain LoRA adapter can be merged)."
)


class SpikeLoraVariant(LoraVariant):
    """What a spiking adapter does differently from a plain one, in peft's terms."""

    def supports_lora_conversion(self) -> bool:
        return False

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config, **kwargs):
        module.lora_gate[adapter_name] = config.gate(module.r[adapter_name], adapter_name)

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        a = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        passed = module.lora_gate[active_adapter].passed(a)
        return result + module.lora_B[active_adapter](passed) * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module, active_adapter, orig_weight):
        raise RuntimeError(MERGE_REFUSED.format(active_adapter))

    merge_unsafe = unmerge = merge_safe


class SpikingLayer:
    """What every kind of linear with SpikeLoRA adapters has beside peft's own layer for that kind."""

    adapter_layer_names = LoraLinear.adapter_layer_names + ("lora_gate",)

    def update_layer(self, *args, **kwargs):
        if not hasattr(self, "lora_gate"):
            self.lora_gate = nn.ModuleDict({})
        super().update_layer(*args, **kwargs)

    def active_gates(self) -> list[SpikeGate]:
        """The gates that a forward would ask now."""
        if self.disable_adapters:
            return []
        return [self.lora_gate[name] for name in self.active_adapters if name in self.lora_gate]

    def _mixed_batch_forward(self, x: Tensor, *args, adapter_names: list[str], **kwargs) -> Tensor:
        with sequence.mixed(adapter_names):
            return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        if adapter in self.lora_gate:
            raise RuntimeError(MERGE_REFUSED.format(adapter))
        return super().get_delta_weight(adapter)


class SpikeLoraLinear(SpikingLayer, LoraLinear):
    """peft's LoRA Linear, of nn.Linear and of GPT-2's Conv1D, whose adapters may spike; adapters with
    `use_spikelora=False` are plain LoRA."""

    @property
    def lora_variants(self):
        return {**super().lora_variants, ("use_spikelora",): SpikeLoraVariant}
