"""The linear layer with a SpikeLoRA adapter: h = W0 x + s B (SN(A x) * A x); binary: h = W0 x + s B SN(A x); integer:
h = W0 x + s B diag(w) k(A x).

SN(A x) are the spikes of the gate (gate.py): only where unit j fires is (A x)_j, or a 1, passed to B (SpikeLoRA, eq.
5). The gate depends on the input, so no fixed weight equals the adapter: it cannot be merged.

What an adapter adds is added in place by the matrix product itself, and its gradient likewise (cuda/autograd.cpp):
beside the products nothing passes over the layer's input or output. Where somebody looks on (hooks), where the layer is
not a plain frozen one, or without the compiled kernels, it is peft's own forward.

Rests on peft's LoRA variants (`lora_variants`, new in 0.20), which peft calls private: setup.py pins the version.
"""

from collections import defaultdict

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..ops.backend import in_dtype, product_dtype, untouched, use_extension
from ..ops.folded import Folded
from ..ops.spike_linear import SpikeLinear
from . import sequence
from .gate import SpikeGate

MERGE_REFUSED = (
    "SpikeLoRA adapter {!r} cannot be merged: its gate SN(A x) depends on the input x, so no fixed weight equals it "
    "(of an embedding in pointwise time a table would, but none is written). Keep the adapter unmerged (model.unload() "
    "drops it; a plain LoRA adapter can be merged)."
)


SPIKES_MERGE_REFUSED = (
    "adapter {!r} cannot be merged: it reads integers as they are, its matrix multiplies them by a scale of each "
    "channel besides, so no change of the matrix equals it. Keep the adapter unmerged."
)


def fused(config: LoraConfig) -> LoraConfig:
    """`config`, of stock LoRA, whose adapters are added in place while the model trains: less time, the same files.

    Results are stock LoRA's but for rounding; of `SpikeLoraConfig` it is the default where it spikes, and not wanted
    where it must be stock LoRA to the bit (`use_spikelora=False`).
    """
    config._register_custom_module({nn.Linear: FusedLinear})
    return config


def plain_linear(base: nn.Module) -> bool:
    """Whether it holds one real weight: quantised linears subclass nn.Linear but hold another kind."""
    return isinstance(base, (nn.Linear, Conv1D)) and type(base.weight) is nn.Parameter


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
        gate, b = module.lora_gate[active_adapter], module.lora_B[active_adapter]
        passed, weight = gate.passed(a), gate.outwards(b.weight)
        if not _adds_nothing_else(b) or not result.dtype == passed.dtype == b.weight.dtype:
            return result + functional_call(b, {"weight": weight}, passed) * module.scaling[active_adapter]
        rows, units = result.flatten(0, -2), passed.flatten(0, -2)  # as the fused layer adds it, to the bit
        return torch.addmm(rows, units, weight.t(), alpha=module.scaling[active_adapter]).view(result.shape)

    @staticmethod
    def merge_safe(module, active_adapter, orig_weight):
        raise RuntimeError(MERGE_REFUSED.format(active_adapter))

    merge_unsafe = unmerge = merge_safe


def _adds_nothing_else(linear: nn.Module) -> bool:
    return untouched(linear, nn.Linear) and linear.bias is None


