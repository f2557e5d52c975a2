"""WKV, the recurrence that stands in for attention in RWKV and SpikeGPT: an exponentially decaying average of v.

    y[t] = (sum_{i<t} exp((t-1-i) w + k[i]) v[i] + exp(u + k[t]) v[t])
         / (sum_{i<t} exp((t-1-i) w + k[i])      + exp(u + k[t]))            w = -exp(time_decay), u = time_first

Per channel the state is numerator, denominator and the exponent p that both are scaled by (true value = stored value
times exp(p)): no exp here ever has a positive argument, so no k overflows.
Source: RWKV-4 (Peng et al. 2023, appendix D), SpikeGPT section 3.3, upstream `cuda/wkv_cuda.cu`.
"""

import math

import torch
from torch import Tensor

from .backend import bind, in_dtype, use_extension

# Exponent of an empty state: exp(NOTHING_YET - p) is 0 for every p that a real token sets. This is -1e38 as float32
# holds it: one number in every dtype and in the kernels.
NOTHING_YET = -9.999999680285692e37


def wkv(
    time_decay: Tensor,
    time_first: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """WKV over a stretch of tokens; differentiable in every tensor, the state included.

    Args:
        time_decay: `(C,)`, raw as stored in checkpoints; the decay per token is exp(-exp(time_decay)).
        time_first: `(C,)`, the bonus u of the current token.
        k, v: `(B, T, C)`, T >= 1, any values, no limit on T.
        state: `(B, 3, C)` = numerator, denominator, exponent after the previous stretch; None at a sentence's start.
        mask: bool `(B, T)`; where False the token does not exist: y is 0, the state is carried, no gradient.
        backend: "extension" (the kernels of `cuda/`), "reference" (plain torch), or "auto": the first where it can be
            built, else the second.

    Returns:
        y `(B, T, C)` in v's dtype and the new state `(B, 3, C)` (float32, or float64 for float64 input).

    Raises:
        ValueError: a shape or the backend does not fit; the message names it.
        ExtensionError: backend is "extension" and it cannot be built here.
    """
    if not use_extension(backend, k.device):
        return wkv_reference(time_decay, time_first, k, v, state, mask)
    dtype, v_dtype = torch.promote_types(k.dtype, torch.float32), v.dtype
    if v_dtype != k.dtype:
        k, v = (x.to(torch.promote_types(k.dtype, v_dtype)) for x in (k, v))
    w, u = -torch.exp(in_dtype(time_decay, dtype)), in_dtype(time_first, dtype)
    state = None if state is None else in_dtype(state, dtype)
    y, state = torch.ops.spikegpt_lora.wkv(w, u, k, v, state, mask)  # it checks the shapes
    return in_dtype(y, v_dtype), state


def wkv_reference(
    time_decay: Tensor,
    time_first: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`wkv` in plain torch: the definition that every kernel is compared with. Arguments and results as in `wkv`."""
    _check_shapes(time_decay, time_first, k, v, state, mask)
    dtype, (B, T, C) = torch.promote_types(k.dtype, torch.float32), k.shape
    w, u = -torch.exp(time_decay.to(dtype)), time_first.to(dtype)
    k, v_out = k.to(dtype), v.dtype
    v = v.to(dtype)
    if state is None:
        state = k.new_tensor([0.0, 0.0, NOTHING_YET])[:, None].repeat(B, 1, C)
    numerator, denominator, p = state.to(dtype).unbind(1)
    real = k.new_ones(B, T, 1, dtype=torch.bool) if mask is None else mask[..., None]
    k, v = k.where(real, -torch.inf), v.where(real, 0)  # a masked token weighs exp(-inf) = 0, whatever the exponent

    # The exponent first: p[t] = max(p[t-1] + w, k[t]). A masked token neither decays it nor raises it.
    exponents = [p]
    for decay, k_t in zip(w.expand(B, T, C).where(real, 0).unbind(1), k.unbind(1)):
        exponents.append(torch.maximum(exponents[-1] + decay, k_t))
    before, after = torch.stack(exponents[:-1], 1), torch.stack(exponents[1:], 1)  # (B, T, C)

    # Then both sums, a linear recurrence whose coefficients are known for all tokens at once.
    keep = torch.exp(before + w.where(real, 0) - after)
    add = torch.exp(k - after)
    sums = [torch.stack([numerator, denominator], 1)]  # (B, 2, C)
    terms = torch.stack([add * v, add], 2)  # (B, T, 2, C)
    for keep_t, term in zip(keep[:, :, None].unbind(1), terms.unbind(1)):
        sums.append(torch.addcmul(term, keep_t, sums[-1]))

    # The output weighs the state before the token against the token itself, with its bonus u.
    numerator, denominator = torch.stack(sums[:-1], 1).unbind(2)
    q = torch.maximum(before, u + k)
    old, new = torch.exp(before - q), torch.exp(u + k - q)
    y = (old * numerator + new * v) / (old * denominator + new).where(real, 1)  # a masked one may be 0 / 0
    return y.where(real, 0).to(v_out), torch.cat([sums[-1], exponents[-1][:, None]], 1)


def powers_of_two(time_decay: Tensor, time_first: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of `wkv` with every weight a power of two, so that shifts do what exp does: k and time_first
    rounded to multiples of ln 2, the decay of a token to the nearest of 2^-n and 1 - 2^-n, n = 1 ... 15, as time_decay
    says it. Gradients go straight through."""
    ln2 = math.log(2)
    halves = 2.0 ** -torch.arange(1, 16, dtype=time_decay.dtype, device=time_decay.device)
    rates = torch.cat([halves, 1 - halves[1:]]).log().neg().log()  # as time_decay: the decay is exp(-exp(.))
    nearest = rates[(time_decay.detach()[:, None] - rates).abs().argmin(dim=1)]
    rounded = [torch.floor(x.detach() / ln2 + 0.5) * ln2 for x in (time_first, k)]
    decay, first, k = (x + (to - x).detach() for x, to in zip((time_decay, time_first, k), (nearest, *rounded)))
    return decay, first, k


def _check_shapes(time_decay, time_first, k, v, state, mask):
    if k.dim() != 3 or k.shape[1] == 0:
        raise ValueError(f"wkv: k must be (B, T, C) with T >= 1, got {tuple(k.shape)}")
    B, T, C = k.shape
    expected = {"time_decay": (C,), "time_first": (C,), "v": (B, T, C), "state": (B, 3, C), "mask": (B, T)}
    given = {"time_decay": time_decay, "time_first": time_first, "v": v, "state": state, "mask": mask}
    for name, tensor in given.items():
        if tensor is not None and tuple(tensor.shape) != expected[name]:
            raise ValueError(f"wkv: {name} must be {expected[name]} for k {(B, T, C)}, got {tuple(tensor.shape)}")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"wkv: mask must be bool, got {mask.dtype}")


@bind
def _bind():
    def fake(w, u, k, v, state, mask):
        return k.new_empty(k.shape), w.new_empty(k.shape[0], 3, k.shape[2])

    def fake_backward(w, u, k, v, state, mask, grad_y, grad_state):
        return tuple(tensor.new_empty(tensor.shape) for tensor in (w, u, k, v, grad_state))

    torch.library.register_fake("spikegpt_lora::wkv", fake)
    torch.library.register_fake("spikegpt_lora::wkv_backward", fake_backward)
