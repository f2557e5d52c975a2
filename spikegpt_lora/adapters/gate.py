"""SN, the spiking gate of an adapter: which units of A x may pass, at which token.

    charge   h[t] = v[t-1] + (a[t] - (v[t-1] - v_reset)) / tau          a = A x, r units
    fire     s[t] = 1[h[t] >= V_theta]                                  backward: ATan surrogate
    reset    v[t] = v_reset where s[t] = 1, else h[t]                   v_reset None: h[t] - s[t] V_theta

"pointwise" (SpikeLoRA's code, eq. 5): every token is a first step from rest, so unit j fires where
a_j >= v_reset + tau (V_theta - v_reset). "token": the equations as they stand, along the sequence; v is at rest before
its first token, and a masked step does not exist.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..neurons.lif import LIF
from . import sequence


class SpikeGate(LIF):
    """The gate of one adapter in one module.

    Args:
        units: r.
        adapter: its name.
        binary: the spike alone goes to B, not spike times activation.
        time: "pointwise" or "token".
        learn: "none", "threshold", "tau" or "both".
        per_rank: a threshold and a tau for each unit, not for all of them.
    """

    def __init__(
        self,
        units: int,
        adapter: str = "default",
        binary: bool = False,
        time: str = "pointwise",
        tau: float = 2.0,
        v_threshold: float = 0.1,
        v_reset: float | None = 0.0,
        surrogate_alpha: float = 2.0,
        detach_reset: bool = True,
        learn: str = "none",
        per_rank: bool = False,
    ):
        super().__init__(tau, v_threshold, v_reset, True, detach_reset, surrogate_alpha)
        self.units, self.adapter, self.binary, self.time = units, adapter, binary, time
        size = units if per_rank else 1
        # softplus keeps a threshold above the reset value and a tau above 1, whatever the optimizer does.
        rest = v_reset or 0.0
        self.raw_threshold = _raw(v_threshold - rest, size) if learn in ("threshold", "both") else None
        self.raw_tau = _raw(tau - 1.0, size) if learn in ("tau", "both") else None

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
        if self.time == "pointwise":
            # Nothing couples tokens or units, so the kernel may see them as one row.
            return self._first_step(a) if self.learns else self._fire(a.reshape(1, 1, -1)).view_as(a)
        tokens = sequence.current()
        mask, membrane = tokens.of(self, a)
        if self.learns:
            spikes, membranes = self._scan(a, membrane, mask)
            membrane = membranes[:, -1]
        else:
            carry = [membrane]
            spikes, membrane = self._fire(a, carry, mask), carry[0]
        tokens.after[self] = membrane
        return spikes

    def passed(self, a: Tensor) -> Tensor:
        """What goes to B: spike times activation, or of a binary gate the spike."""
        spikes = self(a)  # through __call__: observers see them
        return spikes if self.binary else spikes * a

    @torch.no_grad()
    def membranes(self, a: Tensor) -> Tensor:
        """The membrane after each token, `(..., r)`, for the activations that `forward` takes; token by token, slow."""
        if self.time == "pointwise":
            flat = a.reshape(-1, 1, self.units)
            return self._scan(flat, None, None)[1].view_as(a)
        mask, membrane = sequence.current().of(self, a)
        return self._scan(a, membrane, mask)[1]

    def get_extra_state(self) -> Tensor:
        """V_theta, saved with the adapter: a controller or a calibration may have moved it."""
        return torch.tensor(self.v_threshold, dtype=torch.float64)

    def set_extra_state(self, state: Tensor):
        """Take V_theta from a file.

        Raises:
            ValueError: it is none that a configuration could have.
        """
        rest, number = self.v_reset or 0.0, isinstance(state, Tensor) and state.numel() == 1
        if not number or not rest <= float(state) < math.inf:
            raise ValueError(
                f"the saved threshold of a gate of adapter {self.adapter!r} must be one finite number >= {rest:g}, got "
                f"{float(state) if number else state}: the adapter's file is damaged"
            )
        self.v_threshold = float(state)

    def _first_step(self, a: Tensor) -> Tensor:
        rest, wide = self.v_reset or 0.0, a.to(torch.promote_types(a.dtype, torch.float32))
        return self.surrogate_function(rest + (wide - rest) / self.tau_now() - self.threshold_now()).to(a.dtype)

    def _scan(self, a: Tensor, v: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Spikes, and the membrane after each token, both `(B, T, r)`. In plain torch, token by token: the kernel takes
        no tau or threshold that has a gradient."""
        rest, wide = self.v_reset or 0.0, a.to(torch.promote_types(a.dtype, torch.float32))
        v = torch.full_like(wide[:, 0], rest) if v is None else v.to(wide.dtype)
        threshold, tau, spikes, membranes = self.threshold_now(), self.tau_now(), [], []
        for t in range(a.shape[1]):
            h = v + (wide[:, t] - (v - rest)) / tau
            s = self.surrogate_function(h - threshold)
            fired = s.detach() if self.detach_reset else s
            after = h - fired * threshold if self.v_reset is None else (1 - fired) * h + fired * rest
            if mask is not None:
                real = mask[:, t, None]
                s, after = s * real, torch.where(real, after, v)
            v = after
            spikes.append(s)
            membranes.append(v)
        return torch.stack(spikes, dim=1).to(a.dtype), torch.stack(membranes, dim=1)


def _raw(value: float, size: int) -> nn.Parameter:
    """A parameter whose softplus is `value` > 0."""
    return nn.Parameter(torch.full((size,), value + math.log(-math.expm1(-value))))


def mean(value: float | Tensor) -> float:
    """Of a gate's setting: the number, or the mean of what was learned."""
    return float(torch.as_tensor(value).detach().mean())
