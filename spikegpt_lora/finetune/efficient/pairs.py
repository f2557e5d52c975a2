"""MLPs as pairs of linear layers with hidden channels between them, and the slices of those channels.

SpikeGPT's SRFFN, and the MLPs of Llama, GPT-2 and BERT, under LoRA and SpikeLoRA or without adapters.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...adapters.layer import SpikeLoraVariant, plain_linear
from ...model import SRFFN
from ...ops.activations import squared_relu


@dataclass(eq=False)
class ChannelPair:
    """producers -> what works on each channel alone -> consumer.

    name: of the consumer in the model.
    scopes: the modules in whose forward the slices are held; the first one runs first, and S is chosen there.
    middle: what the consumer reads, of what the producers give; None where it is not known.
    between: parameters and buffers between them with a value a channel, as (module, name).
    """

    name: str
    producers: tuple[nn.Module, ...]
    consumer: nn.Module
    scopes: tuple[nn.Module, ...]
    middle: Callable[..., Tensor] | None = None
    between: tuple[tuple[nn.Module, str], ...] = ()

    @property
    def channels(self) -> int:
        return rows_of(self.consumer).shape[1]

    def read(self, *args, **kwargs) -> Tensor:
        """What the producers read, `(B, T, C)`, of what the first scope is called with."""
        return args[0] if args else next(iter(kwargs.values()))

    def hidden(self, *args, **kwargs) -> Tensor:
        """What the consumer would read, `(B, T, channels)`."""
        x = self.read(*args, **kwargs)
        return cast(Callable, self.middle)(*(producer(x) for producer in self.producers))

    def sliced(self) -> Iterator[tuple[nn.Module, str, int]]:
        """Every tensor with a value, row or column a channel: its module and name, and the dimension."""
        for producer in self.producers:
            base = base_of(producer)
            yield base, "weight", 1 if isinstance(base, Conv1D) else 0
            if base.bias is not None:
                yield base, "bias", 0
            for layer in _active(producer, "lora_B"):
                yield layer, "weight", 0
                if layer.bias is not None:
                    yield layer, "bias", 0
        base = base_of(self.consumer)
        yield base, "weight", 0 if isinstance(base, Conv1D) else 1
        for layer in _active(self.consumer, "lora_A"):
            yield layer, "weight", 1
        for module, name in self.between:
            yield module, name, -1

    def require_start(self, *args, **kwargs) -> None:
        """Raise ValueError where the first scope is called with a state that holds all channels."""

    def out_norms(self) -> Tensor:
        """Norm of W2's column of each channel."""
        return rows_of(self.consumer).norm(dim=0)


class _SRFFN(ChannelPair):
    """relu(K)^2 of SpikeGPT's SRFFN, with whatever stands between its two matrices."""

    def __init__(self, name: str, ffn: SRFFN):
        between = [(ffn, "time_mix_k")] if ffn.mixes_rows else []
        if ffn.spike_value is not None:
            between += [(ffn.spike_value, "log_scale"), (ffn.spike_value, "most")]
        super().__init__(name, (ffn.key,), ffn.value, (ffn,), squared_relu, tuple(between))

    def require_start(self, x, norm, shift=None, mask=None):
        if shift is not None and cast(SRFFN, self.scopes[0]).mixes_rows:
            raise ValueError(f"{self.name}: a step with a share of the channels begins at a text's start, got a state")

    def read(self, x, norm, shift=None, mask=None):
        """Without the token shift."""
        return norm(x)

    def hidden(self, x, norm, shift=None, mask=None):
        (k, _), _ = cast(SRFFN, self.scopes[0]).read(x, norm, shift, mask)
        return squared_relu(k)


