"""QLoRA: SpikeLoRA on the 4-bit and 8-bit linears of bitsandbytes, which is loaded only where a model holds some.

peft's own layers for these choose their variant by a fixed list that knows no gate: without the classes here a spiking
adapter would silently be a plain one.
"""

from functools import cache

from peft import LoraConfig
from torch import nn

from .layer import SpikeLoraVariant, SpikingLayer


def spiking_quantized(base: nn.Module) -> type | None:
    """The layer class for `base`, None where it is no linear of bitsandbytes."""
    kinds = {kind.__name__ for kind in type(base).__mro__ if kind.__module__.split(".")[0] == "bitsandbytes"}
    return next((_spiking(name) for name in ("Linear4bit", "Linear8bitLt") if name in kinds), None)


@cache
def _spiking(name: str) -> type:
    from peft.tuners.lora import bnb

    plain = getattr(bnb, name)

    class Spiking(SpikingLayer, plain):
        def resolve_lora_variant(self, *, config: LoraConfig, **kwargs):
            return SpikeLoraVariant() if config.use_spikelora else super().resolve_lora_variant(config=config, **kwargs)

    Spiking.__name__ = Spiking.__qualname__ = f"SpikeLora{name}"
    return Spiking
