"""A block of the model for a few rows that go on from a state, a token of generation say, by one operator: what Python
does between the kernels would take longer than they do."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from .backend import bind, untouched
from .dropout import Dropout
from .packed_linear import few_rows, is_matrix

PARTS = ("ln1", "ln2", "att", "ffn", "lif1", "lif2", "dropout")
OF_ATT, OF_FFN = ("key", "value", "receptance", "output"), ("key", "receptance", "value")
VECTORS, SHARES_OF_ATT, SHARES_OF_FFN = (
    ("time_decay", "time_first"),
    ("time_mix_k", "time_mix_v", "time_mix_r"),
    ("time_mix_k", "time_mix_r"),
)


def block_step(
    block: nn.Module, srwkv: type, srffn: type, x: Tensor, state: tuple[Tensor | None, ...]
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """What `Block.forward` of model.py gives for x after ln0, where every token is real.

    Args:
        block: with modules of the classes `srwkv` and `srffn`.
        x: `(B, T, C)`. state: the five tensors of a layer.

    Returns:
        x and the five new tensors; None where a module inside has to run itself: it trains, has an adapter, somebody
        looks on, x has many rows, the model shifts rows or has powers of two, or there is no kernel here.
    """
    if state[0] is None or block.training or not few_rows(x):
        return None
    # Modules and weights from their dictionaries: each of the 50 as an attribute takes as long as a small kernel.
    own = cast(dict[str, Any], block._modules)
    ln1, ln2, att, ffn, lif1, lif2, dropout = map(own.__getitem__, PARTS)
    linears = [*map(att._modules.__getitem__, OF_ATT), *map(ffn._modules.__getitem__, OF_FFN)]
    kinds = (nn.LayerNorm, nn.LayerNorm, srwkv, srffn, Dropout)
    if not all(map(untouched, (ln1, ln2, att, ffn, dropout), kinds)) or not all(map(is_matrix, linears)):
        return None
    if not (lif1.is_unobserved_kernel() and lif2.is_unobserved_kernel()):
        return None
    if att.mixes_rows or att.powers_of_two:
        return None
    settings, norms = lif1.settings, [*ln1._parameters.values(), *ln2._parameters.values()]
    if settings != lif2.settings or ln1.eps != ln2.eps or any(weight is None for weight in norms):
        return None
    of_att, of_ffn = att._parameters.__getitem__, ffn._parameters.__getitem__
    x, *new = torch.ops.spikegpt_lora.block_step(
        x,
        state,
        [*norms, *map(of_att, VECTORS)],
        [*map(of_att, SHARES_OF_ATT), *map(of_ffn, SHARES_OF_FFN)],
        [linear.weight for linear in linears],
        [linear._buffers.get("scale") for linear in linears],
        ln1.eps,
        *vars(settings).values(),
    )
    return x, tuple(new)


@bind
def _bind() -> None:
    def fake(x, state, *rest):
        return x.new_empty(x.shape), *(tensor.new_empty(tensor.shape) for tensor in state)

    torch.library.register_fake("spikegpt_lora::block_step", fake)
