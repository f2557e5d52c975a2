"""What one spike of each channel stands for, moved into the matrix that reads it: what a chip holds is W diag(s)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model import SRFFN, SRWKV, Block, SpikeGPTModel
from ..neurons.residual import IntegerNorm
from ..ops.spike_linear import SpikeLinear


class FoldedLinear(SpikeLinear):
    """A `SpikeLinear` whose weight is W diag(s) already; the scale that it is called with is not looked at."""

    def forward(self, spikes: Tensor, scale: Tensor | None = None) -> Tensor:
        return F.linear(spikes, self.weight)


@torch.no_grad()
def fold_scales(model: nn.Module) -> nn.Module:
    """`model` with the scale of every neuron and the gain of every norm in the matrices that read them, in place; one
    without integer spikes, or folded before, stays as it is.

    It computes what it did, but for the rounding of W diag(s); the hidden states that a norm gives when it is called
    are other ones where its gain went into matrices. An adapter's A reads integers without scale, before and after.

    Raises:
        ValueError: a norm whose gain is 0 in a channel, so that its bias cannot go with it; the message names it.
    """
    inside = next(((name, m) for name, m in model.named_modules() if isinstance(m, SpikeGPTModel)), None)
    if inside is None or inside[1].config.matrix_spikes != "integer":
        return model
    name, base = inside
    prefix = f"{name}." if name else ""
    for i, block in enumerate(base.blocks):
        assert isinstance(block, Block)
        for kind, half, norm in (("att", block.att, block.ln1), ("ffn", block.ffn, block.ln2)):
            path = f"{prefix}blocks.{i}.{kind}"
            if half.mixes_rows:
                _fold_norm(model, f"{prefix}blocks.{i}", norm, [f"{path}.{reader}" for reader in half.readers])
            _fold_neurons(model, path, half)
    parent = name.rpartition(".")[0]
    heads = [f"{parent}.{head}".lstrip(".") for head in ("head", "score")]
    _fold_norm(model, f"{prefix}ln_out", base.ln_out, heads if name else [])
    return model


def _fold_neurons(model: nn.Module, path: str, half: SRWKV | SRFFN) -> None:
    for reader in (*half.readers, "output", "value"):
        if (neurons := getattr(half, f"spike_{reader}", None)) is not None:
            _fold(model, f"{path}.{reader}", neurons.scale)


def _fold_norm(model: nn.Module, name: str, norm: nn.Module, readers: list[str]) -> None:
    """The gain into the matrices, where there are any; the bias over the gain, so that W diag(g) gives what W gave."""
    assert isinstance(norm, IntegerNorm)
    if not sum(_fold(model, reader, norm.weight) for reader in readers):
        return
    if not norm.weight.all():
        raise ValueError(f"a norm of {name} has a gain of 0, which no matrix can hold: prune the channel, or train on")
    norm.bias.div_(norm.weight)
    norm.weight.fill_(1)


def _fold(model: nn.Module, path: str, scale: Tensor) -> int:
    """Every `SpikeLinear` at `path` or in what stands there (an adapter's base layer); how many there were."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if f"{name}.".startswith(f"{path}.") and type(module) is SpikeLinear
    ]
    for name, linear in found:
        folded = FoldedLinear(linear.in_features, linear.out_features).to(linear.weight)
        folded.weight.copy_(linear.weight * scale)
        model.set_submodule(name, folded.train(linear.training))
    return len(found)
