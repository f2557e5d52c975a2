"""Leaky integrate-and-fire (LIF) neurons over the tokens of a sentence, with the membrane in and out.

The neuron (equations: `NeuronParameters`) is spikingjelly's `LIFNode`; this file adds the model's layout, the mask, the
explicit membrane, settings that are learned, and a kernel that does the same operations in one pass (`cuda/lif.h`:
spikes equal bit for bit).
Source: SpikeGPT (Zhu, Zhao & Eshraghian 2023, section 3.2), upstream `src/model.py`.
"""

import math
from dataclasses import dataclass, replace

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor

from ..ops.backend import bind, untouched, use_extension
from ..ops.dropout import Dropout
from .neuron import Neuron


@dataclass(frozen=True)
class NeuronParameters:
    """The settings of a leaky integrate-and-fire neuron, handed over whole. Time is counted in tokens; currents and
    membranes are numbers without a unit.

        h[t] = v[t-1] + (x[t] - (v[t-1] - v_reset)) / tau      charge   (without the division of x if not decay_input)
        s[t] = 1[h[t] >= v_threshold]                          fire
        v[t] = h[t] where s[t] = 0, v_reset where s[t] = 1     reset    (v_reset None: h[t] - s[t] v_threshold)
        ds/dh = alpha/2 / (1 + (pi/2 alpha (h - v_threshold))^2)        backward: ATan surrogate

    tau: membrane time constant in tokens, > 1.
    v_threshold: V_theta, the membrane at which a neuron fires.
    v_reset: the membrane after a spike, and at rest; None: a spike subtracts the threshold ("soft reset"), rest is 0.
    decay_input: the input current x is divided by tau too.
    surrogate_alpha: alpha, sharpness of the surrogate gradient, > 0.
    detach_reset: no gradient through the s of the reset.

    Where tau and v_threshold are learned they are tensors, `(1,)` or `(C,)`. The fields stand in the order of the
    operators' schemas (`cuda/ops.cpp`).
    """

    tau: float | Tensor = 2.0
    v_threshold: float | Tensor = 1.0
    v_reset: float | None = 0.0
    decay_input: bool = True
    surrogate_alpha: float = 2.0
    detach_reset: bool = False

    @property
    def rest(self) -> float:
        """The membrane before the first token."""
        return self.v_reset or 0.0

    def rules(self, prefix: str = "", fires_at_rest: bool = False) -> list[tuple[str, str, bool]]:
        """What the settings must be, in the form of `utils.checks`; `prefix` stands before their names.

        Args:
            fires_at_rest: the threshold may be as low as the membrane at rest.
        """
        above = (f"above {prefix}v_reset", bool(self.v_threshold > self.rest))
        if fires_at_rest:
            above = (f">= {prefix}v_reset, at least 0", bool(self.v_threshold >= self.rest))
        return [
            (f"{prefix}tau", "> 1", bool(self.tau > 1)),
            (f"{prefix}v_threshold", *above),
            (f"{prefix}surrogate_alpha", "> 0", self.surrogate_alpha > 0),
        ]


