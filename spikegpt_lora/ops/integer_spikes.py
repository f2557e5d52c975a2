"""Integer spikes in one pass over memory forward and one backward: the neuron of neurons/multilevel.py.

u = x / s,  k = floor(u + 1/2) in -K ... K (signed) or 0 ... K;  sent is k, or k^2 (squared)
"""

import torch
from torch import Tensor

from .backend import bind, in_dtype, use_extension


def integer_spikes(
    x: Tensor, log_scale: Tensor, most: Tensor, signed: bool, squared: bool, backend: str = "auto"
) -> Tensor:
    """The integers of x.

    Args:
        x: `(..., C)`, floating point.
        log_scale: `(C,)`, the logarithm of s. most: `(C,)`, K, whole numbers.
        signed, squared: which integers, see above.
        backend: as in `wkv`.

    Returns:
        Integers of x's shape and dtype. Backward, straight through the rounding: dk/du is 1 between the outermost
        levels' half steps, 0 beyond.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    log_scale, most = in_dtype(log_scale, dtype), in_dtype(most, dtype)
    if use_extension(backend, x.device):
        return torch.ops.spikegpt_lora.integer_spikes(x, log_scale, most, signed, squared)
    return integer_spikes_reference(x, log_scale, most, signed, squared)


def integer_spikes_reference(x: Tensor, log_scale: Tensor, most: Tensor, signed: bool, squared: bool) -> Tensor:
    """`integer_spikes` in plain torch: the definition that the kernel is compared with."""
    u = in_dtype(x, log_scale.dtype) / log_scale.exp()
    low = -most if signed else torch.zeros_like(most)
    k = torch.clamp(torch.floor(u + 0.5), low, most).detach()
    inside = (u >= low - 0.5) & (u < most + 0.5)
    through = torch.where(inside, u - u.detach(), 0)  # 0, whose derivative is 1 inside
    return in_dtype(k * k + 2 * k * through if squared else k + through, x.dtype)


@bind
def _bind() -> None:
    def fake_backward(x, log_scale, *rest):
        return x.new_empty(x.shape), log_scale.new_empty(log_scale.shape)

    torch.library.register_fake("spikegpt_lora::integer_spikes", lambda x, *rest: x.new_empty(x.shape))
    torch.library.register_fake("spikegpt_lora::integer_spikes_backward", fake_backward)
