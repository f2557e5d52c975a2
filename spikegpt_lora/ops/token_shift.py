"""Token shift: every linear layer of a block reads a mix of the token and of the real token before it.

    mixed = x * share + previous * (1 - share)              `share` per channel and per layer, learned

Source: SpikeGPT section 3.3 (eq. 6), upstream `src/model.py` (`time_shift`, `time_mix_k`, ...).
"""

import torch
from torch import Tensor, nn

from .backend import bind, in_dtype, product_dtype, untouched, use_extension


def token_shift(
    x: Tensor,
    last: Tensor | None,
    mask: Tensor | None,
    *shares: Tensor,
    norm: nn.LayerNorm | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Mix every token with the one before it.

    Args:
        x: `(B, T, C)`.
        last: `(B, C)`, x (of the norm, if any) at the last real token of the previous stretch; None at a sentence's
            start (0).
        mask: bool `(B, T)`; where False the token does not exist: the mixes are 0, the token after it is mixed with
            the real one before it, no gradient.
        shares: two or three tensors of C elements, one for each layer that reads.
        norm: what x passes first, in the same pass over memory.
        backend: as in `wkv`.

    Returns:
        The mixes `(B, T, C)`, one for each share, under autocast in its dtype; and at the end x (of the norm) at the
        last real token `(B, C)`.
    """
    if not use_extension(backend, x.device) or len(shares) not in (2, 3):
        return token_shift_reference(x, last, mask, *shares, norm=norm)
    dtype = torch.promote_types(x.dtype, torch.float32)
    gain, bias, eps = None, None, 0.0
    if norm is not None and _fusible(norm):
        gain, bias, eps = in_dtype(norm.weight, dtype), in_dtype(norm.bias, dtype), norm.eps
    elif norm is not None:
        x = norm(x)
    flat = [in_dtype(share.reshape(-1), dtype) for share in shares]
    shift = torch.ops.spikegpt_lora.token_shift2 if len(shares) == 2 else torch.ops.spikegpt_lora.token_shift3
    last = None if last is None else in_dtype(last, x.dtype)
    return shift(x, gain, bias, eps, last, mask, *flat, product_dtype(x))[: len(shares) + 1]


def _fusible(norm: nn.Module) -> bool:
    return untouched(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def token_shift_reference(
    x: Tensor, last: Tensor | None, mask: Tensor | None, *shares: Tensor, norm: nn.LayerNorm | None = None
) -> tuple[Tensor, ...]:
    """`token_shift` in plain torch: the definition that the kernel is compared with."""
    x = x if norm is None else norm(x)
    previous, last = _previous(x, last, mask)
    # Upstream's order of operations: torch.lerp rounds differently, and a rounding can flip a spike.
    mixes = [x * share + previous * (1 - share) for share in shares]
    if mask is not None:
        mixes = [mixed.where(mask[..., None], 0) for mixed in mixes]
    return *mixes, last


def _previous(x: Tensor, last: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """x one real token later: at each step the previous real token's x, and the new last one `(B, C)`."""
    if last is None:
        last = torch.zeros_like(x[:, 0])
    x = torch.cat([last[:, None], x], dim=1)  # (B, T + 1, C)
    if mask is None:
        return x[:, :-1], x[:, -1]
    steps = torch.arange(1, x.shape[1], device=x.device)
    newest = (steps * mask).cummax(dim=1).values  # (B, T): where in x the newest real token stands, 0 = `last`
    previous = nn.functional.pad(newest[:, :-1], (1, 0))
    rows = torch.arange(x.shape[0], device=x.device)
    return x.gather(1, previous[..., None].expand(-1, -1, x.shape[-1])), x[rows, newest[:, -1]]


@bind
def _bind() -> None:
    for count in (2, 3):
        _bind_for(f"spikegpt_lora::token_shift{count}", count)


def _bind_for(name: str, count: int) -> None:
    def fake(x, gain, bias, eps, last, mask, *shares_and_dtype):
        *shares, dtype = shares_and_dtype
        shape = [0] if gain is None else x.shape[:2]
        moments = [x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2)]
        mixes = [x.new_empty(x.shape, dtype=x.dtype if dtype is None else dtype) for _ in shares]
        return *mixes, x.new_empty(x.shape[0], x.shape[2]), *moments

    def fake_backward(x, gain, bias, mean, rstd, last, mask, *rest):
        return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[2]), rest[0].new_empty(count, x.shape[2])

    torch.library.register_fake(name, fake)
    torch.library.register_fake(f"{name}_backward", fake_backward)