# MLPs of transformers by the names in them: producers, consumer, what runs them, what stands between.
KNOWN: tuple[tuple[tuple[str, ...], str, tuple[str, ...], Callable[[nn.Module], Callable]], ...] = (
    (("gate_proj", "up_proj"), "down_proj", ("",), lambda mlp: lambda gate, up: mlp.act_fn(gate) * up),  # Llama
    (("c_fc",), "c_proj", ("",), lambda mlp: mlp.act),  # GPT-2
    (  # BERT
        ("intermediate.dense",),
        "output.dense",
        ("intermediate", "output"),
        lambda layer: layer.intermediate.intermediate_act_fn,
    ),
)


def find_pairs(model: nn.Module, pairs: Mapping[str, str] | None = None) -> list[ChannelPair]:
    """The MLPs of `model` in order, known ones and those that `pairs` names (see `SparseConfig`).

    Raises:
        ValueError: there is none, or one holds a layer whose slices are not those of a plain weight.
    """
    found = [pair for path, module in model.named_modules() if (pair := _known(path, module)) is not None]
    found += [pair for regex, consumer in (pairs or {}).items() for pair in _named(model, regex, consumer)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no MLP that is known (SpikeGPT's, Llama's, GPT-2's, BERT's): name its "
            "layers, pairs={regular expression of the first ones: name of the second one beside them}"
        )
    for pair in found:
        for linear in (*pair.producers, pair.consumer):
            _require_sliceable(pair.name, linear)
    return found


def _known(path: str, module: nn.Module) -> ChannelPair | None:
    if isinstance(module, SRFFN):
        return _SRFFN(f"{path}.value", module)
    for producers, consumer, scopes, middle in KNOWN:
        linears = [_submodule(module, name) for name in (*producers, consumer)]
        if all(linear is not None for linear in linears):
            *first, last = cast(list[nn.Module], linears)
            within = tuple(module.get_submodule(scope) for scope in scopes)
            return ChannelPair(f"{path}.{consumer}", tuple(first), last, within, middle(module))
    return None


def _named(model: nn.Module, regex: str, consumer: str) -> Iterator[ChannelPair]:
    parents: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        if re.fullmatch(regex, path):
            parents.setdefault(path.rpartition(".")[0], []).append(module)
    for parent, producers in parents.items():
        last = _submodule(model.get_submodule(parent), consumer)
        if last is None:
            raise ValueError(f"pairs: {parent or 'the model'} has no {consumer!r} beside what {regex!r} matches")
        yield ChannelPair(f"{parent}.{consumer}".lstrip("."), tuple(producers), last, (*producers, last))


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def base_of(linear: nn.Module) -> Any:
    return linear.get_base_layer() if isinstance(linear, BaseTunerLayer) else linear


def _active(linear: nn.Module, part: str) -> list[Any]:
    """lora_A or lora_B of the adapters that a forward would ask now."""
    if not isinstance(linear, LoraLayer):
        return []
    held = getattr(linear, part)
    return [held[name] for name in linear.active_adapters if name in held]


def rows_of(linear: nn.Module) -> Tensor:
    """W of y = W x."""
    base = base_of(linear)
    return (base.weight.t() if isinstance(base, Conv1D) else base.weight).detach()


def _require_sliceable(name: str, linear: nn.Module) -> None:
    base, variants = base_of(linear), getattr(linear, "lora_variant", {})
    if not plain_linear(base):
        raise ValueError(
            f"{name}: channels are slices of a plain weight, got {type(base).__name__}, whose weight is packed: leave "
            "the MLP as it is, or load the model without quantisation"
        )
    if isinstance(linear, BaseTunerLayer) and not isinstance(linear, LoraLayer):
        raise ValueError(f"{name}: channels can be left out under LoRA and SpikeLoRA, got {type(linear).__name__}")
    if other := next((v for v in variants.values() if not isinstance(v, SpikeLoraVariant)), None):
        raise ValueError(
            f"{name}: {type(other).__name__.removesuffix('LinearVariant')} looks at whole weights, so its slices are "
            "not the slices of what it computes: use LoRA or SpikeLoRA"
        )
