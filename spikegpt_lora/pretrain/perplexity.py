"""How well a language model predicts a text: its loss, and perplexity by token, word and character."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from ..model import SpikeGPTForCausalLM, SpikeGPTState


def next_token_loss(
    model: SpikeGPTForCausalLM, ids: Tensor, state: SpikeGPTState | None, bf16: bool
) -> tuple[Tensor, SpikeGPTState]:
    """Mean loss in nats a token of ids `(B, T + 1)`, each predicted from those before it; and the state after T."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        output = model(ids[:, :-1], state=state, use_cache=True)
    loss = nn.functional.cross_entropy(output.logits.float().flatten(0, 1), ids[:, 1:].flatten())
    return loss, SpikeGPTState(**{name: tensor.detach() for name, tensor in output.state.items()})


def divergence(
    model: SpikeGPTForCausalLM,
    teacher: SpikeGPTForCausalLM,
    ids: Tensor,
    state: SpikeGPTState | None,
    teachers_state: SpikeGPTState | None,
    bf16: bool,
) -> tuple[Tensor, SpikeGPTState, SpikeGPTState]:
    """Mean of sum p ln(p / q) in nats a token of ids `(B, T + 1)`, for p and q what `teacher` and `model` give to each
    next token (distillation at temperature 1: Hinton et al. 2015, arXiv 1503.02531); and the state of both after T."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        output = model(ids[:, :-1], state=state, use_cache=True)
        with torch.no_grad():
            wanted = teacher(ids[:, :-1], state=teachers_state, use_cache=True)
    q, p = (one.logits.float().flatten(0, 1).log_softmax(dim=-1) for one in (output, wanted))
    loss = nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    return loss, SpikeGPTState(**{name: tensor.detach() for name, tensor in output.state.items()}), wanted.state


@torch.no_grad()
def perplexity(model: SpikeGPTForCausalLM, tokens: np.ndarray, facts: dict, bf16: bool = False) -> dict[str, float]:
    """How well `model` predicts a text that it reads once, in 64 streams with the state carried along.

    Args:
        tokens, facts: a split of a `Corpus`, and its facts.

    Returns:
        See `per_token_word_character`.
    """
    model.eval()
    streams, length = 64, 64
    rows = (
        torch.from_numpy(tokens[: len(tokens) // streams * streams].astype(np.int64)).view(streams, -1).to(model.device)
    )
    total, count, state = 0.0, 0, None
    for start in range(0, rows.shape[1] - 1, length):
        ids = rows[:, start : start + length + 1]
        loss, state = next_token_loss(model, ids, state, bf16)
        total, count = total + loss.item() * ids[:, 1:].numel(), count + ids[:, 1:].numel()
    return per_token_word_character(total / count, facts)


def per_token_word_character(nats: float, facts: dict) -> dict[str, float]:
    """`nats` a token said in four ways; a word's share of a text is the text's sum of nats over its words."""
    total = nats * facts["tokens"]
    return {
        "nats_per_token": nats,
        "token_perplexity": math.exp(nats),
        "word_perplexity": math.exp(total / facts["words"]),
        "bits_per_character": total / facts["characters"] / math.log(2),
    }
