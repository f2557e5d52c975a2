"""SpikeLoRA with AdaLoRA's rank allocation: h = W0 x + s B (E * (SN(A x) * A x)).

SpikeLoRA's eq. 5 gates what the first factor gives, A x, before it meets B. AdaLoRA writes the update as B diag(E) A,
and there are two places for the gate. Here it stands on A x, before the singular values E. Behind them, on E A x, it
would never open: E starts at 0, so E A x is 0, below every threshold, and both terms of the gradient are 0 with it.
"""

from dataclasses import dataclass

from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraModel, SVDLinear
from torch import Tensor, nn

from ..utils.checks import check
from .config import SpikeLoraConfig, add_peft_type
from .layer import SpikingLayer
from .model import SpikingTuner, plain_linear

SPIKEADALORA = add_peft_type("SPIKEADALORA")


@dataclass
class SpikeAdaLoraConfig(SpikeLoraConfig, AdaLoraConfig):
    """Configuration of SpikeLoRA with AdaLoRA: the fields of both, for nn.Linear.

    A starts smaller than LoRA's, N(0, 0.02^2): |A x| is about 0.02 sqrt(d) at first, so a threshold of 0.1, which suits
    LoRA, is high for a narrow model (`calibrate_thresholds` finds one).

    Raises:
        ValueError: as SpikeLoraConfig and AdaLoraConfig; use_spikelora=False (that is peft's AdaLoraConfig); settings
            learned by rank, for ranks that may be pruned.
    """

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = SPIKEADALORA
        check(
            self,
            [
                ("use_spikelora", "True (peft's AdaLoraConfig is the plain one)", self.use_spikelora),
                ("spikelora_per_rank", "False where ranks are pruned", not self.spikelora_per_rank),
            ],
        )


class SpikeSVDLinear(SpikingLayer, SVDLinear):
    """peft's AdaLoRA linear with a gate on A x."""

    adapter_layer_names = SVDLinear.adapter_layer_names + ("lora_gate",)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: SpikeAdaLoraConfig, **kwargs):
        if not hasattr(self, "lora_gate"):
            self.lora_gate = nn.ModuleDict({})
        self.lora_gate[adapter_name] = config.gate(r, adapter_name)
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            narrow = self._cast_input_dtype(x, self.lora_A[name].dtype)
            a = self.lora_dropout[name](narrow) @ self.lora_A[name].T
            added = (self.lora_gate[name].passed(a) * self.lora_E[name].T) @ self.lora_B[name].T
            result = result + added * self.scaling[name] / (self.ranknum[name] + 1e-5)
        return result


class SpikeAdaLoraModel(SpikingTuner, AdaLoraModel):
    """Injects them; used through `peft.get_peft_model(model, SpikeAdaLoraConfig(...))`."""

    @staticmethod
    def _create_new_module(lora_config, adapter_name, target, device_map=None, **kwargs):
        if not plain_linear(target):
            raise ValueError(
                f"SpikeLoRA with AdaLoRA adapts torch.nn.Linear, got {type(target).__name__}: leave it out of "
                "target_modules"
            )
        return SpikeSVDLinear(target, adapter_name, config=lora_config, **kwargs)

    def resize_modules_by_rank_pattern(self, rank_pattern, adapter_name):
        super().resize_modules_by_rank_pattern(rank_pattern, adapter_name)
        for module in self.model.modules():
            if isinstance(module, SpikeSVDLinear) and adapter_name in module.lora_gate:
                module.lora_gate[adapter_name].units = len(module.lora_A[adapter_name])
