"""Leaky integrate-and-fire (LIF) neurons over the tokens of a sentence, with the membrane in and out.

    h[t] = v[t-1] + (x[t] - (v[t-1] - v_reset)) / tau      charge   (without the division of x if decay_input is False)
    s[t] = 1[h[t] >= v_threshold]                          fire     (backward: ATan surrogate)
    v[t] = h[t] where s[t] = 0, v_reset where s[t] = 1     reset    (v_reset None: h[t] - s[t] * v_threshold)

The neuron is spikingjelly's `LIFNode`; this file adds the model's layout, the mask, the explicit membrane, and a kernel
that does the same operations in one pass (`cuda/lif.h`: spikes equal bit for bit).
Source: SpikeGPT (Zhu, Zhao & Eshraghian 2023, section 3.2), upstream `src/model.py`.
"""

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.backend import bind, use_extension


class LIF(neuron.LIFNode):
    """spikingjelly's `LIFNode` on `(B, T, C)` input whose membrane never outlives a call, unless that is asked for.

    `forward` returns the spikes alone, so spikingjelly's monitors and plain forward hooks see what they expect;
    `step` returns the membrane too. The compiled kernel runs where it can be built; spikingjelly's code runs elsewhere,
    and for a surrogate function other than ATan.

    With `store_v_seq = True` each call leaves `v_seq` `(B, T, C)`, the membrane after each token, and `v` `(B, C)`, the
    last one, for monitors; detached (`step` returns the one with a gradient), computed a second time in plain torch,
    and read by no later call. `functional.reset_net` forgets them. Where none is stored, `v` and `v_seq` are an
    AttributeError that says so.
    """

    def __init__(
        self,
        tau: float = 2.0,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        decay_input: bool = True,
        detach_reset: bool = False,
        surrogate_alpha: float = 2.0,
    ):
        super().__init__(
            tau=float(tau),
            decay_input=decay_input,
            v_threshold=float(v_threshold),
            v_reset=None if v_reset is None else float(v_reset),
            surrogate_function=surrogate.ATan(surrogate_alpha),
            detach_reset=detach_reset,
            step_mode="m",
        )

    def step(self, x: Tensor, membrane: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the neuron over a stretch of tokens.

        Args:
            x: input current `(B, T, C)`, floating point.
            membrane: `(B, C)`, the membrane after the previous stretch; None means at rest.
            mask: bool `(B, T)`; where False the time step does not exist: no spike, membrane carried, no gradient.

        Returns:
            spikes `(B, T, C)` in x's dtype, membrane `(B, C)` after the last real step (float32, or float64 for
            float64 input).

        Raises:
            ValueError: x is not `(B, T, C)` with T >= 1, or membrane or mask does not fit it.
        """
        carry = [membrane]
        spikes = self(x, carry, mask)  # through __call__: hooks and monitors must see these spikes
        return spikes, carry[0]

    def forward(self, x: Tensor, carry: list | None = None, mask: Tensor | None = None) -> Tensor:
        """Spikes `(B, T, C)` for the current `(B, T, C)`; `carry` is the one-element list in which `step` hands over
        the membrane and takes it back."""
        membrane = carry[0] if carry else None
        spikes = self._fire(x, carry, mask)
        if self.store_v_seq:
            self.v_seq = self._membranes(x, membrane, mask)
        return spikes

    def _fire(self, x, carry=None, mask=None):
        membrane = carry[0] if carry else None
        _check_shapes(x, membrane, mask)
        if self._has_kernel() and use_extension("auto", x.device):
            spikes, membrane = self._run_kernel(x, membrane, mask)
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
    def v_seq(self, membranes: Tensor | None):
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

    def detach(self):
        """Nothing to do: what is stored has no gradient."""

    @torch.no_grad()
    def _membranes(self, x, membrane, mask):
        """The membrane after each token `(B, T, C)`; a masked one leaves it as it was."""
        real = mask if mask is not None else x.new_ones(x.shape[:2], dtype=torch.bool)
        order, before = _real_first(real), self._membrane_before(x, membrane)
        after = torch.cat([before[None], self._run(_take(x, order), before, store_v_seq=True)[2]])  # (T + 1, B, C)
        return after[real.cumsum(dim=1), torch.arange(len(x), device=x.device)[:, None]]

    def _has_kernel(self) -> bool:
        return type(self.surrogate_function) is surrogate.ATan and self.surrogate_function.spiking

    def _run_kernel(self, x, membrane, mask):
        if membrane is not None:
            membrane = membrane.to(torch.promote_types(x.dtype, torch.float32))
        return torch.ops.spikegpt_lora.lif(
            x,
            membrane,
            mask,
            self.tau,
            self.v_threshold,
            self.v_reset,
            self.decay_input,
            self.surrogate_function.alpha,
            self.detach_reset,
        )

    def _membrane_before(self, x, membrane):
        dtype = torch.promote_types(x.dtype, torch.float32)
        if membrane is None:
            return x.new_full((x.shape[0], x.shape[2]), self.v_reset or 0.0, dtype=dtype)
        return membrane.to(dtype)

    def _run_real_steps(self, x, membrane, mask):
        order = _real_first(mask)
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


def _real_first(mask: Tensor) -> Tensor:
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


@bind
def _bind():
    def fake(x, *settings):
        return x.new_empty(x.shape), _state_like(x)

    def setup(ctx, inputs, output):
        x, membrane, mask, *ctx.settings = inputs
        ctx.save_for_backward(x, membrane, mask)

    @once_differentiable
    def backward(ctx, grad_spikes, grad_membrane):
        x, membrane, mask = ctx.saved_tensors  # once: gradient checkpointing allows no second look
        grad_x, grad_membrane = torch.ops.spikegpt_lora.lif_backward(
            x, membrane, mask, *ctx.settings, grad_spikes, grad_membrane
        )
        return grad_x, None if membrane is None else grad_membrane, *[None] * 7

    torch.library.register_fake("spikegpt_lora::lif", fake)
    torch.library.register_fake("spikegpt_lora::lif_backward", fake)
    torch.library.register_autograd("spikegpt_lora::lif", backward, setup_context=setup)


def _state_like(x):
    return x.new_empty((x.shape[0], x.shape[2]), dtype=torch.promote_types(x.dtype, torch.float32))
