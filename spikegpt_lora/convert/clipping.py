"""Learned clipping of integer weights, block by block: OmniQuant's, with spikes on.

Each block of a converted model learns upper and lower (convert/int_weights.py) so that its output is nearest to that of
the same block of the model before conversion, the squared error averaged over calibration text; what it reads comes
from the converted blocks before it. Source: Shao et al. 2023, arXiv 2308.13137, section 3.1; SpikeLLM's OmniQuant
pipeline trains so, at the same rate.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..forward import evaluating, hooked
from .int_weights import Clipping
from .spiking_linear import SpikingLinear
from .transformers_models import spiking_linears

RATE = 1e-2


class _Reached(Exception):
    """The block whose input is wanted has been called."""


def blocks_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The members of the outermost lists of modules that hold a SpikingLinear, by name."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(inside):
            if any(isinstance(m, SpikingLinear) for m in module.modules()):
                inside += (f"{name}.",)
                yield from ((f"{name}.{i}", block) for i, block in enumerate(module))


def learn_clipping(
    model: nn.Module,
    original: nn.Module,
    batches: Sequence[Mapping],
    bits: int,
    zero_point: bool = False,
    epochs: int = 5,
) -> list[tuple[float, float]]:
    """Put the weights of every `SpikingLinear` of `model` on a grid, its ends learned; changed in place.

    Args:
        model: from `put_neurons`, its weights not rounded; its blocks must hold all its neurons.
        original: the model before `put_neurons`.
        batches: keyword arguments of the models' forward, of calibration text.
        epochs: how often each block sees each batch.

    Returns:
        Of each block the mean squared error of its output in the first and in the last epoch.

    Raises:
        ValueError: a layer with neurons outside of the blocks, or no batch.
    """
    blocks = list(blocks_of(model))
    covered = {id(m) for _, block in blocks for m in block.modules()}
    if outside := [name for name, module in spiking_linears(model) if id(module) not in covered]:
        raise ValueError(f"clipping is learned block by block, {outside[0]} is in none: put neurons into blocks alone")
    if not batches:
        raise ValueError("clipping is learned on calibration text, got none: give a batch or more")
    errors = []
    with evaluating(model), evaluating(original):
        for name, block in blocks:
            inputs = [_called_with(model, block, batch) for batch in batches]
            targets = [_output(original, original.get_submodule(name), batch) for batch in batches]
            errors.append(_learn(block, inputs, targets, bits, zero_point, epochs))
    return errors


def _learn(block: nn.Module, inputs, targets, bits: int, zero_point: bool, epochs: int) -> tuple[float, float]:
    """Learn the clipping of one block, and leave its weights rounded."""
    linears = [module.linear for _, module in spiking_linears(block)]
    learned = []
    for linear in linears:
        clipping = Clipping(linear.out_features, bits, zero_point).to(linear.weight.device, linear.weight.dtype)
        parametrize.register_parametrization(linear, "weight", clipping)
        learned += clipping.parameters()
    optimizer, errors = torch.optim.Adam(learned, lr=RATE), []
    with torch.enable_grad():
        for _ in range(epochs):
            total = 0.0
            for (args, kwargs), target in zip(inputs, targets):
                error = nn.functional.mse_loss(_hidden(block(*args, **kwargs)), target)
                for parameter, grad in zip(learned, torch.autograd.grad(error, learned)):
                    parameter.grad = grad
                optimizer.step()
                total += error.item()
            errors.append(total / len(inputs))
    for linear in linears:
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
    return errors[0], errors[-1]


def _hidden(output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def _called_with(model: nn.Module, block: nn.Module, batch: Mapping) -> tuple[tuple, dict]:
    """What `block` is called with."""
    seen = []

    def stop(module, args, kwargs):
        seen.append((args, kwargs))
        raise _Reached

    with hooked([block.register_forward_pre_hook(stop, with_kwargs=True)]):
        try:
            model(**batch)
        except _Reached:
            pass
    return seen[0]


@torch.no_grad()
def _output(model: nn.Module, block: nn.Module, batch: Mapping) -> Tensor:
    """What `block` gives."""
    seen = []

    def stop(module, args, output):
        seen.append(_hidden(output))
        raise _Reached

    with hooked([block.register_forward_hook(stop)]):
        try:
            model(**batch)
        except _Reached:
            pass
    return seen[0]
