"""How well a language model predicts a text: its loss, and perplexity by token, word and character."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from ..forward import evaluating
from ..model import SpikeGPTForCausalLM, SpikeGPTState

STREAMS, LENGTH = 64, 64  # that a text is measured in, and tokens a step


def next_token_loss(
    model: SpikeGPTForCausalLM, ids: Tensor, state: SpikeGPTState | None, bf16: bool, reduction: str = "mean"
) -> tuple[Tensor, SpikeGPTState]:
    """Loss in nats of ids `(B, T + 1)`, each predicted from those before it, the mean or with "none" of each `(B T,)`;
    and the state after T."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        output = model(ids[:, :-1], state=state, use_cache=True)
    loss = nn.functional.cross_entropy(output.logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)
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
def token_losses(model: SpikeGPTForCausalLM, tokens: np.ndarray, bf16: bool = False) -> Tensor:
    """The loss of each token of a text in nats, `(STREAMS, T)`: read once, in streams with the state carried along.

    Raises:
        ValueError: fewer than two tokens a stream.
    """
    if len(tokens) < 2 * STREAMS:
        raise ValueError(f"losses are measured on {2 * STREAMS} tokens or more, got {len(tokens)}: give more text")
    rows = torch.from_numpy(tokens[: len(tokens) // STREAMS * STREAMS].astype(np.int64)).view(STREAMS, -1)
    losses, state = [], None
    with evaluating(model):
        for start in range(0, rows.shape[1] - 1, LENGTH):
            ids = rows[:, start : start + LENGTH + 1].to(model.device)
            loss, state = next_token_loss(model, ids, state, bf16, reduction="none")
            losses.append(loss.view(STREAMS, -1).cpu())
    return torch.cat(losses, dim=1)


def perplexity(model: SpikeGPTForCausalLM, tokens: np.ndarray, facts: dict, bf16: bool = False) -> dict[str, float]:
    """How well `model` predicts a text, by the mean of its `token_losses`.

    Args:
        tokens, facts: a split of a `Corpus`, and its facts.

    Returns:
        See `per_token_word_character`.
    """
    return per_token_word_character(float(token_losses(model, tokens, bf16).double().mean()), facts)


def per_token_word_character(nats: float, facts: dict) -> dict[str, float]:
    """`nats` a token said in four ways; a word's share of a text is the text's sum of nats over its words."""
    total = nats * facts["tokens"]
    return {
        "nats_per_token": nats,
        "token_perplexity": math.exp(nats),
        "word_perplexity": math.exp(total / facts["words"]),
        "bits_per_character": total / facts["characters"] / math.log(2),
    }
