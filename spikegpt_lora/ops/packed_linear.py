"""A linear layer whose matrix is held in few bytes, for generation: one token reads every weight once, so that reading
them is nearly all of its time.

    y = scale * (x W^T)         W float32, bfloat16 or int8; the activations and the sum float32; scale one an output
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from .backend import bind, untouched, use_extension

FEW = 8  # rows of x up to which the kernel is faster than unpacking W for a matrix product


def packed_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, backend: str = "auto") -> Tensor:
    """x `(..., inputs)` times the transpose of a packed matrix; it has no gradient.

    For up to FEW rows of x on the CPU the matrix is read as it is held; for more, and on other devices, it is unpacked
    for the length of the call.

    Args:
        x: float32.
        weight: `(outputs, inputs)`, float32, bfloat16 or int8.
        scale: `(outputs,)`, float32; None: 1.
        backend: as in `wkv`; "extension" is the kernel for any number of rows.

    Returns:
        `(..., outputs)`, float32.

    Raises:
        ValueError: x is to have a gradient, or is not float32; a shape, a dtype or the backend does not fit.
        ExtensionError: backend is "extension" and it cannot be built here.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "packed weights have no gradient, got an input that requires one: train the model before it is packed, or "
            "run this under torch.no_grad()"
        )
    few = x.device.type == "cpu" and x.numel() <= FEW * weight.shape[-1]
    if backend == "extension" or (backend == "auto" and few):
        if x.device.type != "cpu":
            raise ValueError(f"packed_linear has a kernel for the CPU alone, got an input on {x.device}")
        if use_extension(backend, x.device):
            return torch.ops.spikegpt_lora.packed_linear(x, weight, scale)
    return packed_linear_reference(x, weight, scale)


def packed_linear_reference(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """`packed_linear` in plain torch: the definition that the kernel is compared with."""
    if x.dtype != torch.float32:
        raise ValueError(f"packed_linear: x must be float32, got {x.dtype}")
    y = nn.functional.linear(x, weight.to(x.dtype))
    return y if scale is None else y * scale


class PackedLinear(nn.Module):
    """A linear layer without bias or gradient whose matrix is held packed.

    Buffers: weight `(outputs, inputs)`, float32, bfloat16 or int8; scale `(outputs,)`, float32, of an int8 one. They
    move to a device with the model; a GPU unpacks them at every call. They are neither saved nor loaded: no file has
    them.

    Args:
        weight, scale: as in `packed_linear`.
    """

    weight: Tensor
    scale: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """x `(..., inputs)`, float32 -> `(..., outputs)`."""
        return packed_linear(x, self.weight, self.scale)

    def extra_repr(self) -> str:
        outputs, inputs = self.weight.shape
        return f"in_features={inputs}, out_features={outputs}, weights={str(self.weight.dtype).removeprefix('torch.')}"

    def _save_to_state_dict(self, *args, **kwargs):
        raise ValueError(
            "packed weights are not saved: save the model before pack_weights, and pack it when it is loaded"
        )

    def _load_from_state_dict(self, *args, **kwargs):
        raise ValueError("weights cannot be loaded into packed ones: load them into the model before pack_weights")


def few_rows(x: Tensor) -> bool:
    """Whether the kernels for few rows read x: float32 on the CPU, without autocast, and nobody wants a gradient."""
    few = x.numel() <= FEW * x.shape[-1] and x.is_cpu and x.dtype == torch.float32
    if not few or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return use_extension("auto", x.device)


def is_matrix(linear: nn.Module) -> bool:
    """Whether it does nothing but multiply by its weight."""
    if type(linear) is PackedLinear:
        return untouched(linear, PackedLinear)
    own = cast(dict[str, Any], linear._parameters)
    return untouched(linear, nn.Linear) and own["bias"] is None and own["weight"].dtype == torch.float32


def matrix_product(linear: nn.Module, x: Tensor) -> Tensor:
    """`linear(x)`; of few rows by the kernel, which reads the matrix with all threads, where torch takes one."""
    if type(linear) is nn.Linear and few_rows(x) and is_matrix(linear):
        return torch.ops.spikegpt_lora.packed_linear(x, linear.weight, None)
    return linear(x)


@bind
def _bind() -> None:
    def fake(x, weight, scale):
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    torch.library.register_fake("spikegpt_lora::packed_linear", fake)
