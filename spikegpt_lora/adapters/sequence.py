"""The mask and the membranes of the running forward, for gates in token time.

peft hands an adapter nothing but x. A gate in token time needs two things more: the mask (a step that does not exist
must not leak or fire) and, where a text is read in stretches, its membrane. Both are arguments of the model's forward,
so that is where they are taken from: hooks bind them before the forward and take them away after it, also after an
exception. Nothing outlives the call.

Gradient checkpointing runs a layer's forward again during backward, when the hooks' binding is long gone. The mask must
be what it was, so it travels with what is run again: `_checkpoint_with` wraps the function that transformers' layers
call for checkpointing, and what it checkpoints binds the same sequence anew. A membrane is never changed in place, so
running a layer twice gives the same twice.
"""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import Cache

from ..forward import bound_arguments, token_model, tokens_of
from ..model import SpikeGPTModel, SpikeGPTState
from ..utils.inputs import real_tokens, require_one_text

_current: ContextVar["Sequence | None"] = ContextVar("spikegpt_lora_sequence", default=None)


@dataclass
class Sequence:
    """What one forward of a model tells its gates.

    gates: those in token time that are active. mask: bool `(B, T)`, None where every token is real. before, after:
    membranes `(B, r)` by gate. adapter_names: of each of the B sequences, where they use different adapters. outer: the
    sequence of the forward that this one runs within.
    """

    gates: list[nn.Module]
    outer: "Sequence | None" = None
    mask: Tensor | None = None
    before: Mapping[nn.Module, Tensor] = field(default_factory=dict)
    after: dict[nn.Module, Tensor] = field(default_factory=dict)
    adapter_names: list[str] | None = None

    def of(self, gate: nn.Module, a: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Mask and membrane for `gate` and its activations a `(B, T, r)`; a membrane of None is at rest.

        Raises:
            ValueError: a is of another shape than the tokens, so it is no activation of theirs.
        """
        mask, membrane = self.mask, self.before.get(gate)
        if self.adapter_names is not None:
            rows = [row for row, name in enumerate(self.adapter_names) if name == gate.adapter]
            mask, membrane = (None if tensor is None else tensor[rows] for tensor in (mask, membrane))
        if a.dim() != 3 or (mask is not None and mask.shape != a.shape[:2]):
            tokens = "(B, T)" if mask is None else tuple(mask.shape)
            raise ValueError(
                f"a gate in token time got activations {tuple(a.shape)} for tokens {tokens}: leave this module out of "
                "target_modules, or use spikelora_time='pointwise'"
            )
        return mask, membrane


def current() -> Sequence:
    """Mask and membranes of the running forward.

    Raises:
        RuntimeError: none is running.
    """
    sequence = _current.get()
    if sequence is None:
        raise RuntimeError("a gate in token time works only inside its model's forward, which knows mask and state")
    return sequence


@contextmanager
def bound(sequence: Sequence):
    """Within it, gates in token time read mask and state of `sequence`; yields it. May be nested."""
    token = _current.set(sequence)
    try:
        yield sequence
    finally:
        _current.reset(token)


@contextmanager
def mixed(adapter_names: list[str]):
    """Within it, the sequences of a batch use the adapters of these names: each sees its own rows of mask and state."""
    sequence = _current.get()
    if sequence is not None:
        sequence.adapter_names = adapter_names
    try:
        yield
    finally:
        if sequence is not None:
            sequence.adapter_names = None


def follow(model: nn.Module) -> None:
    """From now on every forward of `model`, of transformers or with a SpikeGPTModel inside, tells its gates what they
    need. Calling it again changes nothing.

    Raises:
        ValueError: an encoder-decoder (one forward, two sequences).
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} reads two sequences in one forward: token time is for models that read one"
        )
    inner = token_model(model)
    if _before not in inner._forward_pre_hooks.values():
        inner.register_forward_pre_hook(_before, with_kwargs=True)
        inner.register_forward_hook(_after, always_call=True)


def _before(model: nn.Module, args, kwargs):
    layers = [module for module in model.modules() if hasattr(type(module), "active_gates")]
    gates = [gate for layer in layers for gate in layer.active_gates()]
    sequence = Sequence([gate for gate in gates if not gate.from_rest], _current.get())
    _current.set(sequence)  # first: `_after` takes it away whatever happens
    if sequence.gates:
        given = bound_arguments(model, args, kwargs)
        sequence.mask = _mask(given, model)
        sequence.before = _membranes(given.get("state"), sequence.gates)
        _checkpoint_with(model)


def _after(model: nn.Module, args, output):
    sequence = _current.get()
    _current.set(sequence.outer)
    outputs = output if isinstance(output, tuple) else (getattr(output, "state", None),)
    state = next((part for part in outputs if isinstance(part, SpikeGPTState)), None)
    if state is None or not sequence.gates:
        return
    if sequence.after.keys() != set(sequence.gates):
        raise ValueError(
            "a batch of several adapters in token time, or of inputs_embeds beside an embedding with one, keeps no "
            "state: give use_cache=False"
        )
    state["adapters"] = torch.cat([sequence.after[gate] for gate in sequence.gates], dim=1)


def _mask(given: Mapping, model: nn.Module) -> Tensor | None:
    """The mask of a full forward, bool `(B, T)`; raises on one that reads only a part of the sequence, or several, and
    where that cannot be seen."""
    if (tokens := tokens_of(given)) is None:
        raise ValueError("token time needs input_ids or inputs_embeds, to see which tokens there are")
    for name, value in given.items():
        if not _holds_no_past(value) and not isinstance(model, SpikeGPTModel):
            raise ValueError(
                f"token time is for full-sequence forwards: {name} holds tokens whose membranes are not known. "
                "Generate with use_cache=False"
            )
    mask = given.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise ValueError(f"token time needs an attention_mask (B, T), got {getattr(mask, 'shape', type(mask))}")
    if not isinstance(model, SpikeGPTModel):  # which looks for itself
        mask = real_tokens(mask, *tokens.shape[:2])
        require_one_text(given.get("position_ids"), mask)
    return None if mask is None else mask[:, -tokens.shape[1] :].bool()


def _holds_no_past(value) -> bool:
    """Whether an argument of another model's forward holds no earlier tokens: a number, a tensor, an empty cache."""
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return True
    if isinstance(value, Mapping):  # what a forward collects as **kwargs
        return all(map(_holds_no_past, value.values()))
    return isinstance(value, Cache) and value.get_seq_length() == 0


def _membranes(state: SpikeGPTState | None, gates: list[nn.Module]) -> dict[nn.Module, Tensor]:
    held = None if state is None else state.adapters
    if held is None:
        return {}
    sizes = [gate.units for gate in gates]
    if held.shape[-1] != sum(sizes):
        raise ValueError(
            f"state.adapters holds {held.shape[-1]} membranes, the active adapters have {sum(sizes)} units: "
            "the state is of other adapters"
        )
    return dict(zip(gates, held.split(sizes, dim=-1)))


def _checkpoint_with(model: nn.Module) -> None:
    """Let what transformers' layers checkpoint carry the current sequence along."""
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and not hasattr(checkpoint, "carries_sequence"):
            module._gradient_checkpointing_func = _carrying(checkpoint)


def _carrying(checkpoint: Callable) -> Callable:
    def run(function, *args, **kwargs):
        sequence = _current.get()
        if sequence is None:
            return checkpoint(function, *args, **kwargs)

        def again(*inputs, **named):
            with bound(sequence):
                return function(*inputs, **named)

        return checkpoint(again, *args, **kwargs)

    run.carries_sequence = True
    return run
