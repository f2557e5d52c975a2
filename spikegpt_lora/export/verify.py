"""Whether the programs of a bundle compute what the model does: both in float64, spike for spike."""

import copy
from collections.abc import Mapping

import numpy as np
from torch import nn

from ..observe.traces import read, record_spikes
from .interpreter import Program
from .sentences import batch_of, by_length, left_aligned


def compare_in_float64(model: nn.Module, batch: Mapping, program: Program, text: str, progress) -> dict:
    """A program of the interpreter against the model in float64, where both have no rounding to speak of.

    Returns:
        sentences, tokens, neuron steps, spikes and predictions that differ, and the largest difference of a logit.

    Raises:
        ValueError: spikes or logits differ.
    """
    double, (ids, lengths) = copy.deepcopy(model).double(), left_aligned(batch)
    steps, wrong, apart, answers = 0, 0, 0.0, 0
    for rows in progress(list(by_length(lengths)), text):
        part = batch_of(ids, lengths, rows)
        trace, theirs = record_spikes(double, part), read(double, part).logits.cpu().numpy()
        ours, seen = program.run(part["input_ids"].numpy(), lengths[rows], list(trace.spikes))
        wrong += sum(int((seen[name] != trace.spikes[name]).sum()) for name in trace.spikes)
        steps += int(lengths[rows].sum()) * sum(spikes.shape[-1] for spikes in trace.spikes.values())
        apart = max(apart, float(np.abs(ours - theirs).max()))
        answers += int((ours.argmax(axis=1) != theirs.argmax(axis=1)).sum())
    if wrong or not apart < 1e-6:
        raise ValueError(
            f"the {text} does not compute what the model does: {wrong} of {steps} spikes differ, logits by up to "
            f"{apart:.1e}. Something in this model is unlike SpikeGPT with plain adapters; please report it"
        )
    return {
        "dtype": "float64",
        "sentences": len(ids),
        "tokens": int(lengths.sum()),
        "steps": steps,
        "different_spikes": wrong,
        "different_predictions": answers,
        "largest_logit_difference": apart,
    }
