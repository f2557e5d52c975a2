"""Integer spikes executed as bit planes: what an engine does that can only add.

    k = sum_j 2^j b_j           b_j in {-1, 0, 1}: the j-th binary digit of |k|, with the sign of k
    W diag(s) k = sum_j 2^j (W diag(s)) b_j

Every product is then one of a matrix with -1, 0 and 1, called once a plane, so that whoever counts by such inputs
(NeuroBench: a call is accumulations if its whole input is -1, 0 and 1) counts accumulations.
"""

import copy
from typing import cast

import torch
from torch import Tensor, nn

from ..adapters.gate import SpikeGate
from ..model import SpikeGPTModel
from ..ops.spike_linear import SpikeLinear


class PlanesLinear(nn.Module):
    """A linear layer without bias that reads integers, as calls of `matrix` with one bit plane each.

    matrix: nn.Linear; hooks on it see planes, and while it is called its weight is W diag(scale).

    Raises, when called:
        ValueError: an input that is no whole number, or a gradient is asked for.
    """

    def __init__(self, linear: nn.Linear, name: str) -> None:
        super().__init__()
        self.matrix = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        self.matrix.weight = linear.weight
        self.name = name

    @property
    def weight(self) -> Tensor:
        return self.matrix.weight

    def forward(self, spikes: Tensor, scale: Tensor | None = None) -> Tensor:
        """k `(..., inputs)`, scale `(inputs,)` (None: 1) -> W diag(scale) k `(..., outputs)`."""
        if torch.is_grad_enabled() and (spikes.requires_grad or self.weight.requires_grad):
            raise ValueError(f"{self.name} runs as bit planes, which have no gradient: call it under torch.no_grad()")
        size = spikes.abs()
        if not torch.equal(size, size.floor()) or not size.isfinite().all():
            raise ValueError(f"{self.name} must read whole numbers to run as bit planes, got others")
        weight = self.weight if scale is None else self.weight * scale
        whole, sign = size.long(), spikes.sign()
        planes = max(1, int(whole.max()).bit_length()) if whole.numel() else 1
        parts = (
            2.0**j * torch.func.functional_call(self.matrix, {"weight": weight}, (sign * (whole >> j & 1),))
            for j in range(planes)
        )
        return sum(parts, spikes.new_zeros(()))


def as_planes(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """A copy of an integer model, for evaluation, in which every matrix that reads integer spikes reads bit planes.

    The logits are the model's, but for the order of additions. The A of an adapter reads what its W0 reads, and becomes
    planes too; the B behind a binary gate reads 0 and 1 already.

    Returns:
        the copy; and the names of the matrices that go on multiplying real numbers: B behind a graded gate or none.

    Raises:
        ValueError: the matrices of `model` read no integer spikes, its embedding has an adapter, or a linear layer is
            none that can be called with planes: the message names it.
    """
    inside = next((m for m in model.modules() if isinstance(m, SpikeGPTModel)), None)
    if inside is None or inside.config.matrix_spikes != "integer":
        raise ValueError("bit planes are of a SpikeGPT with matrix_spikes='integer': convert the model first")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    real = []
    if adapted := next((n for n, m in model.named_modules() if getattr(m, "lora_embedding_A", None)), None):
        raise ValueError(f"{adapted} has an adapter, whose B is no linear layer that could read planes: leave it out")
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        if ".lora_B." in name:
            if not _binary(model, name):
                real.append(name)
            continue
        if not (isinstance(linear, SpikeLinear) or ".lora_A." in name) or linear.bias is not None:
            raise ValueError(f"{name} must be a SpikeLinear, or an adapter's A without bias, got {linear}")
        if linear.weight.shape != (linear.out_features, linear.in_features):
            raise ValueError(f"the weight of {name} is packed, {tuple(linear.weight.shape)}: unpack it first")
        model.set_submodule(name, PlanesLinear(linear, name))
    return model, real


def _binary(model: nn.Module, b: str) -> bool:
    """Whether the B of this name reads a gate's spikes alone."""
    layer, _, adapter = b.partition(".lora_B.")
    gates = getattr(model.get_submodule(layer), "lora_gate", {})
    return adapter in gates and not cast(SpikeGate, gates[adapter]).graded
