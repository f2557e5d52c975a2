"""Some channels get more levels than others: those that matter most, by one of several scores on a text.

    output      mean |x (W^T W x)|: to first order, what a channel is worth of E = |W x|^2 / 2, W the matrix behind
    gradient    mean |x dL/dx|: the same of L, the language model's own loss
    magnitude   max |x|
    random      drawn
    uniform     no channel is chosen: the same number of spikes is spread evenly over all

x is what the matrix would read if nothing were rounded. The cost of levels is counted in binary neurons, one a level
that is not 0 (see neurons/multilevel.py): 2 K of a signed channel, K of a one-sided one. At the same share and factor
all scores cost the same. Source of `output`: optimal brain spiking of SpikeLLM (Xing et al. 2024, arXiv 2407.04752,
theorem 1; figure 2: groups of channels with more steps).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..forward import evaluating, hooked
from ..model import SpikeGPTForCausalLM
from ..neurons.multilevel import MOST, IntegerSpikes
from .calibrate import NOTHING, collected, require_spiking
from .salient_channels import scores_of
from .spiking import Model, wake

SCORES = ("output", "gradient", "magnitude", "random", "uniform")
LAYERS = {"output": "absolute"}  # what salient_channels.py calls it
ROWS = 8  # whose gradient is held at once


def give_levels(
    model: Model, ids: Tensor, score: str = "output", share: float = 0.1, factor: int = 2, seed: int = 0
) -> Model:
    """`model` with `factor` times the levels in the most salient `share` of the channels of each population, at least
    one channel; changed in place, and silent. To be calibrated after that: a scale depends on its K.

    Args:
        model: of `prepare`.
        ids: tokens `(B, T)` of a text.
        score: one of SCORES.
        share: in (0, 1].
        factor: >= 1.
        seed: of random channels.

    Raises:
        ValueError: a value out of range, more than 127 levels, real-valued matrices, or the gradient of a classifier.
    """
    require_spiking(model)
    largest = max(int(neuron.most.max()) for _, neuron in neurons(model))
    rules = {
        f"score must be one of {', '.join(SCORES)}, got {score!r}": score in SCORES,
        f"share must be in (0, 1], got {share}": 0 < share <= 1,
        f"factor must be >= 1, got {factor}": factor >= 1,
        f"{factor} x {largest} levels are more than {MOST}: give a smaller factor": factor * largest <= MOST,
        "the gradient is a language model's: give another score": score != "gradient" or hasattr(model, "head"),
    }
    if broken := [rule for rule, holds in rules.items() if not holds]:
        raise ValueError("; ".join(broken))
    wake(model, ())
    scores = saliency(model, ids, score, seed)
    for name, neuron in neurons(model):
        count, most = max(1, round(share * len(neuron.most))), neuron.most
        if score == "uniform":
            most += spread(count * (factor - 1) * int(most[0]), len(most)).to(most)
        else:
            most[scores[name].topk(count).indices] *= factor
    return model


def binary_neurons(model: nn.Module) -> int:
    """How many binary neurons the integer spikes of `model` are: see the top of this file."""
    return sum(int(neuron.most.sum()) * (2 if neuron.signed else 1) for _, neuron in neurons(model))


def saliency(model: Model, ids: Tensor, score: str, seed: int = 0) -> dict[str, Tensor]:
    """The score of each channel, `(C,)`, by the name of its neurons; arguments as of `give_levels`."""
    if score == "gradient":
        return _gradient(model, ids)
    if score in ("random", "uniform"):
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.rand(len(neuron.most), generator=generator) for name, neuron in neurons(model)}
    found: dict[str, Tensor] = {}
    with torch.no_grad(), evaluating(model):
        x, _ = model.spikegpt.emb_spike.step(model.spikegpt.emb(ids.to(model.device)))
        for i, block in enumerate(model.spikegpt.blocks):
            of_block = dict(neurons(block))
            with collected(block, of_block, of_output=True) as sent:
                x, _ = block(x, NOTHING)
            for name, neuron in of_block.items():
                read = sent[name].flatten(0, -2) * neuron.scale
                weight = block.get_parameter(f"{name.replace('spike_', '')}.weight")
                found[f"spikegpt.blocks.{i}.{name}"] = scores_of(read, weight, LAYERS.get(score, score))
    return found


def neurons(model: nn.Module) -> Iterator[tuple[str, IntegerSpikes]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, IntegerSpikes))


def spread(spikes: int, channels: int) -> Tensor:
    """So many spikes over so many channels, `(channels,)`, as evenly as whole numbers allow."""
    ends = torch.arange(channels + 1) * spikes // channels
    return ends.diff()


def _gradient(model: SpikeGPTForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    """x dL/dx is u dL/du for x = s u, what a silent neuron sends."""
    found: dict[str, Tensor] = {}

    def attach(name: str, neuron: IntegerSpikes):
        def add(u: Tensor, grad: Tensor) -> None:
            worth = (u * grad).abs().flatten(0, -2).sum(dim=0)
            found[name] = found.get(name, 0) + worth

        def watch(_, args, u):
            u.register_hook(lambda grad: add(u.detach(), grad))

        return neuron.register_forward_hook(watch)

    with evaluating(model), hooked(attach(*one) for one in neurons(model)):
        for rows in ids.to(model.device).split(ROWS):
            loss = model(rows, labels=rows).loss * rows.numel() / ids.numel()
            loss.backward()
            model.zero_grad(set_to_none=True)
    return found
