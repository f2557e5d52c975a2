"""The linear layer with a SpikeLoRA adapter: h = W0 x + s B (SN(A x) * A x).

SN(A x) are the spikes of one LIF step from rest at each token (SpikeLoRA, eq. 5; authors' library, one reset per
forward): unit j fires where (A x)_j >= tau * V_theta, and only then is (A x)_j passed to B. The gate depends on the
input, so no fixed weight equals the adapter: it cannot be merged.

Rests on peft's LoRA variants (`lora_variants`, new in 0.20), which peft calls private: setup.py pins the version.
"""

from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from ..spikes import LIF

MERGE_REFUSED = (
    "SpikeLoRA adapter {!r} cannot be merged: its gate SN(A x) depends on the input x, so no fixed weight equals it. "
    "Keep the adapter unmerged (model.unload() drops it; a plain LoRA adapter can be merged)."
)


class SpikeGate(LIF):
    """SN: one LIF step from rest for every token and unit on its own."""

    def forward(self, a: Tensor) -> Tensor:
        """Spikes (0 or 1) `(..., r)` for the activations a = A x `(..., r)`."""
        return super().forward(a.reshape(1, 1, -1)).view_as(a)  # nothing couples tokens or units


class SpikeLoraVariant(LoraVariant):
    """What a spiking adapter does differently from a plain one, in peft's terms."""

    def supports_lora_conversion(self) -> bool:
        return False

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, config, **kwargs):
        module.lora_gate[adapter_name] = SpikeGate(
            tau=config.spikelora_tau,
            v_threshold=config.spikelora_v_threshold,
            surrogate_alpha=config.spikelora_surrogate_alpha,
        )

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        a = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        gated = module.lora_gate[active_adapter](a) * a
        return result + module.lora_B[active_adapter](gated) * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module, active_adapter, orig_weight):
        raise RuntimeError(MERGE_REFUSED.format(active_adapter))

    merge_unsafe = unmerge = merge_safe


class SpikeLoraLinear(LoraLinear):
    """peft's LoRA Linear whose adapters may spike; adapters with `use_spikelora=False` are plain LoRA."""

    other_param_names = LoraLinear.other_param_names + ("lora_gate",)

    @property
    def lora_variants(self):
        return {**super().lora_variants, ("use_spikelora",): SpikeLoraVariant}

    def update_layer(self, *args, **kwargs):
        if not hasattr(self, "lora_gate"):
            self.lora_gate = nn.ModuleDict({})
        super().update_layer(*args, **kwargs)

    def get_delta_weight(self, adapter: str) -> Tensor:
        if adapter in self.lora_gate:
            raise RuntimeError(MERGE_REFUSED.format(adapter))
        return super().get_delta_weight(adapter)
