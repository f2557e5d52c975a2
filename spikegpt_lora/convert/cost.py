"""What integer spikes cost a language model in nats a token, part by part, on the same tokens as the float model."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..model import SpikeGPTForCausalLM
from ..pretrain.perplexity import token_losses
from .spiking import PARTS, use_powers_of_two, wake


@dataclass(frozen=True)
class Cost:
    """part: what is awake; nats: mean loss a token of the spiking model minus the float one's; error: its standard
    error over the streams that the text is read in, paired."""

    part: str
    nats: float
    error: float


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
