"""Which base model an adapter belongs to. An adapter is a difference to W0: on other weights of the same sizes it gives
finite numbers that mean nothing.

Its fingerprint is a sample of W0 itself and no hash, so that a base loaded in another precision still fits: 32 weights
from fixed places in the layers that it adapts, as float32, after the precision they were read in.
"""

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

WEIGHTS = 32
PRECISIONS = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
FORM = rf"({'|'.join(PRECISIONS)}):[0-9a-f]{{{8 * WEIGHTS}}}"


def fingerprint(model: nn.Module, adapter_name: str) -> str | None:
    """Of W0 under one adapter; None where W0 cannot be seen as it is: quantised, sharded, offloaded, merged with."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and adapter_name in m.r]
    weights = [getattr(layer.get_base_layer(), "weight", None) for layer in layers]
    if not layers or any(layer.merged for layer in layers) or not all(map(_readable, weights)):
        return None
    chosen = [weights[i * len(weights) // WEIGHTS] for i in range(WEIGHTS)]
    places = [i * 2654435761 % weight.numel() for i, weight in enumerate(chosen)]  # far apart, the same for one size
    values = [weight.detach().reshape(-1)[place].float().cpu() for weight, place in zip(chosen, places)]
    precision = max((weight.dtype for weight in chosen), key=_step)
    return f"{str(precision).removeprefix('torch.')}:{torch.stack(values).numpy().astype('>f4').tobytes().hex()}"


def differences(one: str, other: str) -> int:
    """How many weights of two fingerprints differ by more than the coarser of their precisions explains."""
    names, digits = zip(*(text.split(":") for text in (one, other)))
    a, b = (np.frombuffer(bytes.fromhex(text), ">f4").astype(float) for text in digits)
    coarse = torch.finfo(max(map(PRECISIONS.get, names), key=_step))
    allowed = coarse.eps * (np.maximum(abs(a), abs(b)) + coarse.smallest_normal)
    return int((~(abs(a - b) <= allowed)).sum())


def require_base(model: nn.Module, config, adapter_name: str) -> None:
    """Raise where an adapter is loaded into another base model than it was saved with, as far as both are known.

    Raises:
        ValueError: with that base model's name, and what to do where it is meant.
    """
    saved, found = config.spikelora_base_fingerprint, fingerprint(model, adapter_name)
    if saved and found and (different := differences(saved, found)):
        base = config.base_model_name_or_path or "which has no name"
        raise ValueError(
            f"adapter {adapter_name!r} belongs to another base model ({base}): {different} of {WEIGHTS} weights under "
            "it are not those it was trained on. Load that one; or, if this is meant, set "
            "spikelora_base_fingerprint to null in its adapter_config.json"
        )


def _readable(weight) -> bool:
    real = type(weight) is nn.Parameter and weight.dim() > 1 and weight.numel() > 0 and not weight.is_meta
    return real and weight.dtype in PRECISIONS.values()


def _step(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
