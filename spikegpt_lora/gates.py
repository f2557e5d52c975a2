"""The nonlinearities of a block that are not neurons: sigmoid(r) * y of SRWKV and SRFFN, and relu(k)^2 of SRFFN.

One pass over memory forward and one backward, where plain torch makes two to five.
"""

import torch
from torch import Tensor

from . import extension


def sigmoid_gate(r: Tensor, y: Tensor, backend: str = "auto") -> Tensor:
    """sigmoid(r) * y for r and y of one shape; `backend` as in `wkv`."""
    if r.dtype == y.dtype and r.shape == y.shape and extension.use_extension(backend, r.device):
        return torch.ops.spikegpt_lora.gate(r, y)
    return torch.sigmoid(r) * y


def squared_relu(k: Tensor, backend: str = "auto") -> Tensor:
    """relu(k)^2; `backend` as in `wkv`."""
    if extension.use_extension(backend, k.device):
        return torch.ops.spikegpt_lora.squared_relu(k)
    return torch.relu(k).square()


@extension.bind
def _bind():
    ops = torch.ops.spikegpt_lora

    def setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def empty_as_first(x, *rest):
        return x.new_empty(x.shape)

    torch.library.register_fake("spikegpt_lora::gate", empty_as_first)
    torch.library.register_fake(
        "spikegpt_lora::gate_backward", lambda r, y, g: (r.new_empty(r.shape), y.new_empty(y.shape))
    )
    torch.library.register_fake("spikegpt_lora::squared_relu", empty_as_first)
    torch.library.register_fake("spikegpt_lora::squared_relu_backward", empty_as_first)
    torch.library.register_autograd(
        "spikegpt_lora::gate", lambda ctx, g: ops.gate_backward(*ctx.saved_tensors, g), setup_context=setup
    )
    torch.library.register_autograd(
        "spikegpt_lora::squared_relu",
        lambda ctx, g: ops.squared_relu_backward(*ctx.saved_tensors, g),
        setup_context=setup,
    )
