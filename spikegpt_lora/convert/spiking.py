"""A SpikeGPT whose matrices read real numbers, made one whose matrices read integer spikes, with the same weights.

    prepare      neurons before every matrix, all of them silent: what changes is ln0 alone
    calibrate    their scales fitted on text, and awake (calibrate.py)

    ln0(spike) = g (spike - mean) / deviation + b    ->    a spike + o,    a = g / sigma,    o = b - g mu / sigma

mean and deviation of ln0 are those of each token's row of spikes; mu and sigma their means over all tokens, as often as
they come. a is rounded once it is awake, so that the residual stream is integers; o is what every norm adds to them.
"""

import math
from collections.abc import Collection
from typing import TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..config import SpikeGPTConfig
from ..model import SpikeGPTForCausalLM, SpikeGPTForSequenceClassification, SpikeGPTModel
from ..neurons.multilevel import IntegerSpikes
from ..neurons.residual import IntegerAmplitude, IntegerNorm

Model = TypeVar("Model", SpikeGPTForCausalLM, SpikeGPTForSequenceClassification)

# What wakes together and is measured together, by the ends of the modules' names.
PARTS = {
    "amplitude": ("amplitude0",),
    "readers": ("att.spike_key", "att.spike_value", "att.spike_receptance", "ffn.spike_key", "ffn.spike_receptance"),
    "att.output": ("att.spike_output",),
    "ffn.value": ("ffn.spike_value",),
}


@torch.no_grad()
def prepare(
    model: Model,
    spike_levels: int = 3,
    ffn_levels: int | None = None,
    wkv_powers_of_two: bool = False,
    tokens: Tensor | None = None,
) -> Model:
    """A new model of the same class, in evaluation mode, with neurons before every matrix that are still silent. It
    gives what `model` gives but for ln0 (see the top of this file) and rounding. Where the token shift is of rows the
    matrices behind a norm need no neurons: they read the residual stream (design M of README.md).

    Args:
        model: matrices that read real numbers. It is not changed, and no weight is shared with it.
        spike_levels: K, the largest integer spike.
        ffn_levels: K before ffn.value, where another one is wanted.
        wkv_powers_of_two: as in `SpikeGPTConfig`; never silent.
        tokens: ids of any shape, for how often each token comes; None: all equally often.

    Raises:
        ValueError: `model` is of another kind, has adapters or packed weights, or reads integer spikes already; a K out
            of range.
    """
    require_convertible(model)
    changes = {"matrix_spikes": "integer", "wkv_powers_of_two": wkv_powers_of_two}
    config = changed_config(model, spike_levels=spike_levels, **changes)
    of_ffn = changed_config(model, spike_levels=spike_levels if ffn_levels is None else ffn_levels).spike_levels
    with torch.device("meta"):
        spiking = type(model)(config)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if ".ln0." not in name}
    if "score.weight" in weights:
        weights["score.weight"] = _stacked(weights["score.weight"], model.config.n_embd)
    weights |= _of_spikes(spiking, of_ffn, *integer_embedding(model.spikegpt, tokens))
    spiking.load_state_dict(weights, assign=True)
    spiking.tie_weights()
    return wake(spiking.requires_grad_().eval(), ())


def wake(model: Model, parts: Collection[str] = tuple(PARTS)) -> Model:
    """`model` with the neurons of these parts, some of PARTS, awake, and all others silent."""
    ends = tuple(end for part in parts for end in PARTS[part])
    for name, module in model.named_modules():
        if isinstance(module, IntegerSpikes | IntegerAmplitude):
            module.silent = not name.endswith(ends)
    return model


def use_powers_of_two(model: Model, use: bool = True) -> Model:
    """`model` with WKV's weights powers of two, or not."""
    model.config.wkv_powers_of_two = use
    for block in model.spikegpt.blocks:
        block.get_submodule("att").powers_of_two = use  # type: ignore[assignment]
    return model


def integer_embedding(model: SpikeGPTModel, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """a and o, `(C,)` each, that take the place of ln0: see the top of this file."""
    spikes = (model.emb.get_parameter("weight") >= 0).double()  # (V, C)
    ln0 = model.blocks[0].get_submodule("ln0")
    if tokens is None:
        often = spikes.new_ones(len(spikes))
    else:
        often = torch.bincount(tokens.flatten().to(spikes.device), minlength=len(spikes)).double()
    variance, mean = torch.var_mean(spikes, dim=1, correction=0)
    mu, sigma = ((often * x).sum() / often.sum() for x in (mean, (variance + ln0.eps).sqrt()))
    gain, bias = ln0.get_parameter("weight"), ln0.get_parameter("bias")
    a = gain.double() / sigma
    return a.to(gain.dtype), (bias.double() - a * mu).to(gain.dtype)


def require_convertible(model: nn.Module) -> None:
    """Raise ValueError where `model` is none that `prepare` takes."""
    name = type(model).__name__
    if not isinstance(model, SpikeGPTForCausalLM | SpikeGPTForSequenceClassification):
        raise ValueError(
            f"a SpikeGPTForCausalLM or SpikeGPTForSequenceClassification is made spiking, got a {name}: of a peft "
            "model, convert what was adapted first, and adapt the result"
        )
    if adapter := next((path for path, m in model.named_modules() if isinstance(m, BaseTunerLayer)), None):
        raise ValueError(f"{adapter} has an adapter, whose A and B were trained on real numbers: convert, then adapt")
    if model.config.matrix_spikes != "none":
        raise ValueError(f"the matrices of this {name} read integer spikes already: give one that reads real numbers")
    linears = [(path, m) for path, m in model.named_modules() if path.endswith((".key", ".output", ".value"))]
    if packed := next((path for path, m in linears if type(m) is not nn.Linear), None):
        raise ValueError(f"{packed} is no plain nn.Linear: convert the model before its weights are packed")


def changed_config(model: Model, **changes) -> SpikeGPTConfig:
    """The configuration of `model` with these changes."""
    return SpikeGPTConfig.from_dict({**model.config.to_dict(), "architectures": None, **changes})


def _stacked(score: Tensor, C: int) -> Tensor:
    """`score` for integer spikes: what reads the last token above what reads the mean, where it reads both."""
    return torch.cat(score.split(C, dim=1)).contiguous()


def _of_spikes(spiking: nn.Module, of_ffn: int, amplitude: Tensor, offset: Tensor) -> dict[str, Tensor]:
    """What `spiking` has and the model that it is made of has not, by name."""
    new: dict[str, Tensor] = {}
    for name, module in spiking.named_modules():
        if isinstance(module, IntegerSpikes):
            scale, most = module.initial
            size, ffn = len(module.most), name.endswith(PARTS["ffn.value"])
            new[f"{name}.log_scale"] = amplitude.new_full((size,), math.log(scale))
            new[f"{name}.most"] = amplitude.new_full((size,), of_ffn if ffn else most)
        elif isinstance(module, IntegerNorm):
            new |= {f"{name}.offset": offset.clone(), f"{name}.centre": torch.zeros_like(offset)}
        elif isinstance(module, IntegerAmplitude):
            new[f"{name}.amplitude"] = amplitude.clone()
    return new
