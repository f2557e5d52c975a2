"""Rivals of the spiking gate: SpikeLoRA's layer with another rule of what passes, to tell what the spike itself is good
for. They are no settings of `SpikeLoraConfig`: they are there to be compared with.

threshold   1[a >= tau V_theta] a with the plain gradient of that product: SpikeLoRA's gate, forward to the bit, without
            its surrogate. A closed unit learns nothing.
top-k       of the r units of a = A x the k largest pass at each token, with the gradient 1; no threshold
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..adapters.gate import SpikeGate, gates_of


class ThresholdGate(SpikeGate):
    """The gate of `gate`'s module without its surrogate."""

    def __init__(self, gate: SpikeGate) -> None:
        super().__init__(gate.units, gate.adapter, time=gate.time, settings=gate.settings)

    def forward(self, a: Tensor) -> Tensor:
        """As `SpikeGate.forward`, without a gradient."""
        with torch.no_grad():
            return super().forward(a)


class TopKGate(SpikeGate):
    """In place of `gate`, k of its units pass at each token, `kept(units, budget)`."""

    def __init__(self, gate: SpikeGate, budget: float) -> None:
        super().__init__(gate.units, gate.adapter)
        self.k = kept(gate.units, budget)

    def forward(self, a: Tensor) -> Tensor:
        """1 where a unit is one of the k largest of its token, `(..., r)`."""
        return torch.zeros_like(a).scatter_(-1, a.detach().topk(self.k).indices, 1.0)

    def get_extra_state(self) -> Tensor:
        """Raises RuntimeError: whoever loaded the file would have a spiking gate in its place."""
        raise RuntimeError("an adapter with a top-k gate cannot be saved: its file would be read as SpikeLoRA's")


def kept(units: int, budget: float) -> int:
    """How many of `units` are left, at least one, where the share `budget` of them is silent."""
    return max(1, round(units * (1 - budget)))


def swap_gates(model: nn.Module, rival: Callable[[SpikeGate], SpikeGate]) -> None:
    """Put `rival(gate)` in the place of every spiking gate of `model`.

    Raises:
        ValueError: it has none.
    """
    gates = list(gates_of(model))
    if not gates:
        raise ValueError(f"{type(model).__name__} must have spiking adapters for their gates to be swapped, found none")
    for path, gate in gates:
        place, _, adapter = path.rpartition(".")
        holder = model.get_submodule(place)
        assert isinstance(holder, nn.ModuleDict)
        holder[adapter] = rival(gate)
