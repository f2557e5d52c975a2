"""SpikeLoraModel: peft's LoraModel that puts SpikeLoRA layers in, refuses to merge them before touching any, and loads
finite weights into the base model that they were trained on, nothing else."""

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..utils.inputs import require_finite
from . import sequence
from .convolution import CONVOLUTIONS, require_same_places
from .embedding import SpikeLoraEmbedding
from .fingerprint import fingerprint, require_base
from .layer import MERGE_REFUSED, SpikeLoraLinear, plain_linear
from .quantized import spiking_quantized

OTHER_LAYERS = {**CONVOLUTIONS, nn.Embedding: SpikeLoraEmbedding}  # beside linears


class SpikeLoraModel(LoraModel):
    """Injects SpikeLoRA adapters; used through `peft.get_peft_model(model, SpikeLoraConfig(...))`."""

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if config.use_spikelora:
            _refuse_tied_gates(config, target_name, current_key)
            if isinstance(base := _base(target), tuple(CONVOLUTIONS)):
                require_same_places(current_key, base, config.spikelora_time)
            if config.spikelora_time == "token":
                _refuse_two_calls(parent, target_name, current_key)
                sequence.follow(self.model)
        super()._create_and_replace(config, adapter_name, target, target_name, parent, current_key, **kwargs)

    def _spikes(self, adapter_name: str) -> bool:
        return adapter_name in self.peft_config and self.peft_config[adapter_name].use_spikelora

    def _refuse_to_merge(self, adapter_names):
        for name in adapter_names or self.active_adapters:
            if self._spikes(name):
                raise RuntimeError(MERGE_REFUSED.format(name))

    def merge_adapter(self, adapter_names=None, safe_merge=False):
        self._refuse_to_merge(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(self, merge=True, progressbar=True, safe_merge=False, adapter_names=None):
        if merge:
            self._refuse_to_merge(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def add_weighted_adapter(self, adapters, *args, **kwargs):
        self._refuse_to_merge(adapters)
        super().add_weighted_adapter(adapters, *args, **kwargs)

    def supports_lora_conversion(self, adapter_name="default"):
        return not self._spikes(adapter_name) and super().supports_lora_conversion(adapter_name)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        """What is saved; `save_pretrained` writes the configuration after it."""
        config.spikelora_base_fingerprint = fingerprint(model, adapter_name) if config.leaves_base_alone() else None
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """What is loaded, on every way that peft has."""
        require_finite(state_dict, f"weights of adapter {adapter_name!r}")
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = model.state_dict()
        if all(own[name].shape == tensor.shape for name, tensor in state_dict.items() if name in own):
            require_base(model, config, adapter_name)  # else peft says which sizes differ
        return state_dict

    @staticmethod
    def _create_new_module(lora_config, adapter_name, target, **kwargs):
        base = _base(target)
        if plain_linear(base):
            lora_config.fan_in_fan_out = transposed = isinstance(base, Conv1D)
            return SpikeLoraLinear(
                target, adapter_name, config=lora_config, is_target_conv_1d_layer=transposed, **kwargs
            )
        if kind := spiking_quantized(base) or _other_layer(base):
            return kind(target, adapter_name, config=lora_config, **kwargs)
        if lora_config.use_spikelora:
            raise ValueError(
                "SpikeLoRA adapts torch.nn.Linear, Conv1d, Conv2d, Conv3d and Embedding, transformers' Conv1D and "
                f"bitsandbytes' 4- and 8-bit linears, got {type(base).__name__} (it would silently become plain LoRA): "
                "leave it out of target_modules, or set use_spikelora=False"
            )
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)


def _base(target: nn.Module) -> nn.Module:
    return target.get_base_layer() if isinstance(target, BaseTunerLayer) else target


def _other_layer(base: nn.Module) -> type | None:
    if type(getattr(base, "weight", None)) is not nn.Parameter:  # packed
        return None
    return next((kind for plain, kind in OTHER_LAYERS.items() if isinstance(base, plain)), None)


def _refuse_tied_gates(config, target_name: str, current_key: str):
    if target_name in (getattr(config, "target_modules_to_tie", None) or ()):
        raise ValueError(
            f"{current_key} is to share the embedding's adapter, but with gates the two are no transposes of each "
            "other: set ensure_weight_tying=False"
        )


def _refuse_two_calls(parent: nn.Module, target_name: str, current_key: str):
    """DeBERTa's attention calls its projections a second time, on relative positions, which are no time steps."""
    if type(parent).__name__ != "DisentangledSelfAttention" or not getattr(parent, "relative_attention", False):
        return
    shared = ("query_proj", "key_proj") if getattr(parent, "share_att_key", True) else ()
    if target_name.startswith("pos_") or target_name in shared:
        raise ValueError(
            f"{current_key} reads DeBERTa's relative positions too, which are no time steps: leave it out of "
            "target_modules (value_proj and the dense layers remain), or use spikelora_time='pointwise'"
        )
