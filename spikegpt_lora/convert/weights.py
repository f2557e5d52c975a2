"""Weights on a grid of int8 times a power of two, and a model that holds them."""

import copy

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from .fold import FoldedLinear, fold_scales

WEIGHTS = ("float32", "int8")
MATRICES = (nn.Linear, FoldedLinear)  # not those that pack their weights


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """A matrix as int8 in [-127, 127] times a power of two, the smallest that lets its largest value in.

    Products with such numbers are exact in float32, and a power of two is a shift on a chip.
    """
    largest = float(np.abs(weight).max())
    scale = np.float32(2.0 ** np.ceil(np.log2(largest / 127.0))) if largest else np.float32(1)
    return np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale


def quantized_copy(model: nn.Module, weights: str = "float32") -> nn.Module:
    """A copy in evaluation mode whose weights are exactly what the bundle holds: an adapter's scaling in its B, what
    integer spikes stand for in the matrices that read them, and with "int8" every matrix on its grid.

    Raises:
        ValueError: parameters that are not float32.
    """
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    if other := {str(dtype).removeprefix("torch.") for dtype in floating} - {"float32"}:
        raise ValueError(
            f"a bundle holds float32, and LIF membranes kept in {', '.join(sorted(other))} are rounded at every step: "
            "call model.float() first, and see that its accuracy is still what you want"
        )
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLayer) and isinstance(module.lora_B, nn.ModuleDict):  # AdaLoRA's is none
                for adapter, b in module.lora_B.items():
                    weight = b.get_parameter("weight").mul_(module.scaling[adapter])
                    module.scaling[adapter] = 1.0
                    if adapter in (gates := getattr(module, "lora_gate", {})):
                        weight.copy_(gates[adapter].outwards(weight))
                        gates[adapter].worth_in_b = True
        fold_scales(model)
        for module in model.modules():
            if isinstance(module, nn.Linear) and type(module) in MATRICES and weights == "int8":
                grid, scale = quantize(module.weight.cpu().numpy())
                module.weight.copy_(torch.from_numpy(grid * scale))
    return model
