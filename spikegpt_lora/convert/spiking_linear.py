"""A linear layer of any model behind integer spikes: what stands in the place of nn.Linear and of Conv1D.

    q = neuron((x - o) / s)                        integers, and all that the matrix reads
    y = s (W diag(d) q) + W o + b                  s of each token; d: 1 a channel, 1 / T a salient one

One `IntegerSpikes` (neurons/multilevel.py) fires q: in -K ... K, or in 0 ... K; T K instead of K where a channel is
salient, so that its steps are T times finer. What is real-valued stands before it and after the product. With static
steps s = 1, and d are the steps s_c themselves.

Signed integers need no zero point: o = 0, and 0 fires nothing. With one (SpikeLLM) o = -z s d, z whole numbers, and 0
fires z: two numbers a token, one of plain and one of salient channels, and with static steps a constant a channel. Each
channel's own is taken off: the published code once took that of salient channels off all.

An integer of a salient channel is T spikes of at most K, one after the other (`spike_steps`): the matrix may read them
one by one, y = s (W diag(d) q_1 + ... + W diag(d) q_T) + ...
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..neurons.multilevel import IntegerSpikes
from ..ops.spike_linear import SpikeLinear

SMALLEST = 1e-8  # a token's step, where all of it is 0


def spike_steps(integers: Tensor, most: int, steps: int) -> Tensor:
    """The spikes `(steps, ...)` whose sum `integers` are, each in -most ... most, the first ones as large as they may.

    Raises:
        ValueError: an integer that so many such spikes cannot sum to.
    """
    if (largest := int(integers.abs().max()) if integers.numel() else 0) > most * steps:
        raise ValueError(f"{steps} spikes of at most {most} reach {most * steps}, got {largest}: take more of them")
    left, spikes = integers, []
    for _ in range(steps):
        spikes.append(left.clamp(-most, most))
        left = left - spikes[-1]
    return torch.stack(spikes)


def matrix_of(linear: nn.Module) -> Tensor:
    """The matrix `(outputs, inputs)` of nn.Linear, of transformers' Conv1D, which holds its transpose, or of a
    SpikingLinear."""
    weight = linear.get_parameter("linear.weight" if isinstance(linear, SpikingLinear) else "weight").detach()
    return weight.T if isinstance(linear, Conv1D) else weight


class SpikingLinear(nn.Module):
    """Neurons, and the linear layer that reads their integers.

    Buffers: offset `(inputs,)`, o of static steps.

    Args:
        linear: nn.Linear or Conv1D; its weight and bias are taken over.
        neuron: of as many channels as it has inputs; with steps by token its scales are d, else s_c.
        base: K of a channel that is not salient.
        by_token: whether steps are a token's own, from its smallest and largest value.
        zero_point: whether they begin at the smallest value instead of 0; the neuron is then one-sided.
    """

    offset: Tensor

    def __init__(
        self, linear: nn.Module, neuron: IntegerSpikes, base: int, by_token: bool = True, zero_point: bool = False
    ) -> None:
        super().__init__()
        weight = matrix_of(linear)
        outputs, inputs = weight.shape
        self.base, self.by_token, self.zero_point = base, by_token, zero_point
        self.neuron = neuron
        with torch.device("meta"):
            self.linear = SpikeLinear(inputs, outputs)
        self.linear.weight = nn.Parameter(weight.contiguous())
        self.bias = linear.bias
        self.register_buffer("offset", weight.new_zeros(inputs))

    @property
    def weight(self) -> Tensor:
        """`(outputs, inputs)`: some models look at its dtype."""
        return self.linear.weight

    @property
    def steps(self) -> int:
        """T of its salient channels: the most spikes that one integer is sent as."""
        return -(-int(self.neuron.most.max()) // self.base)

    @property
    def salient(self) -> Tensor:
        """Which channels have more steps, bool `(inputs,)`."""
        return self.neuron.most > self.base

    @torch.no_grad()
    def token_steps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """s `(..., 1)` of each token of x `(..., inputs)`; o `(..., 2)` of its plain and of its salient channels."""
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
        if self.zero_point:
            step = ((high - low) / self.base).clamp(min=SMALLEST)
            grain = step / step.new_tensor([1, self.steps])
            return step, -torch.floor(0.5 - low / grain) * grain
        largest = torch.maximum(high, -low) if self.neuron.signed else high
        step = (largest / self.base).clamp(min=SMALLEST)
        return step, torch.zeros_like(step).expand(*step.shape[:-1], 2)

    def spikes(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor]:
        """q `(..., inputs)`, s, and W o `(..., outputs)` of x."""
        if not self.by_token:
            return self.neuron(x - self.offset), 1.0, self.linear.weight @ self.offset
        step, offset = self.token_steps(x)
        if not self.zero_point:
            return self.neuron(x / step), step, step.new_zeros(())
        salient, weight = self.salient, self.linear.weight
        sums = torch.stack([weight[:, ~salient].sum(1), weight[:, salient].sum(1)])
        return self.neuron((x - offset[..., salient.long()]) / step), step, offset @ sums

    def forward(self, x: Tensor) -> Tensor:
        """x `(..., inputs)` -> `(..., outputs)`."""
        integers, step, zeros = self.spikes(x)
        y = self.linear(integers, scale=self.neuron.scale) * step + zeros
        return y if self.bias is None else y + self.bias

    def one_by_one(self, x: Tensor) -> Tensor:
        """What `forward` gives, the matrix reading the T spikes of each integer one after the other."""
        integers, step, zeros = self.spikes(x)
        steps = spike_steps(integers, self.base, self.steps)
        y = sum(self.linear(one, scale=self.neuron.scale) for one in steps) * step + zeros
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"steps by {'token' if self.by_token else 'calibration'}, zero_point={self.zero_point}"
