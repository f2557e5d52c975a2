"""A block whose matrices read integer spikes, for a few rows that go on from a state, by one operator: see
ops/block_step.py."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.backend import bind, untouched
from ..ops.block_step import OF_ATT, OF_FFN, PARTS, SHARES_OF_ATT, SHARES_OF_FFN, VECTORS
from ..ops.dropout import Dropout
from ..ops.packed_linear import few_rows
from ..ops.spike_linear import SpikeLinear
from .multilevel import IntegerSpikes
from .residual import IntegerNorm


def integer_block_step(
    block: nn.Module, srwkv: type, srffn: type, x: Tensor, state: tuple[Tensor | None, ...]
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """What `Block.forward` of model.py gives for x after its amplitude; arguments and results as of `block_step`."""
    if state[0] is None or block.training or not few_rows(x):
        return None
    ln1, ln2, att, ffn, lif1, lif2, dropout = map(cast(dict[str, Any], block._modules).__getitem__, PARTS)
    key, value, receptance, output = map(att._modules.__getitem__, OF_ATT)
    ffn_key, ffn_receptance, ffn_value = map(ffn._modules.__getitem__, OF_FFN)
    readers = [(ln1, key), (ln1, value), (ln1, receptance), (ln2, ffn_key), (ln2, ffn_receptance)]
    neurons = [att._modules["spike_output"], ffn._modules["spike_value"]]
    if not att.mixes_rows:
        neurons += [att._modules[f"spike_{name}"] for name in att.readers]
        neurons += [ffn._modules[f"spike_{name}"] for name in ffn.readers]
    kinds = (IntegerNorm, IntegerNorm, srwkv, srffn, Dropout)
    if not all(map(untouched, (ln1, ln2, att, ffn, dropout), kinds)) or att.powers_of_two or ln1.eps != ln2.eps:
        return None
    if not all(map(_is_matrix, (*(linear for _, linear in readers), output, ffn_value))):
        return None
    if not all(untouched(neuron, IntegerSpikes) and not neuron.silent for neuron in neurons):
        return None
    if not (lif1.is_unobserved_kernel() and lif2.is_unobserved_kernel()) or lif1.settings != lif2.settings:
        return None
    matrices, vectors = _read_by(readers, neurons[2:], x.dtype)
    x, *new = torch.ops.spikegpt_lora.integer_block_step(
        x,
        state,
        [tensor for norm in (ln1, ln2) for tensor in _held(norm)],
        [*map(att._parameters.__getitem__, VECTORS)],
        [*map(att._parameters.__getitem__, SHARES_OF_ATT), *map(ffn._parameters.__getitem__, SHARES_OF_FFN)],
        [*matrices, output.scaled(neurons[0].scale), ffn_value.scaled(neurons[1].scale)],
        vectors,
        [tensor for neuron in neurons for tensor in _held(neuron)],
        ln1.eps,
        *vars(lif1.settings).values(),
    )
    return x, tuple(new)


def _held(module: nn.Module) -> list[Any]:
    """weight, bias, offset and centre of a norm, log_scale and most of a neuron, in this order."""
    return [*module._parameters.values(), *module._buffers.values()]


def _is_matrix(linear: nn.Module) -> bool:
    return untouched(linear, SpikeLinear) and cast(Tensor, linear._parameters["weight"]).dtype == torch.float32


def _read_by(readers: list[tuple], neurons: list[IntegerSpikes], dtype: torch.dtype) -> tuple[list, list]:
    """Scaled matrices, and their vectors where they read the residual itself."""
    if neurons:
        return [linear.scaled(neuron.scale) for (_, linear), neuron in zip(readers, neurons)], []
    matrices, vectors = zip(*(norm.folded(linear, dtype) for norm, linear in readers))
    return list(matrices), list(vectors)


@bind
def _bind() -> None:
    def fake(x, state, *rest):
        return x.new_empty(x.shape), *(tensor.new_empty(tensor.shape) for tensor in state)

    torch.library.register_fake("spikegpt_lora::integer_block_step", fake)
