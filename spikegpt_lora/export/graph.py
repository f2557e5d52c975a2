"""A SpikeGPT classifier as a list of operations and a dictionary of weights: what graph.json and weights.npz hold.

Every operation has a name, `op` (a method of `interpreter.Program`), the names of its inputs, and settings. Names are
the model's own: "blocks.0.att.key" is that linear layer, "blocks.0.lif1" are those spikes.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from spikingjelly.activation_based.surrogate import ATan
from torch import nn

from ..convert.fold import FoldedLinear, fold_scales
from ..convert.weights import MATRICES, quantize
from ..model import SRFFN, SRWKV, Block, SpikeGPTForSequenceClassification
from ..neurons.neuron import Neuron
from ..neurons.residual import IntegerAmplitude, IntegerNorm
from ..ops.dropout import Dropout
from ..ops.spike_linear import SpikeLinear
from ..ops.wkv import powers_of_two
from ..utils.files import whole_file, write_json
from .interpreter import NEURONS

SCHEMA = "spikegpt_lora/graph/1"
INTEGER_SCHEMA = "spikegpt_lora/graph/2"  # the same, and operations of models whose matrices read integer spikes
INTEGER = ("integer_spikes", "gain", "centre", "statistics", "normalise", "wkv_powers_of_two", "pool_rows")
BINARY = [0, 1]  # the levels of a population whose node names none
# Modules without children that the graph has an operation for, or that do nothing once training is over.
KNOWN = (
    nn.Linear, nn.Embedding, nn.LayerNorm, Neuron, ATan, nn.Identity, nn.Dropout, Dropout, nn.ModuleDict,
    nn.ParameterDict, IntegerAmplitude,
)  # fmt: skip


@dataclass
class Graph:
    """nodes in the order in which they run; weights by name, float32; labels of the classes."""

    nodes: list[dict] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)

    @property
    def schema(self) -> str:
        return schema_of(self.nodes)

    def add(self, name: str, op: str, inputs: list[str], **settings) -> str:
        """Append a node that reads the nodes `inputs`; returns its name, for whoever reads it."""
        self.nodes.append({"name": name, "op": op, "inputs": inputs, **settings})
        return name

    def weight(self, name: str, tensor: torch.Tensor) -> str:
        """Keep `tensor`, of any shape, as float32 under `name`; returns the name, for a node's settings."""
        self.weights[name] = tensor.detach().float().cpu().numpy()
        return name

    def save(self, folder: Path, int8: bool = False) -> None:
        """graph.json and weights.npz, what `interpreter.Program` reads.

        Args:
            int8: matrices as int8 "NAME" times a power of two "NAME/scale" (see `quantize`), vectors as they are.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "graph.json", {"schema": self.schema, "labels": self.labels, "nodes": self.nodes})
        stored = {}
        for name, weight in self.weights.items():
            if int8 and weight.ndim == 2:
                stored[name], stored[f"{name}/scale"] = quantize(weight)
            else:
                stored[name] = weight
        with whole_file(folder / "weights.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **stored)


def graph_of(model: nn.Module) -> Graph:
    """The graph of a SpikeGPT classifier, with or without LoRA or SpikeLoRA adapters. Of one whose matrices read
    integer spikes, the matrices hold what a spike stands for (`convert.fold`).

    Raises:
        ValueError: another kind of model, or a part of it that the graph has no operation for; the message names it.
    """
    if any(isinstance(module, SpikeLinear) and type(module) is not FoldedLinear for module in model.modules()):
        model = fold_scales(copy.deepcopy(model))
    classifier = next((m for m in model.modules() if isinstance(m, SpikeGPTForSequenceClassification)), None)
    if classifier is None:
        raise ValueError(f"{type(model).__name__} holds no SpikeGPTForSequenceClassification to export")
    _refuse_unknown(classifier)
    base, graph = classifier.spikegpt, Graph(labels=[str(v) for v in classifier.config.id2label.values()])
    if isinstance(base.emb, LoraLayer):
        raise ValueError("emb has an adapter, for which the graph has no operation")
    graph.weight("emb", (base.emb.weight >= 0).float())
    x = graph.add("emb", "embed_spike", ["token"], weight="emb")
    for i, block in enumerate(base.blocks):
        x = _block(graph, f"blocks.{i}", block, x)
    score, kind = _score(classifier), classifier.config.pooling
    if isinstance(base.ln_out, IntegerNorm):
        (rows,) = _rows(graph, "ln_out", base.ln_out, x, {"score": score})
        graph.add("pool", "pool_rows", [rows], kind=kind)
        return graph
    x = _layernorm(graph, "ln_out", base.ln_out, x)
    graph.weight("score", score.weight)
    graph.add("pool", "pool", [x], kind=kind, weight="score")
    return graph


def schema_of(nodes: list[dict]) -> str:
    """What graph.json says that it is: earlier versions read those without integer spikes."""
    return INTEGER_SCHEMA if any(node["op"] in INTEGER for node in nodes) else SCHEMA


def neurons_in(nodes: list[dict]) -> list[dict]:
    """The nodes that are populations of neurons, in order; the embedding, a table of spikes, is none."""
    return [node for node in nodes if node["op"] in NEURONS]


def read_real_numbers(nodes: list[dict]) -> list[str]:
    """The matrices that read anything but integers, by name."""
    by_name = {node["name"]: node for node in nodes}
    integer = ("centre", "embed_spike", *NEURONS)
    return [n["name"] for n in nodes if n["op"] == "linear" and by_name[n["inputs"][0]]["op"] not in integer]


def levels_of(node: dict) -> list[int]:
    """The values that the spikes of a node can have, in rising order."""
    return node.get("levels", BINARY)


def weights_before(nodes: list[dict], node: dict, most: int = 64) -> list[tuple[str, str]]:
    """The linear layers whose sum is this node's input, as (what they read, weight); empty if something else is.

    Args:
        most: layers; of more, or of sums of sums of the same layer, nothing is returned.
    """
    by_name = {other["name"]: other for other in nodes}
    found, names = [], [node["inputs"][0]]
    while names:
        source = by_name.get(names.pop(0))
        if source is None or source["op"] not in ("linear", "add") or len(found) + len(names) >= most:
            return []
        if source["op"] == "linear":
            found.append((source["inputs"][0], source["weight"]))
        else:
            names = source["inputs"] + names
    return found


def _refuse_unknown(classifier: nn.Module) -> None:
    for name, module in classifier.named_modules():
        if not any(True for _ in module.children()) and not isinstance(module, KNOWN):
            raise ValueError(f"{name} is a {type(module).__name__}, for which the graph has no operation")
    for name, p in classifier.named_parameters():
        if not torch.isfinite(p).all():
            raise ValueError(f"{name} holds values that are not finite: nothing computed with them means anything")


def _score(classifier: SpikeGPTForSequenceClassification) -> nn.Linear:
    score = classifier.score
    if isinstance(score, ModulesToSaveWrapper):
        off = score.disable_adapters or not score.active_adapters
        score = score.original_module if off else score.modules_to_save[score.active_adapters[0]]
    if type(score) not in MATRICES or score.bias is not None:
        raise ValueError(f"score must be a torch.nn.Linear without bias or adapter, got {score}")
    return score


def _block(graph: Graph, name: str, block: Block, x: str) -> str:
    if (type(block.att), type(block.ffn)) != (SRWKV, SRFFN):
        raise ValueError(
            f"{name} must hold SRWKV and SRFFN, got {type(block.att).__name__}, {type(block.ffn).__name__}"
        )
    if hasattr(block, "ln0"):
        x = _layernorm(graph, "ln0", block.ln0, x)
    elif hasattr(block, "amplitude0"):
        amplitude = torch.floor(block.amplitude0.amplitude + 0.5)
        x = graph.add("amplitude0", "gain", [x], weight=graph.weight("amplitude0", amplitude))
    current = _srwkv(graph, f"{name}.att", block.att, _Norm(f"{name}.ln1", block.ln1), x)
    x = graph.add(f"{name}.x1", "add", [x, _lif(graph, f"{name}.lif1", block.lif1, current)])
    current = _srffn(graph, f"{name}.ffn", block.ffn, _Norm(f"{name}.ln2", block.ln2), x)
    return graph.add(f"{name}.x2", "add", [x, _lif(graph, f"{name}.lif2", block.lif2, current)])


class _Norm(NamedTuple):
    name: str
    module: nn.LayerNorm


def _srwkv(graph: Graph, name: str, att: SRWKV, norm: _Norm, x: str) -> str:
    k, v, r = _readers(graph, name, att, norm, x)
    if att.powers_of_two:
        y = graph.add(f"{name}.wkv", "wkv_powers_of_two", [k, v], **_powers_of_two(graph, name, att))
    else:
        decay = graph.weight(f"{name}.time_decay", att.time_decay)
        first = graph.weight(f"{name}.time_first", att.time_first)
        y = graph.add(f"{name}.wkv", "wkv", [k, v], decay=decay, first=first)
    gated = graph.add(f"{name}.gated", "multiply", [graph.add(f"{name}.sigmoid", "sigmoid", [r]), y])
    return _linear(graph, f"{name}.output", att.output, _spikes(graph, f"{name}.spike_output", att.spike_output, gated))


def _powers_of_two(graph: Graph, name: str, att: SRWKV) -> dict[str, str]:
    """The decay of a token, 2^-n or 1 - 2^-n, and the exponent that time_first adds."""
    decay, first, _ = powers_of_two(att.time_decay.double(), att.time_first.double(), att.time_first.double())
    exact = torch.exp(-torch.exp(decay))
    exact = torch.round(exact * 2**15) / 2**15
    return {
        "decay": graph.weight(f"{name}.decay", exact),
        "first": graph.weight(f"{name}.first", torch.round(first / math.log(2))),
    }


def _srffn(graph: Graph, name: str, ffn: SRFFN, norm: _Norm, x: str) -> str:
    k, r = _readers(graph, name, ffn, norm, x)
    if ffn.spike_value is None:
        k = graph.add(f"{name}.squared_relu", "squared_relu", [k])
    v = _linear(graph, f"{name}.value", ffn.value, _spikes(graph, f"{name}.spike_value", ffn.spike_value, k))
    return graph.add(f"{name}.gated", "multiply", [graph.add(f"{name}.sigmoid", "sigmoid", [r]), v])


def _spikes(graph: Graph, name: str, neurons: Neuron | None, x: str) -> str:
    """The neurons before a matrix, where there are some."""
    return x if neurons is None else _lif(graph, name, neurons, x)


def _readers(graph: Graph, name: str, half: SRWKV | SRFFN, norm: _Norm, x: str) -> list[str]:
    """What the matrices behind a norm give for x, each mixed with the token before: after the product, or before."""
    linears = {reader: getattr(half, reader) for reader in half.readers}
    if half.mixes_rows:
        named = {f"{name}.{reader}": linear for reader, linear in linears.items()}
        rows = _rows(graph, norm.name, norm.module, x, named)
        return [
            _mix(graph, name, half, reader, row, graph.add(f"{name}.delay_{reader[0]}", "delay", [row]))
            for reader, row in zip(linears, rows)
        ]
    x = _layernorm(graph, norm.name, norm.module, x)
    previous, read = graph.add(f"{name}.delay", "delay", [x]), []
    for reader in linears:
        _mix(graph, name, half, reader, x, previous)
    for reader, linear in linears.items():
        mixed = _spikes(graph, f"{name}.spike_{reader}", getattr(half, f"spike_{reader}"), f"{name}.mix_{reader[0]}")
        read.append(_linear(graph, f"{name}.{reader}", linear, mixed))
    return read


def _mix(graph: Graph, name: str, half: nn.Module, reader: str, x: str, previous: str) -> str:
    letter = reader[0]
    share = graph.weight(f"{name}.time_mix_{letter}", getattr(half, f"time_mix_{letter}").flatten())
    return graph.add(f"{name}.mix_{letter}", "mix", [x, previous], weight=share)


def _rows(graph: Graph, name: str, norm: nn.LayerNorm, x: str, linears: Mapping[str, nn.Module]) -> list[str]:
    """What matrices give for the norm of x; for an integer norm they read the integers themselves."""
    if not isinstance(norm, IntegerNorm):
        x = _layernorm(graph, name, norm, x)
        return [_linear(graph, reader, linear, x) for reader, linear in linears.items()]
    offset, bias = graph.weight(f"{name}.offset", norm.offset), graph.weight(f"{name}.bias", norm.bias)
    centre = graph.weight(f"{name}.centre", norm.centre)
    moments = graph.add(f"{name}.statistics", "statistics", [x], offset=offset, eps=norm.eps)
    spikes, vectors = graph.add(name, "centre", [x], weight=centre), {"offset": offset, "centre": centre, "bias": bias}
    rows = []
    for reader, linear in linears.items():
        z = _linear(graph, reader, linear, spikes)
        rows.append(graph.add(f"{reader}.rows", "normalise", [z, moments], weight=reader, **vectors))
    return rows


def _layernorm(graph: Graph, name: str, norm: nn.LayerNorm, x: str) -> str:
    weight, bias = graph.weight(f"{name}.weight", norm.weight), graph.weight(f"{name}.bias", norm.bias)
    offset = {"offset": graph.weight(f"{name}.offset", norm.offset)} if isinstance(norm, IntegerNorm) else {}
    return graph.add(name, "layernorm", [x], weight=weight, bias=bias, **offset, eps=norm.eps)


def _linear(graph: Graph, name: str, linear: nn.Module, x: str) -> str:
    """W0 x, and what each active adapter adds to it."""
    base = linear.get_base_layer() if isinstance(linear, LoraLayer) else linear
    if type(base) not in MATRICES or base.bias is not None:
        raise ValueError(
            f"{name} must be a torch.nn.Linear without bias, got {base}: no operation of the graph is that"
        )
    y = graph.add(name, "linear", [x], weight=graph.weight(name, base.weight))
    if not isinstance(linear, LoraLayer) or linear.disable_adapters:
        return y
    if linear.merged:
        raise ValueError(
            f"{name} has its adapter merged into W0: call unmerge_adapter(), or merge_and_unload() for good"
        )
    if not hasattr(linear, "lora_B") or not isinstance(linear.lora_B, nn.ModuleDict):
        raise ValueError(f"{name}: its adapter is no pair of linear layers (AdaLoRA is not exported)")
    for adapter in (one for one in linear.active_adapters if one in linear.lora_A):
        a, b = linear.lora_A[adapter], linear.lora_B[adapter]
        if not isinstance(a, nn.Linear) or b.bias is not None:
            raise ValueError(f"{name}: adapter {adapter!r} is no plain pair of linear layers")
        of = {part: f"{name}.{part}.{adapter}" for part in ("lora_A", "lora_gate", "lora_B", "adapted")}
        passed = graph.add(of["lora_A"], "linear", [x], weight=graph.weight(of["lora_A"], a.weight))
        out = b.weight
        if adapter in getattr(linear, "lora_gate", {}):
            gate = linear.lora_gate[adapter]
            passed, out = _gate(graph, of["lora_gate"], gate, passed), gate.outwards(out)
        added = graph.weight(of["lora_B"], out * linear.scaling[adapter])  # the scale once, in the weight
        y = graph.add(of["adapted"], "add", [y, graph.add(of["lora_B"], "linear", [passed], weight=added)])
    return y


def _gate(graph: Graph, name: str, gate: Neuron, a: str) -> str:
    spikes = _lif(graph, name, gate, a)
    return graph.add(f"{name}.graded", "multiply", [spikes, a]) if gate.graded else spikes


def _lif(graph: Graph, name: str, neuron: Neuron, current: str) -> str:
    try:
        return graph.add(name, neuron.op, [current], **neuron.node())
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error
