"""Checks of a forward's arguments: unknown ones are refused by name, because misread input gives finite numbers.

Arguments of stock code (peft, trl, transformers' generation) that mean nothing here pass as None, or as what changes
nothing; those that would change the meaning of a batch do not.
"""

import difflib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

CACHES = ("cache", "past_key_values")  # what transformers calls the past, from 5.24 on and before
LOSS = ("num_items_in_batch", "ignore_index", "shift_labels")  # what Trainer and trl hand on to the loss
PACKED = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
ONE_TEXT_A_ROW = "give one text a row (trl: packing=False, padding_free=False)"


def refuse_unknown(owner: str, given: Mapping, known: tuple[str, ...]) -> None:
    """Raise on an argument of `owner`'s forward beside those it knows, unless it is None or changes nothing.

    Args:
        given: the others, by name. known: the names of its own, for a hint.

    Raises:
        TypeError: an unknown name.
        ValueError: a known one that asks for what there is not.
    """
    for name, value in given.items():
        if value is None or name == "position_ids":  # those are looked at beside the mask
            continue
        if name in PACKED:
            raise ValueError(f"{name} says that several texts are packed in a row: {ONE_TEXT_A_ROW}")
        if name == "output_attentions":
            if value:
                raise ValueError("output_attentions must be False: SpikeGPT has no attention matrices to return")
        elif name in CACHES:
            raise ValueError(f"{name} must be None: SpikeGPT's past is its state, give it as state=")
        elif name == "token_type_ids":
            if value.any():
                raise ValueError("token_type_ids must be 0: SpikeGPT knows no second kind of tokens")
        else:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; it takes {', '.join(known)}"
            raise TypeError(f"{owner} has no argument {name}{hint}")


def require_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None, width: int) -> Tensor:
    """The one of the two that is given: ids, integers `(B, T)`, or embeddings, real numbers `(B, T, width)`.

    Raises:
        ValueError: it is something else.
    """
    ids, tokens = inputs_embeds is None, input_ids if inputs_embeds is None else inputs_embeds
    fits = isinstance(tokens, Tensor) and tokens.is_floating_point() != ids
    if fits and (tokens.dim() == 2 if ids else tokens.dim() == 3 and tokens.shape[-1] == width):
        return tokens
    rule = "input_ids must be integers of shape (B, T)"
    rule = rule if ids else f"inputs_embeds must be real numbers of shape (B, T, {width})"
    got = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
    raise ValueError(f"{rule}, got {got}")


def real_tokens(attention_mask: Tensor | None, B: int, T: int) -> Tensor | None:
    """An attention mask as bool `(B, T)`, None where every token is real.

    Raises:
        ValueError: no token at all, another shape, or values beside 0 and 1 (a mask to be added to scores, say).
    """
    if T == 0:
        raise ValueError(f"SpikeGPT needs at least one token per sequence, got input of shape {(B, T)}")
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != (B, T):
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask must be {(B, T)}, got {got}")
    if attention_mask.dtype == torch.bool:
        return attention_mask
    real = attention_mask != 0
    if _readable(attention_mask) and not bool((real == attention_mask).all()):  # NaN is unequal to everything
        values = attention_mask.unique()[:4].tolist()
        raise ValueError(
            f"attention_mask must hold 1 for a token and 0 for none, got {values}: a mask that is added to scores "
            "(0 and -inf) means the opposite"
        )
    return real


def require_one_text(position_ids: Tensor | None, mask: Tensor | None) -> None:
    """Raise where position_ids `(B, T)` start again among the real tokens of a row: the row holds several texts."""
    if position_ids is None or position_ids.shape[-1] < 2:
        return
    positions = position_ids if position_ids.dim() > 1 else position_ids[None]
    if mask is not None and positions.shape == mask.shape:
        highest = torch.where(mask, positions, -1).cummax(dim=-1).values[..., :-1]
        again = (positions[..., 1:] <= highest) & mask[..., 1:]
    else:
        again = positions[..., 1:] <= positions[..., :-1]
    if bool(again.any()):
        raise ValueError(f"position_ids start again within a row, so several texts are packed in it: {ONE_TEXT_A_ROW}")


def require_labels(labels: Tensor) -> None:
    """Raise where no label counts: the mean over nothing is NaN."""
    if _readable(labels) and not bool((labels != -100).any()):
        raise ValueError(
            "labels must hold at least one token to predict, got only -100: the first token of a row, and one after a "
            "masked step, are never predicted"
        )


def require_finite(tensors: Mapping[str, Tensor | None], what: str) -> None:
    """Raise where floating `tensors` hold a value that is not finite: spikes hide it, NaN >= 0 is False.

    Raises:
        ValueError: with the names of up to five.
    """
    floating = {name: t for name, t in tensors.items() if t is not None and t.is_floating_point() and _readable(t)}
    if all(math.isfinite(t.sum().item()) for t in floating.values()):  # a sum hands NaN and infinity on
        return
    wrong = [name for name, t in floating.items() if not bool(t.isfinite().all())]  # it may just have overflowed
    if not wrong:
        return
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    raise ValueError(f"{what} must be finite, got NaN or infinity in {', '.join(wrong[:5])}{more}")


def _readable(tensor: Tensor) -> bool:
    """Whether its values may be looked at: not on the meta device, and not while a graph is being captured."""
    return not (tensor.is_meta or torch.compiler.is_compiling() or isinstance(tensor, torch._subclasses.FakeTensor))
