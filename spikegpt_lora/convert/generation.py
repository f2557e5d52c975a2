"""A language model's matrices held in fewer bytes, for generation: a token reads every weight once, and hardly anything
else takes time. Activations, sums and states stay float32.

    model, tokenizer = load_language_model("runs/pretrain/model")
    pack_weights(model, "int8").generate(...)
"""

from typing import cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..model import SpikeGPTForCausalLM
from ..ops.packed_linear import PackedLinear

WEIGHTS = ("bfloat16", "int8")


def pack(weight: Tensor, weights: str) -> tuple[Tensor, Tensor | None]:
    """A matrix `(outputs, inputs)` as `packed_linear` takes it, and its scale `(outputs,)` or None.

    int8: the whole number in [-127, 127] that is nearest to weight / scale, the largest of each row at 127; a row of
    zeros has scale 1. bfloat16: rounded to nearest.

    Raises:
        ValueError: `weights` is none of WEIGHTS.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    if weights != "int8":
        return weight.to(getattr(torch, weights)), None
    largest = weight.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


@torch.no_grad()
def pack_weights(model: SpikeGPTForCausalLM, weights: str) -> SpikeGPTForCausalLM:
    """`model` with all its matrices packed, the head too but not the embedding, of which a token reads one row; changed
    in place, matrix by matrix, and frozen: nothing of it has a gradient from then on.

    Args:
        model: in evaluation mode and float32.
        weights: one of WEIGHTS.

    Raises:
        ValueError: another kind of model, one that is training, adapters that are not merged, integer spikes before
            its matrices, matrices that are not float32, or `weights` is none of WEIGHTS.
    """
    if not isinstance(model, SpikeGPTForCausalLM) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise ValueError(
            f"weights are packed of a SpikeGPTForCausalLM without adapters, got a {type(model).__name__} with other "
            "modules: of a peft model, pack what merge_and_unload() returns"
        )
    if model.config.matrix_spikes != "none":
        raise ValueError(
            "packed weights are for matrices that read real numbers, and this model's read integer spikes: it is not "
            "packed; run it as it is"
        )
    if model.training:
        raise ValueError("packed weights cannot be trained: call model.eval() first")
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name, module in linears:
        if type(module.weight) is not nn.Parameter or module.weight.dtype != torch.float32 or module.bias is not None:
            raise ValueError(
                f"{name} must be a float32 matrix without bias to be packed, got {module}: call model.float()"
            )
    for name, module in linears:
        model.set_submodule(name, PackedLinear(*pack(module.weight, weights)))
    return cast(SpikeGPTForCausalLM, model.requires_grad_(False))
