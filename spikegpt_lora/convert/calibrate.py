"""Neurons before the matrices of a prepared model (spiking.py), fitted on text: one scale s a channel that makes the
squared difference between what a matrix was given and what it is sent smallest.

    signed:   x       against  s k,        k = floor(x / s + 1/2) in -K ... K
    squared:  relu(x)^2  against  (s m)^2,    m = floor(x / s + 1/2) in 0 ... K

s is the best of a grid of s = m rms / K and of what least squares makes of it (s = <x, k> / <k, k>, given k). A channel
that hardly ever is not 0 would get a step near 0, and clip what comes later: none is below 0.3 of the median.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ..forward import evaluating, hooked
from ..neurons.multilevel import IntegerSpikes
from ..neurons.residual import IntegerAmplitude, IntegerNorm
from ..ops.folded import nothing_kept
from .spiking import Model, wake

TOKENS = 4096  # at least
LARGEST = {False: 8.0, True: 60.0}  # of the grid's m; relu(x)^2 has a long tail
POINTS = 24
STEPS = 4  # of least squares, from the grid's best
FLOOR = 0.3  # of the median scale
CHANNELS = 16
TINY = 1e-12
NOTHING = (None,) * 5  # the state at a text's beginning
# Within a block, what reads what the neurons before it send.
ORDER = (
    ("att.spike_key", "att.spike_value", "att.spike_receptance"),
    ("att.spike_output",),
    ("ffn.spike_key", "ffn.spike_receptance"),
    ("ffn.spike_value",),
)


@torch.no_grad()
def calibrate(model: Model, ids: Tensor, sequential: bool = False) -> Model:
    """`model` with every neuron's scale fitted, its norms centred, and all of it awake; changed in place.

    Args:
        model: of `prepare`.
        ids: tokens of a text, `(B, T)`, 4,096 or more.
        sequential: each neuron is fitted to what it is given when all before it are awake; else to what it is given
            while all are silent, which was the better (README.md).

    Raises:
        ValueError: too few tokens, or a model that `prepare` did not make.
    """
    require_spiking(model)
    if ids.numel() < TOKENS:
        raise ValueError(f"scales are fitted on {TOKENS:,} tokens or more, got {ids.numel():,}: give more text")
    wake(model, ())
    with evaluating(model), nothing_kept():
        x = spikes = model.spikegpt.emb_spike(model.spikegpt.emb(ids.to(model.device)))
        if sequential:
            _round_amplitude(model, spikes)
        for block in model.spikegpt.blocks:
            own = {name for name, _ in block.named_modules()}  # with the token shift of rows, two of the six
            for stage in ORDER if sequential else [sum(ORDER, ())]:
                there = tuple(name for name in stage if name in own)
                _fit(block, x, there)
                for name in there if sequential else ():
                    block.get_submodule(name).silent = False  # type: ignore[assignment]
            x, _ = block(x, NOTHING)
        if not sequential:
            _round_amplitude(model, spikes)
    return centre(wake(model), ids)


@torch.no_grad()
def centre(model: Model, ids: Tensor) -> Model:
    """`model`, with integer spikes, reads each channel of the residual stream off its most frequent integer: more of
    what matrices read is 0, and nothing else changes (see `IntegerNorm`). In place; ids as in `calibrate`."""
    require_spiking(model)
    with evaluating(model), nothing_kept():
        x, _ = model.spikegpt.emb_spike.step(model.spikegpt.emb(ids.to(model.device)))
        for block in model.spikegpt.blocks:
            n = block.amplitude0(x) if hasattr(block, "amplitude0") else x
            with collected(block, ("lif1",), of_output=True) as spikes:
                x, _ = block(x, NOTHING)
            _most_frequent(block.ln1, n)
            _most_frequent(block.ln2, n + spikes["lif1"])
        _most_frequent(model.spikegpt.ln_out, x)
    return model


def fit_scale(x: Tensor, most: Tensor, signed: bool = True, squared: bool = False) -> Tensor:
    """See the top of this file.

    Args:
        x: `(N, C)`, what C neurons are given.
        most: K of each, `(C,)`.

    Returns:
        Their scales s, `(C,)`.
    """
    x = x.T.contiguous() if signed else x.T.relu()
    parts = zip(x.split(CHANNELS), most[:, None].split(CHANNELS))  # a few channels at once stay in the cache
    s = torch.cat([_least_squares(rows, k, signed, squared) for rows, k in parts]).flatten()
    alive = x.any(dim=1)
    return s.maximum(FLOOR * s[alive].median()) if alive.any() else torch.ones_like(s)


def _least_squares(x: Tensor, most: Tensor, signed: bool, squared: bool) -> Tensor:
    """s `(C, 1)` for x `(C, N)`, before the floor."""
    rms, low = x.square().mean(dim=1, keepdim=True).sqrt(), -most if signed else torch.zeros_like(most)
    wanted = x * x if squared else x
    best, error = torch.ones_like(rms), torch.full_like(rms, torch.inf)

    def better(s: Tensor) -> Tensor:
        """Keeps s where it is the best so far; gives what least squares makes of it."""
        sent = torch.clamp(torch.floor(x / s + 0.5), low, most)
        sent = sent * sent if squared else sent
        a, b = (wanted * sent).sum(dim=1, keepdim=True), (sent * sent).sum(dim=1, keepdim=True)
        unit = s * s if squared else s
        left = unit * (unit * b - 2 * a)  # the squared difference, but for wanted's own square
        best[left < error], error[left < error] = s[left < error], left[left < error]
        unit = torch.where((a > 0) & (b > 0), a / b, unit)
        return unit.sqrt() if squared else unit

    for m in torch.logspace(-2, math.log2(LARGEST[squared]), POINTS, base=2.0).tolist():
        better((m * rms / most).clamp(min=TINY))
    s = best.clone()
    for _ in range(STEPS):
        s = better(s)
    better(s)
    return best


def require_spiking(model: nn.Module) -> None:
    """Raise ValueError where `model`'s matrices read no integer spikes."""
    if model.config.matrix_spikes != "integer":
        raise ValueError(f"the matrices of this {type(model).__name__} read real numbers: prepare() it first")