class FusedLinear(LoraLinear):
    """peft's LoRA Linear, of nn.Linear and of GPT-2's Conv1D, with the adapter added in place.

    Raises:
        ValueError: the base layer holds a packed weight (bitsandbytes): peft has layers for those.
    """

    def __init__(self, base_layer: nn.Module, *args, **kwargs) -> None:
        base = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        if not plain_linear(base):
            raise ValueError(f"a fused adapter needs a layer with one real weight, got {type(base).__name__}")
        super().__init__(base_layer, *args, **kwargs)
        self.casts = defaultdict(Folded)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x `(..., inputs)` -> `(..., outputs)`; of a `SpikeLinear` integers, and their `scale` where it takes one."""
        adapter = None if args or kwargs.keys() - {"scale"} else self._fusible(x)
        return super().forward(x, *args, **kwargs) if adapter is None else self._fused(x, adapter, **kwargs)

    def spike_parts(self, spikes: Tensor) -> tuple[SpikeLinear, Tensor, Tensor, float] | None:
        """What `IntegerNorm` reads of it in place of calling it: the base layer, what goes to B, B, and the adapter's
        scaling; None where it must be called."""
        adapter = self._fusible(spikes) if untouched(self, type(self)) else None
        if adapter is None or type(self.base_layer) is not SpikeLinear:
            return None
        dropped = in_dtype(self.lora_dropout[adapter](spikes), product_dtype(spikes))
        passed = self._passed(
            nn.functional.linear(dropped, in_dtype(self.lora_A[adapter].weight, dropped.dtype)), adapter
        )
        return self.base_layer, passed, self._outwards(adapter), self.scaling[adapter]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """As peft's.

        Raises:
            RuntimeError: the base layer reads integers.
        """
        if isinstance(self.get_base_layer(), SpikeLinear):
            raise RuntimeError(SPIKES_MERGE_REFUSED.format(adapter))
        return super().get_delta_weight(adapter)

    def _fusible(self, x: Tensor) -> str | None:
        """The adapter that may be added in place, if one alone is active and nobody looks in between."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or self.disable_adapters or self.merged or not self._fuses(names[0]):
            return None
        base, a, b = self.base_layer, self.lora_A[names[0]], self.lora_B[names[0]]
        dtype, autocast = product_dtype(x), torch.is_autocast_enabled(x.device.type)
        ours = (
            (untouched(base, nn.Linear) or untouched(base, SpikeLinear))
            and not base.weight.requires_grad
            and _adds_nothing_else(a)
            and _adds_nothing_else(b)
            and all(autocast or weight.dtype == dtype for weight in (base.weight, a.weight, b.weight))
            and use_extension("auto", x.device)
        )
        return names[0] if ours else None

    def _fuses(self, adapter: str) -> bool:
        return adapter not in self.lora_variant

    def _fused(self, x: Tensor, adapter: str, scale: Tensor | None = None) -> Tensor:
        base, dtype = self.base_layer, product_dtype(x)
        a, b = in_dtype(self.lora_A[adapter].weight, dtype), in_dtype(self._outwards(adapter), dtype)
        bias = None if base.bias is None else in_dtype(base.bias, dtype)
        dropped = in_dtype(self.lora_dropout[adapter](x), dtype)
        passed, read = torch.ops.spikegpt_lora.adapter_in(dropped, a)
        if not isinstance(self.lora_dropout[adapter], nn.Identity):
            read = in_dtype(x, dtype)
        weight = self._frozen(dtype) if scale is None else in_dtype(base.scaled(scale), dtype)
        return torch.ops.spikegpt_lora.adapter_out(
            read, weight, bias, self._passed(passed, adapter), b, self.scaling[adapter]
        )

    def _passed(self, a: Tensor, adapter: str) -> Tensor:
        return a

    def _outwards(self, adapter: str) -> Tensor:
        return self.lora_B[adapter].weight

    def _frozen(self, dtype: torch.dtype) -> Tensor:
        """W0 in the dtype that it is multiplied in: cast once, and again where it has been changed."""
        weight = self.base_layer.weight
        return weight if weight.dtype == dtype else self.casts[dtype](lambda: weight.detach().to(dtype), weight)


class SpikingLayer:
    """What every kind of layer with SpikeLoRA adapters has beside peft's own layer for that kind."""

    adapter_layer_names = LoraLayer.adapter_layer_names + ("lora_gate",)
    variant: type[LoraVariant] = SpikeLoraVariant

    @property
    def lora_variants(self):
        return {**super().lora_variants, ("use_spikelora",): self.variant}

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


class SpikeLoraLinear(SpikingLayer, FusedLinear):
    """peft's LoRA Linear, of nn.Linear and of GPT-2's Conv1D, whose adapters may spike; adapters with
    `use_spikelora=False` are plain LoRA, in peft's own forward."""

    def _fuses(self, adapter: str) -> bool:
        return type(self.lora_variant.get(adapter)) is SpikeLoraVariant

    def _passed(self, a: Tensor, adapter: str) -> Tensor:
        return self.lora_gate[adapter].passed(a)

    def _outwards(self, adapter: str) -> Tensor:
        return self.lora_gate[adapter].outwards(self.lora_B[adapter].weight)
