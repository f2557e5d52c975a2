"""Whether the programs of a bundle compute what the model does: in float64, where neither has rounding to speak of."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from ..neurons.multilevel import IntegerSpikes
from ..observe.traces import SpikeTrace, record_spikes
from .interpreter import Program
from .sentences import batches_by_length

Recorded = list[tuple[np.ndarray, SpikeTrace]]  # groups of sentences: ids `(b, T)`, and what the model did


@torch.no_grad()
def in_float64(model: nn.Module) -> nn.Module:
    """`model`, float32, in float64 and in place; its integer neurons have the scales that they had to the last bit."""
    scales = [(m, m.log_scale.exp().double()) for m in model.modules() if isinstance(m, IntegerSpikes)]
    model.double()
    for neuron, scale in scales:
        neuron.log_scale.copy_(scale.log())
    return model


def record_in_float64(model: nn.Module, batch: Mapping, progress) -> Recorded:
    """Spikes and logits of a model in float64, read in groups of like length."""
    groups = progress(batches_by_length(batch), "model in float64")
    return [(part["input_ids"].numpy(), record_spikes(model, part)) for _, part in groups]


def compare(program: Program, recorded: Recorded, text: str, progress) -> dict:
    """A program in float64 against what `record_in_float64` gave.

    Returns:
        sentences, tokens, neuron steps, spikes and predictions that differ, and the largest difference of a logit.

    Raises:
        ValueError: spikes or logits differ.
    """
    steps, wrong, apart, answers = 0, 0, 0.0, 0
    for ids, trace in progress(recorded, text):
        logits, seen = program.run(ids, trace.lengths, list(trace.spikes))
        wrong += sum(int((seen[name] != spikes).sum()) for name, spikes in trace.spikes.items())
        steps += int(trace.lengths.sum()) * sum(spikes.shape[-1] for spikes in trace.spikes.values())
        apart = max(apart, float(np.abs(logits - trace.logits).max()))
        answers += int((logits.argmax(axis=1) != trace.logits.argmax(axis=1)).sum())
    if wrong or not apart < 1e-6:
        raise ValueError(
            f"the {text} does not compute what the model does: {wrong} of {steps} spikes differ, logits by up to "
            f"{apart:.1e}. Something in this model is unlike SpikeGPT with plain adapters; please report it"
        )
    return {
        "dtype": "float64",
        "sentences": sum(len(ids) for ids, _ in recorded),
        "tokens": sum(int(trace.lengths.sum()) for _, trace in recorded),
        "steps": steps,
        "different_spikes": wrong,
        "different_predictions": answers,
        "largest_logit_difference": apart,
    }
