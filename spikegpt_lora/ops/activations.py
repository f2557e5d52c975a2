"""The nonlinearities of a block that are not neurons: sigmoid(r) * y of SRWKV and SRFFN, and relu(k)^2 of SRFFN.

One pass over memory forward and one backward, where plain torch makes two to five.
"""

import torch
from torch import Tensor

from .backend import bind, use_extension


def sigmoid_gate(r: Tensor, y: Tensor, backend: str = "auto") -> Tensor:
    """sigmoid(r) * y for r and y of one shape; `backend` as in `wkv`."""
    if r.dtype == y.dtype and r.shape == y.shape and use_extension(backend, r.device):
        return torch.ops.spikegpt_lora.sigmoid_gate(r, y)
    return torch.sigmoid(r) * y


def squared_relu(k: Tensor, backend: str = "auto") -> Tensor:
    """relu(k)^2; `backend` as in `wkv`."""
    if use_extension(backend, k.device):
        return torch.ops.spikegpt_lora.squared_relu(k)
    return torch.relu(k).square()


@bind
def _bind() -> None:
    def like_inputs(*tensors):
        *inputs, grad = tensors
        return tuple(x.new_empty(x.shape) for x in inputs) if len(inputs) > 1 else inputs[0].new_empty(inputs[0].shape)

    for name in ("sigmoid_gate", "squared_relu"):
        torch.library.register_fake(f"spikegpt_lora::{name}", lambda x, *rest: x.new_empty(x.shape))
        torch.library.register_fake(f"spikegpt_lora::{name}_backward", like_inputs)
