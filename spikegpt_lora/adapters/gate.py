"""SN, the spiking gate of an adapter: which units of A x may pass, at which token.

Its neurons are LIF neurons (see `neurons.lif.NeuronParameters`) with the current a = A x, r units.

"pointwise" (SpikeLoRA's code, eq. 5): every token is a first step from rest, so unit j fires where
a_j >= tau (V_theta - v_reset). "token": the equations as they stand, along the sequence; v is at rest before its first
token, and a masked step does not exist.

"graded" gates pass spike times activation to B, "binary" ones the spike. "integer" ones pass how often the unit fires,
k = floor(a / w + 1/2) in 0 ... 3, w = 2 tau (V_theta - v_reset): its first spike is where the others have theirs, and
B diag(w) reads k, so that w k stands for a wherever the threshold is. Backward, the surrogate's times k, and straight
through the rounding.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..neurons.lif import LIF, NeuronParameters, charge
from ..neurons.neuron import neurons_of
from . import sequence

DEFAULTS = NeuronParameters(v_threshold=0.1, detach_reset=True)
KINDS = ("graded", "binary", "integer")
MOST = 3  # spikes of an integer gate at one token


class SpikeGate(LIF):
    """The gate of one adapter in one module.

    Args:
        units: r.
        adapter: its name.
        kind: what goes to B, "graded", "binary" or "integer"; the last in pointwise time alone.
        time: "pointwise" or "token".
        learn: "none", "threshold", "tau" or "both".
        per_rank: a threshold and a tau for each unit, not for all of them.
        settings: of its neurons. changes: to them, by name.
    """

    def __init__(
        self,
        units: int,
        adapter: str = "default",
        kind: str = "graded",
        time: str = "pointwise",
        learn: str = "none",
        per_rank: bool = False,
        settings: NeuronParameters = DEFAULTS,
        **changes,
    ):
        super().__init__(settings, **changes)
        self.units, self.adapter, self.kind, self.time = units, adapter, kind, time
        self.worth_in_b = False  # whether B holds w already: a bundle's does, and one that was saved before w was read
        size = units if per_rank else 1
        # softplus keeps a threshold above the reset value and a tau above 1, whatever the optimizer does.
        above = self.v_threshold - (self.v_reset or 0.0)
        self.raw_threshold = _raw(above, size) if learn in ("threshold", "both") else None
        self.raw_tau = _raw(self.tau - 1.0, size) if learn in ("tau", "both") else None

    @property
    def graded(self) -> bool:
        return self.kind == "graded"

    @property
    def levels(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(range(MOST + 1)) if self.kind == "integer" else (0, 1)

    @property
    def op(self) -> str:  # type: ignore[override]
        return "integer_spikes" if self.kind == "integer" else "lif"

    @property
    def has_membrane(self) -> bool:  # type: ignore[override]
        return self.kind != "integer"

    @property
    def from_rest(self) -> bool:
        return self.time == "pointwise"

    @property
    def learns(self) -> bool:
        return self.raw_threshold is not None or self.raw_tau is not None

    def threshold_now(self) -> float | Tensor:
        """V_theta: a number, or what was learned of it, `(1,)` or `(r,)`."""
        if self.raw_threshold is None:
            return self.v_threshold
        return (self.v_reset or 0.0) + F.softplus(self.raw_threshold)

    def tau_now(self) -> float | Tensor:
        """tau in tokens: a number, or what was learned of it, `(1,)` or `(r,)`."""
        return self.tau if self.raw_tau is None else 1.0 + F.softplus(self.raw_tau)

    def forward(self, a: Tensor) -> Tensor:
        """Spikes (0 or 1) `(..., r)` for the activations a = A x `(..., r)`; in token time `(B, T, r)`.

        Raises:
            ValueError, RuntimeError: token time, and these are no tokens of a sequence (see `sequence`).
        """
        if self.store_v_seq:
            self.v_seq = self.membranes(a)
        if self.from_rest:
            # Nothing couples tokens or units, so the kernel may see them as one row.
            spikes = self._first_step(a) if self.learns else self._fire(a.reshape(1, 1, -1)).view_as(a)
            return spikes * self._count(a) if self.kind == "integer" else spikes
        tokens = sequence.current()
        mask, membrane = tokens.of(self, a)
        if self.learns:
            spikes, membranes = self.scan(a, membrane, mask)
            membrane = membranes[:, -1]
        else:
            carry = [membrane]
            spikes, membrane = self._fire(a, carry, mask), carry[0]
        tokens.after[self] = membrane
        return spikes

    def step(self, x: Tensor, membrane: Tensor | None = None, mask: Tensor | None = None):
        """As `Neuron.step`, outside a model's forward."""
        told = sequence.Sequence([self], mask=mask, before={} if membrane is None else {self: membrane})
        with sequence.bound(told):
            spikes = self(x)
        return (spikes if mask is None else spikes * mask[..., None]), told.after.get(self)

    def passed(self, a: Tensor) -> Tensor:
        """What goes to B: spike times activation, or the spikes alone."""
        spikes = self(a)  # through __call__: observers see them
        return spikes * a if self.graded else spikes

    @torch.no_grad()
    def membranes(self, a: Tensor) -> Tensor:
        """The membrane after each token, `(..., r)`, for the activations that `forward` takes; token by token, slow."""
        if self.from_rest:
            flat = a.reshape(-1, 1, self.units)
            return self.scan(flat, None, None)[1].view_as(a)
        mask, membrane = sequence.current().of(self, a)
        return self.scan(a, membrane, mask)[1]

    def node(self) -> dict:
        if self.kind != "integer":
            return super().node()
        scales = torch.as_tensor(self._worth()).detach().double().expand(self.units).tolist()
        settings = {"scale": scales, "most": [MOST] * self.units, "signed": False, "squared": False}
        return settings | {"levels": list(self.levels)}

    def outwards(self, b: Tensor) -> Tensor:
        """What multiplies the spikes, `(outputs, r)`: of an integer gate B diag(w), of others B."""
        return b if self.kind != "integer" or self.worth_in_b else b * self._worth()

    def _worth(self) -> float | Tensor:
        """What one spike of an integer gate stands for, w: a number, `(1,)` or `(r,)`."""
        return 2 * self.tau_now() * (self.threshold_now() - (self.v_reset or 0.0))

    def _count(self, a: Tensor) -> Tensor:
        """How often units that fire do so, 1 ... MOST."""
        u = torch.clamp(a.to(torch.promote_types(a.dtype, torch.float32)) / self._worth(), max=MOST + 0.5)
        count = torch.clamp(torch.floor(u.detach() + 0.5), 1, MOST)
        return (u + (count - u.detach())).to(a.dtype)

    def get_extra_state(self) -> Tensor:
        """V_theta, saved with the adapter: a controller or a calibration may have moved it. Of an integer gate also
        whether B holds w."""
        state = [self.v_threshold, float(self.worth_in_b)] if self.kind == "integer" else self.v_threshold
        return torch.tensor(state, dtype=torch.float64)

    def set_extra_state(self, state: Tensor):
        """Take from a file what `get_extra_state` gives; an integer gate's V_theta alone is of a file that was written
        before B was multiplied by w.

        Raises:
            ValueError: it is none that a configuration could have.
        """
        rest, sizes = self.v_reset or 0.0, (1, 2) if self.kind == "integer" else (1,)
        saved = state.flatten().tolist() if isinstance(state, Tensor) else [state]
        if not isinstance(state, Tensor) or len(saved) not in sizes or not rest <= saved[0] < math.inf:
            raise ValueError(
                f"the saved threshold of a gate of adapter {self.adapter!r} must be one finite number >= {rest:g}, got "
                f"{', '.join(map(str, saved))}: the adapter's file is damaged"
            )
        self.v_threshold, self.worth_in_b = saved[0], self.kind == "integer" and saved[1:] != [0.0]

    def _first_step(self, a: Tensor) -> Tensor:
        settings, wide = self.settings, a.to(torch.promote_types(a.dtype, torch.float32))
        h = charge(wide, settings.rest, settings)
        return self.surrogate_function(h - settings.v_threshold).to(a.dtype)


def gates_of(model: nn.Module) -> Iterator[tuple[str, SpikeGate]]:
    """The gates of all adapters of `model`, with their paths in it."""
    return ((name, neuron) for name, neuron in neurons_of(model) if isinstance(neuron, SpikeGate))


def _raw(value: float, size: int) -> nn.Parameter:
    """A parameter whose softplus is `value` > 0."""
    return nn.Parameter(torch.full((size,), value + math.log(-math.expm1(-value))))


def mean(value: float | Tensor) -> float:
    """Of a gate's setting: the number, or the mean of what was learned."""
    return float(torch.as_tensor(value).detach().mean())
