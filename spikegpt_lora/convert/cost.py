"""What integer spikes cost a language model in nats a token, part by part, on the same tokens as the float model."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..forward import evaluating
from ..model import SpikeGPTForCausalLM
from .spiking import PARTS, use_powers_of_two, wake

STREAMS, LENGTH = 64, 64


@dataclass(frozen=True)
class Cost:
    """part: what is awake; nats: mean loss a token of the spiking model minus the float one's; error: its standard
    error over the streams that the text is read in, paired."""

    part: str
    nats: float
    error: float


@torch.no_grad()
def token_losses(model: SpikeGPTForCausalLM, tokens: np.ndarray) -> Tensor:
    """The loss of each token of a text in nats, `(streams, T)`, read once in 64 streams with the state carried along:
    their mean is that of `pretrain.perplexity`.

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
            output = model(ids[:, :-1], state=state, use_cache=True)
            loss = nn.functional.cross_entropy(
                output.logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            )
            losses.append(loss.view(STREAMS, -1).cpu())
            state = output.state
    return torch.cat(losses, dim=1)


def cost(part: str, losses: Tensor, of_float: Tensor) -> Cost:
    """Of two results of `token_losses` on one text."""
    differences = (losses - of_float).double().mean(dim=1)
    return Cost(part, float(differences.mean()), float(differences.std() / math.sqrt(len(differences))))


def costs(
    prepared: SpikeGPTForCausalLM,
    calibrated: SpikeGPTForCausalLM,
    tokens: np.ndarray,
    of_float: Tensor,
    progress: Callable = lambda items: items,
) -> list[Cost]:
    """What each part costs by itself, and all together, in nats a token above the float model.

    Rows: the fixed deviation of ln0 (`prepared`, all silent); the integer amplitude, with which head and norms read
    integers; on top of it, each by itself, the neurons of each part of PARTS; everything; and everything with the other
    setting of `wkv_powers_of_two`. Afterwards `calibrated` is awake, and has its own setting again.

    Args:
        prepared, calibrated: of `prepare`, and of `calibrate`.
        tokens: of a text that neither was fitted to.
        of_float: `token_losses` of the model that they were made of.
        progress: called with what is gone through; to draw a bar, return it wrapped.
    """
    powers = calibrated.config.wkv_powers_of_two
    rows: list[tuple[str, SpikeGPTForCausalLM, tuple[str, ...], bool]] = [
        ("ln0's deviation fixed", prepared, (), powers),
        ("integer amplitude", calibrated, ("amplitude",), powers),
        *((f"and {part}", calibrated, ("amplitude", part), powers) for part in list(PARTS)[1:]),
        ("everything", calibrated, tuple(PARTS), powers),
        (f"everything, WKV with{'out' * powers} powers of two", calibrated, tuple(PARTS), not powers),
    ]
    found = []
    for part, model, awake, powers_of_two in progress(rows):
        losses = token_losses(use_powers_of_two(wake(model, awake), powers_of_two), tokens)
        found.append(cost(part, losses, of_float))
    use_powers_of_two(wake(calibrated), powers)
    use_powers_of_two(prepared, powers)
    return found
