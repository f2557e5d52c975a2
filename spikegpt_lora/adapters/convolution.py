"""A convolution with a SpikeLoRA adapter: h = W0 * x + s B (SN(A * x) . (A * x)); binary: h = W0 * x + s B SN(A * x);
integer: h = W0 * x + s B diag(w) k(A * x).

`*` is a convolution, `.` a product of numbers. A is a convolution of W0's size, stride and padding to r channels, B
one of size 1; both are peft's, which gives W0's groups to B alone. The r channels are the units of the gate, which
looks at each place on its own: activations go to it with channels last, and come back.
"""

from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, LoraLayer
from torch import Tensor, nn
from torch.func import functional_call

from .gate import SpikeGate
from .layer import SpikeLoraVariant, SpikingLayer


def channels_last(x: Tensor, convolution: nn.Module) -> Tensor:
    """What goes into or out of `convolution`, `(..., channels, places)`, as `(..., places, channels)`."""
    return x.movedim(1 - convolution.weight.dim(), -1)


def require_same_places(name: str, convolution: nn.Module, time: str) -> None:
    """Raise where the equation would not hold for an adapter on `convolution`.

    Raises:
        ValueError: gates in token time, or A would read other places than W0; the message says `name`.
    """
    if time == "token":
        raise ValueError(
            f"token time needs a row of tokens, and {name} is a {type(convolution).__name__}, which gives places: "
            "leave it out of target_modules, or use spikelora_time='pointwise'"
        )
    if set(convolution.dilation) != {1} or convolution.padding_mode != "zeros":
        raise ValueError(
            f"{name} must have dilation 1 and padding_mode 'zeros', which are what peft gives A (its issue 3697), got "
            f"{convolution.dilation} and {convolution.padding_mode!r}: leave it out of target_modules"
        )


class SpikeLoraConvolutionVariant(SpikeLoraVariant):
    """`SpikeLoraVariant` of a convolution."""

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        a = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        gate, b = module.lora_gate[active_adapter], module.lora_B[active_adapter]
        passed = gate.passed(channels_last(a, b)).movedim(-1, 1 - b.weight.dim())
        return result + functional_call(b, {"weight": _outwards(gate, b)}, passed) * module.scaling[active_adapter]


def _outwards(gate: SpikeGate, b: nn.Module) -> Tensor:
    """The weight of B `(outputs, r / groups, 1, ...)` as the gate wants it, which takes a column a unit."""
    columns = b.weight.reshape(b.groups, -1, gate.units // b.groups).transpose(0, 1)  # (outputs / groups, groups, ...)
    return gate.outwards(columns.flatten(1)).reshape(columns.shape).transpose(0, 1).reshape(b.weight.shape)


class SpikingConvolution(SpikingLayer):
    """What every kind of convolution with SpikeLoRA adapters has beside peft's own layer for that kind."""

    variant = SpikeLoraConvolutionVariant


class SpikeLoraConv1d(SpikingConvolution, Conv1d):
    """peft's LoRA Conv1d, of torch.nn.Conv1d, whose adapters may spike."""


class SpikeLoraConv2d(SpikingConvolution, Conv2d):
    """peft's LoRA Conv2d, of torch.nn.Conv2d, whose adapters may spike."""


class SpikeLoraConv3d(SpikingConvolution, Conv3d):
    """peft's LoRA Conv3d, of torch.nn.Conv3d, whose adapters may spike."""


CONVOLUTIONS = {nn.Conv1d: SpikeLoraConv1d, nn.Conv2d: SpikeLoraConv2d, nn.Conv3d: SpikeLoraConv3d}
