"""Thresholds for a target sparsity: calibrated once, or held by a controller during training.

Both move V_theta of each module on its own, the only setting of a gate that needs no gradient. Where they left it is
saved with the adapter (`SpikeGate.get_extra_state`).
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers import TrainerCallback

from ..forward import RealTokens, hooked, run
from ..utils.inputs import require_finite
from .gate import SpikeGate, gates_of, mean

logger = logging.getLogger(__name__)


class SparsityController:
    """Holds every module's share of silent gate outputs at a target, by an integral control of its threshold.

    After each training step V_theta moves by rate * (target - silent) * scale, where `silent` is what the module's real
    tokens showed in that step and `scale` the mean of |A x| / tau there, the membrane's unit. It remembers nothing but
    the thresholds, so training that resumes needs nothing but the adapter's file. For your own loop:

        with SparsityController(model) as controller:
            for batch in batches:
                ...backward, optimizer.step()...
                controller.step()

    Args:
        model: with adapters that spike.
        target: share in (0, 1), or a schedule, a function from progress in [0, 1] to a share; None takes
            `spikelora_target_sparsity` of the adapter's configuration.
        rate: of the control. Larger follows faster and wobbles more.

    Raises:
        ValueError: no target anywhere, or a model without a gate whose threshold is free.
    """

    def __init__(self, model: nn.Module, target: float | Callable | None = None, rate: float = 0.3):
        self.model, self.rate = model, rate
        self.gates = controllable(model)
        self.target = _configured_target(model) if target is None else target
        if not callable(self.target) and (self.target is None or not 0 < self.target < 1):
            raise ValueError(
                f"a controller needs a target sparsity in (0, 1), got {self.target}: give target=, or "
                "SpikeLoraConfig(spikelora_target_sparsity=...)"
            )
        self.silent: float | None = None  # share over all modules, of what the last step moved by
        self.seen: dict[SpikeGate, Tensor] = {}  # since the last step: silent values, sum of |membrane|, values
        self.tokens, self.looking = RealTokens(model), ExitStack()

    def __enter__(self) -> "SparsityController":
        self.looking.enter_context(hooked(_hooks(self.tokens, self.gates, self._see)))
        return self

    def __exit__(self, *exception) -> None:
        self.looking.close()

    @torch.no_grad()
    def _see(self, name: str, gate: SpikeGate, inputs: tuple, spikes: Tensor) -> None:
        if not gate.training or not self.tokens.first(name):
            return
        real, current = self.tokens.real(spikes), self.tokens.real(inputs[0])
        if real is None or current is None:
            return
        count = self.tokens.count(spikes).double() * spikes.shape[-1]
        membrane = current.abs() / gate.tau_now()
        self.seen[gate] = self.seen.get(gate, 0) + torch.stack([count - (real != 0).sum(), membrane.sum(), count])

    def step(self, progress: float = 1.0) -> None:
        """Move the thresholds by what was seen since the last call; call it after each optimizer step.

        Args:
            progress: share of the training that is done, for a target that is a schedule.

        Raises:
            FloatingPointError: an activation was NaN or infinite; no threshold is moved by it.
        """
        if not self.seen:
            return
        target = self.target(progress) if callable(self.target) else self.target
        sums = torch.stack(list(self.seen.values()))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)  # every process moves the same thresholds alike
        if not bool(sums.isfinite().all()):
            raise FloatingPointError("a gate's activations are NaN or infinite: the training has diverged")
        self.silent = float(sums[:, 0].sum() / sums[:, 2].sum().clamp(min=1))
        for gate, (silent, size, count) in zip(self.seen, sums.tolist(), strict=True):
            if count:
                moved = gate.v_threshold + self.rate * (target - silent / count) * size / count
                gate.v_threshold = max(moved, gate.v_reset or 0.0)
        self.seen.clear()


class SparsityCallback(TrainerCallback):
    """`SparsityController` in a transformers Trainer; the arguments are the same.

    The Trainer's log history gets "train_sparsity": the silent share of the step before each entry.
    """

    def __init__(self, target: float | Callable | None = None, rate: float = 0.3):
        self.target, self.rate, self.controller = target, rate, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.controller is not None:  # of a training that was broken off
            self.controller.__exit__()
        self.controller = SparsityController(model, self.target, self.rate).__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self.controller.step(state.global_step / max(1, state.max_steps))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.controller.silent is not None and "loss" in (logs or {}):
            state.log_history[-1]["train_sparsity"] = self.controller.silent

    def on_train_end(self, args, state, control, **kwargs):
        self.controller.__exit__()


@torch.no_grad()
def calibrate_thresholds(model: nn.Module, batches: Iterable[Mapping], sparsity: float) -> dict[str, float]:
    """Set each module's V_theta so that `sparsity` of its gate's outputs are silent on `batches`, the first few of the
    training data, say; returns the thresholds by gate.

    In pointwise time that is a quantile of A x. In token time a spike changes what comes after it, so the threshold is
    found by bisection. Best before training, while B is 0 and no adapter disturbs another one's input.

    Args:
        batches: what the model takes; read once, in evaluation mode.

    Raises:
        ValueError: `sparsity` not in (0, 1), no batch, activations that are not finite, or a model without a gate whose
            threshold is free.
    """
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity must be in (0, 1), got {sparsity}")
    recorded = _record(model, controllable(model), batches)
    for gate, runs in recorded.values():
        gate.v_threshold = _quantile(gate, runs, sparsity) if gate.from_rest else _bisect(gate, runs, sparsity)
    thresholds = {name: gate.v_threshold for name, (gate, _) in recorded.items()}
    low = [name for name, (gate, _) in recorded.items() if gate.v_threshold <= (gate.v_reset or 0.0)]
    if low:
        logger.warning("more silent than %g with a threshold of %g: %s", sparsity, thresholds[low[0]], ", ".join(low))
    return thresholds


def controllable(model: nn.Module) -> dict[str, SpikeGate]:
    """The gates whose threshold may be moved, by name.

    Raises:
        ValueError: there are none.
    """
    gates = {name: gate for name, gate in gates_of(model) if gate.raw_threshold is None}
    if not gates:
        raise ValueError(f"{type(model).__name__} has no spiking adapter whose threshold is free (not learned)")
    return gates


def _hooks(tokens: RealTokens, gates: dict[str, SpikeGate], see: Callable) -> Iterator:
    """Lets `see(name, gate, inputs, spikes)` be called wherever one of `gates` is."""
    yield tokens.attach()
    for name, gate in gates.items():
        yield gate.register_forward_hook(partial(see, name))


def _configured_target(model: nn.Module) -> float | None:
    configs = getattr(model, "peft_config", {})
    return next((getattr(config, "spikelora_target_sparsity", None) for config in configs.values()), None)


def _record(model: nn.Module, gates: dict[str, SpikeGate], batches: Iterable[Mapping]) -> dict:
    """Of each gate that saw tokens: itself, and the activations and mask of each batch."""
    recorded: dict[str, tuple[SpikeGate, list]] = {}
    tokens = RealTokens(model)

    def see(name, gate, inputs, output):
        if tokens.first(name) and tokens.real(output) is not None:
            require_finite({name: inputs[0]}, "what calibration reads")
            recorded.setdefault(name, (gate, []))[1].append((inputs[0].detach(), tokens.mask))

    with hooked(_hooks(tokens, gates, see)):
        for batch in batches:
            run(model, batch, batch.keys() - {"labels"})
    if not recorded:
        raise ValueError("calibration needs at least one batch with a real token")
    return recorded


def _quantile(gate: SpikeGate, runs: list, sparsity: float) -> float:
    values = torch.cat([(a if mask is None else a[mask]).flatten() for a, mask in runs]).double()
    rest, tau = gate.v_reset or 0.0, mean(gate.tau_now())
    at = values.kthvalue(min(len(values), 1 + round(sparsity * len(values)))).values
    return max(rest, rest + float(at) / tau)


def _bisect(gate: SpikeGate, runs: list, sparsity: float) -> float:
    rest = gate.v_reset or 0.0
    low, high = rest, rest + max(float(a.abs().max()) for a, _ in runs) + 1e-6  # a membrane never exceeds max |a|
    for _ in range(20):
        gate.v_threshold = (low + high) / 2
        silent, count = 0.0, 0
        for a, mask in runs:
            spikes, _ = gate.step(a, mask=mask)
            spikes = spikes if mask is None else spikes[mask]
            silent, count = silent + float((spikes == 0).sum()), count + spikes.numel()
        low, high = (low, gate.v_threshold) if silent / count > sparsity else (gate.v_threshold, high)
    return (low + high) / 2