@contextmanager
def collected(module: nn.Module, names: Iterable[str], of_output: bool = False) -> Iterator[dict[str, Tensor]]:
    """While it is open, what the submodules of these names were given last, or gave, by name."""
    found: dict[str, Tensor] = {}

    def attach(name):
        def keep(_, args, output):
            found[name] = (output if of_output else args[0]).detach()

        return module.get_submodule(name).register_forward_hook(keep)

    with hooked(map(attach, names)):
        yield found


def _fit(block: nn.Module, x: Tensor, names: tuple[str, ...]) -> None:
    with collected(block, names) as currents:
        block(x, NOTHING)
    for name, current in currents.items():
        neuron = cast(IntegerSpikes, block.get_submodule(name))
        neuron.log_scale.copy_(fit_scale(current.flatten(0, -2), neuron.most, neuron.signed, neuron.squared).log())


def _round_amplitude(model: Model, spikes: Tensor) -> None:
    """The amplitude becomes integer and wakes; every offset takes up what that moves its channel's mean by."""
    amplitude = cast(IntegerAmplitude, model.spikegpt.blocks[0].get_submodule("amplitude0"))
    a = amplitude.amplitude
    rounded = torch.floor(a + 0.5)
    moved = (a - rounded) * spikes.flatten(0, -2).mean(dim=0)
    a.copy_(rounded)
    for module in model.modules():
        if isinstance(module, IntegerNorm):
            module.offset += moved
    amplitude.silent = False


def _most_frequent(norm: nn.Module, n: Tensor) -> None:
    cast(IntegerNorm, norm).centre.copy_(n.flatten(0, -2).mode(dim=0).values)