class LIF(Neuron, neuron.LIFNode):
    """spikingjelly's `LIFNode` on `(B, T, C)` input whose membrane never outlives a call, unless that is asked for.

    `forward` returns the spikes alone, so spikingjelly's monitors and plain forward hooks see what they expect;
    `step` returns the membrane too. The compiled kernel runs where it can be built; spikingjelly's code runs elsewhere,
    and for a surrogate function other than ATan.

    With `store_v_seq = True` each call leaves `v_seq` `(B, T, C)`, the membrane after each token, and `v` `(B, C)`, the
    last one, for monitors; detached (`step` returns the one with a gradient), computed a second time in plain torch,
    and read by no later call. `functional.reset_net` forgets them. Where none is stored, `v` and `v_seq` are an
    AttributeError that says so.

    Args:
        settings: kept as the attributes that spikingjelly has them in.
        changes: to the settings, by name.
    """

    op = "lif"

    def __init__(self, settings: NeuronParameters = NeuronParameters(), **changes) -> None:
        settings = replace(settings, **changes)
        super().__init__(
            tau=float(settings.tau),
            decay_input=settings.decay_input,
            v_threshold=float(settings.v_threshold),
            v_reset=None if settings.v_reset is None else float(settings.v_reset),
            surrogate_function=surrogate.ATan(settings.surrogate_alpha),
            detach_reset=settings.detach_reset,
            step_mode="m",
        )

    @property
    def settings(self) -> NeuronParameters:
        """As they are now; of a neuron that learns some, those with their gradient."""
        return NeuronParameters(
            tau=self.tau_now(),
            v_threshold=self.threshold_now(),
            v_reset=self.v_reset,
            decay_input=self.decay_input,
            surrogate_alpha=getattr(self.surrogate_function, "alpha", math.nan),  # another than ATan may have none
            detach_reset=self.detach_reset,
        )

    def threshold_now(self) -> float | Tensor:
        """V_theta, `(1,)` or `(C,)` where it is learned."""
        return self.v_threshold

    def tau_now(self) -> float | Tensor:
        """tau in tokens, `(1,)` or `(C,)` where it is learned."""
        return self.tau

    def node(self) -> dict:
        settings = self.settings
        if not settings.decay_input:
            raise ValueError("must divide its input by tau (lif_decay_input): the graph's neuron does")
        return {
            "tau": _number(settings.tau),
            "v_threshold": _number(settings.v_threshold),
            "v_reset": settings.rest if self.from_rest else settings.v_reset,  # from rest, no reset is ever seen
            "from_rest": self.from_rest,
        } | super().node()

    def step(self, x: Tensor, membrane: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `Neuron.step`.

        Raises:
            ValueError: x is not `(B, T, C)` with T >= 1, or membrane or mask does not fit it.
        """
        carry: list = [membrane]
        spikes = self(x, carry, mask)  # through __call__: hooks and monitors must see these spikes
        return spikes, carry[0]

    def forward(self, x: Tensor, carry: list | None = None, mask: Tensor | None = None) -> Tensor:
        """Spikes `(B, T, C)` for the current `(B, T, C)`; `carry` is the one-element list in which `step` hands over
        the membrane and takes it back."""
        membrane = carry[0] if carry else None
        spikes = self._fire(x, carry, mask)
        if self.store_v_seq:
            with torch.no_grad():
                self.v_seq = self.scan(x, membrane, mask)[1]
        return spikes

    def _fire(self, x, carry=None, mask=None):
        membrane = carry[0] if carry else None
        _check_shapes(x, membrane, mask)
        if self._has_kernel() and use_extension("auto", x.device):
            spikes, membrane = torch.ops.spikegpt_lora.lif(*self._kernels_arguments(x, membrane, mask))
        elif mask is None:
            spikes, membrane, _ = self._run(x, self._membrane_before(x, membrane), store_v_seq=False)
        else:
            spikes, membrane = self._run_real_steps(x, self._membrane_before(x, membrane), mask)
        if carry is not None:
            carry[0] = membrane
        return spikes.to(x.dtype)

    @property
    def v_seq(self) -> Tensor:
        return self.__getattr__("v_seq")

    @v_seq.setter
    def v_seq(self, membranes: Tensor | None) -> None:
        self._v_seq = membranes

    def __getattr__(self, name: str):
        if name not in ("v", "v_seq"):
            return super().__getattr__(name)
        stored = self.__dict__.get("_v_seq")
        if stored is None:
            raise AttributeError(
                f"{type(self).__name__} holds no {name}: set store_v_seq = True on it, and run it, to have its "
                "membranes stored"
            )
        return stored if name == "v_seq" else stored[..., -1, :]

    def detach(self) -> None:
        """Nothing to do: what is stored has no gradient."""

    def scan(self, x: Tensor, membrane: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Spikes, and the membrane after each token, both `(B, T, C)`. In plain torch, token by token: for settings
        that are learned (the kernel takes none that has a gradient) and for whoever wants every membrane."""
        settings, wide = self.settings, x.to(torch.promote_types(x.dtype, torch.float32))
        v, threshold = self._membrane_before(x, membrane), settings.v_threshold
        spikes, membranes = [], []
        for t in range(x.shape[1]):
            h = charge(wide[:, t], v, settings)
            s = self.surrogate_function(h - threshold)
            fired = s.detach() if settings.detach_reset else s
            after = h - fired * threshold if settings.v_reset is None else (1 - fired) * h + fired * settings.rest
            if mask is not None:
                real = mask[:, t, None]
                s, after = s * real, torch.where(real, after, v)
            v = after
            spikes.append(s)
            membranes.append(v)
        return torch.stack(spikes, dim=1).to(x.dtype), torch.stack(membranes, dim=1)

    def add(
        self,
        residual: Tensor,
        x: Tensor,
        membrane: Tensor | None = None,
        mask: Tensor | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream `(B, T, C)` with the spikes for the current x added, and then `dropout`; and the
        membrane, as `step`. One pass over memory, where nobody looks at the spikes themselves."""
        if not self._adds_in_one_pass(residual, x, dropout):
            spikes, membrane = self.step(x, membrane, mask)
            return residual + spikes if dropout is None else dropout(residual + spikes), membrane
        _check_shapes(x, membrane, mask)
        seed, p = (None, 0.0) if dropout is None or not dropout.drops else (dropout.seed(x.device), dropout.p)
        return torch.ops.spikegpt_lora.lif_add(residual, *self._kernels_arguments(x, membrane, mask), seed, p)

    def _adds_in_one_pass(self, residual, x, dropout):
        return (
            self.is_unobserved_kernel()
            and residual.dtype in (x.dtype, torch.promote_types(x.dtype, torch.float32))
            and (dropout is None or (untouched(dropout, Dropout) and dropout.p < 1 and not dropout.inplace))
            and use_extension("auto", x.device)
        )

    def is_unobserved_kernel(self) -> bool:
        """Whether the kernel does all that it does, and nobody looks at its spikes: another operator may do it too."""
        return untouched(self, LIF) and not self.store_v_seq and self._has_kernel()

    def _has_kernel(self) -> bool:
        return type(self.surrogate_function) is surrogate.ATan and self.surrogate_function.spiking

    def _kernels_arguments(self, x, membrane, mask):
        if membrane is not None:
            membrane = membrane.to(torch.promote_types(x.dtype, torch.float32))
        return x, membrane, mask, *vars(self.settings).values()

    def _membrane_before(self, x, membrane):
        dtype = torch.promote_types(x.dtype, torch.float32)
        if membrane is None:
            return x.new_full((x.shape[0], x.shape[2]), self.v_reset or 0.0, dtype=dtype)
        return membrane.to(dtype)

    def _run_real_steps(self, x, membrane, mask):
        order = real_steps_first(mask)
        spikes, _, trace = self._run(_take(x, order), membrane, store_v_seq=True)
        count = mask.sum(dim=1)  # (B,)
        rows = torch.arange(len(count), device=x.device)
        after = torch.cat([membrane[None], trace])[count, rows]  # count 0: the membrane as it came
        return _take(spikes, order.argsort(dim=1)) * mask[..., None], after

    def _run(self, x, membrane, store_v_seq):
        spikes, membrane, trace = functional.lif_multi_step(
            x.to(membrane.dtype).transpose(0, 1).contiguous(),  # spikingjelly's layout: (T, B, C)
            membrane,
            self.tau,
            self.decay_input,
            self.v_threshold,
            self.v_reset,
            self.surrogate_function,
            self.detach_reset,
            store_v_seq,
        )
        return spikes.transpose(0, 1), membrane, trace


def charge(x: Tensor, v: Tensor | float, settings: NeuronParameters) -> Tensor:
    """The membrane h before the neuron may fire, for the membrane v after the last token."""
    leak = v - settings.rest
    return v + (x - leak) / settings.tau if settings.decay_input else v - leak / settings.tau + x


def real_steps_first(mask: Tensor) -> Tensor:
    """The order `(B, T)` that moves the real steps to the front, where the ones behind them cannot disturb them."""
    return mask.logical_not().long().argsort(dim=1, stable=True)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Rows of x `(B, T, C)` in the order `(B, T)`."""
    return x.gather(1, order[..., None].expand_as(x))


def _check_shapes(x, membrane, mask):
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"LIF input must be (B, T, C) with T >= 1, got {tuple(x.shape)}")
    B, T, C = x.shape
    if membrane is not None and membrane.shape != (B, C):
        raise ValueError(f"LIF membrane must be {(B, C)}, got {tuple(membrane.shape)}")
    if mask is not None and (mask.shape != (B, T) or mask.dtype != torch.bool):
        raise ValueError(f"LIF mask must be bool {(B, T)}, got {mask.dtype} {tuple(mask.shape)}")


def _number(value: float | Tensor) -> float | list[float]:
    """A setting as JSON: one number, or one a unit."""
    values = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
    return values[0] if len(values) == 1 else values


@bind
def _bind():
    def fake(x, *settings):
        return x.new_empty(x.shape), _state_like(x)

    def fake_add(residual, x, *rest):
        return residual.new_empty(residual.shape), _state_like(x)

    torch.library.register_fake("spikegpt_lora::lif", fake)
    torch.library.register_fake("spikegpt_lora::lif_add", fake_add)
    torch.library.register_fake("spikegpt_lora::lif_backward", fake)


def _state_like(x):
    return x.new_empty((x.shape[0], x.shape[2]), dtype=torch.promote_types(x.dtype, torch.float32))
