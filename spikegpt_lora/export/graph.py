"""A SpikeGPT classifier as a list of operations and a dictionary of weights: what graph.json and weights.npz hold.

Every operation has a name, `op` (a method of `interpreter.Program`), the names of its inputs, and settings. Names are
the model's own: "blocks.0.att.key" is that linear layer, "blocks.0.lif1" are those spikes.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from spikingjelly.activation_based.surrogate import ATan
from torch import nn

from ..convert.weights import quantize
from ..model import SRFFN, SRWKV, Block, SpikeGPTForSequenceClassification
from ..neurons.neuron import Neuron
from ..ops.dropout import Dropout
from ..utils.files import whole_file, write_json
from .interpreter import NEURONS

SCHEMA = "spikegpt_lora/graph/1"
BINARY = [0, 1]  # the levels of a population whose node names none
# Modules without children that the graph has an operation for, or that do nothing once training is over.
KNOWN = (
    nn.Linear, nn.Embedding, nn.LayerNorm, Neuron, ATan, nn.Identity, nn.Dropout, Dropout, nn.ModuleDict,
    nn.ParameterDict,
)  # fmt: skip


@dataclass
class Graph:
    """nodes in the order in which they run; weights by name, float32; labels of the classes."""

    nodes: list[dict] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    labels: list[str] = field(default_factory=list)

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
        write_json(folder / "graph.json", {"schema": SCHEMA, "labels": self.labels, "nodes": self.nodes})
        stored = {}
        for name, weight in self.weights.items():
            if int8 and weight.ndim == 2:
                stored[name], stored[f"{name}/scale"] = quantize(weight)
            else:
                stored[name] = weight
        with whole_file(folder / "weights.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **stored)


def graph_of(model: nn.Module) -> Graph:
    """The graph of a SpikeGPT classifier, with or without LoRA or SpikeLoRA adapters.

    Raises:
        ValueError: another kind of model, or a part of it that the graph has no operation for; the message names it.
    """
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
    x = _layernorm(graph, "ln_out", base.ln_out, x)
    graph.weight("score", _score(classifier))
    graph.add("pool", "pool", [x], kind=classifier.config.pooling, weight="score")
    return graph


def neurons_in(nodes: list[dict]) -> list[dict]:
    """The nodes that are populations of neurons, in order; the embedding, a table of spikes, is none."""
    return [node for node in nodes if node["op"] in NEURONS]


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


def _score(classifier: SpikeGPTForSequenceClassification) -> torch.Tensor:
    score = classifier.score
    if isinstance(score, ModulesToSaveWrapper):
        off = score.disable_adapters or not score.active_adapters
        score = score.original_module if off else score.modules_to_save[score.active_adapters[0]]
    if type(score) is not nn.Linear or score.bias is not None:
        raise ValueError(f"score must be a torch.nn.Linear without bias or adapter, got {score}")
    return score.weight


def _block(graph: Graph, name: str, block: Block, x: str) -> str:
    if (type(block.att), type(block.ffn)) != (SRWKV, SRFFN):
        raise ValueError(
            f"{name} must hold SRWKV and SRFFN, got {type(block.att).__name__}, {type(block.ffn).__name__}"
        )
    if hasattr(block, "ln0"):
        x = _layernorm(graph, "ln0", block.ln0, x)
    current = _srwkv(graph, f"{name}.att", block.att, _layernorm(graph, f"{name}.ln1", block.ln1, x))
    x = graph.add(f"{name}.x1", "add", [x, _lif(graph, f"{name}.lif1", block.lif1, current)])
    current = _srffn(graph, f"{name}.ffn", block.ffn, _layernorm(graph, f"{name}.ln2", block.ln2, x))
    return graph.add(f"{name}.x2", "add", [x, _lif(graph, f"{name}.lif2", block.lif2, current)])


def _srwkv(graph: Graph, name: str, att: nn.Module, x: str) -> str:
    mixed = _mixes(graph, name, att, x, "kvr")
    k = _linear(graph, f"{name}.key", att.key, mixed["k"])
    v = _linear(graph, f"{name}.value", att.value, mixed["v"])
    r = _linear(graph, f"{name}.receptance", att.receptance, mixed["r"])
    decay = graph.weight(f"{name}.time_decay", att.time_decay)
    first = graph.weight(f"{name}.time_first", att.time_first)
    y = graph.add(f"{name}.wkv", "wkv", [k, v], decay=decay, first=first)
    gated = graph.add(f"{name}.gated", "multiply", [graph.add(f"{name}.sigmoid", "sigmoid", [r]), y])
    return _linear(graph, f"{name}.output", att.output, gated)


def _srffn(graph: Graph, name: str, ffn: nn.Module, x: str) -> str:
    mixed = _mixes(graph, name, ffn, x, "kr")
    k = _linear(graph, f"{name}.key", ffn.key, mixed["k"])
    r = _linear(graph, f"{name}.receptance", ffn.receptance, mixed["r"])
    v = _linear(graph, f"{name}.value", ffn.value, graph.add(f"{name}.squared_relu", "squared_relu", [k]))
    return graph.add(f"{name}.gated", "multiply", [graph.add(f"{name}.sigmoid", "sigmoid", [r]), v])


def _mixes(graph: Graph, name: str, half: nn.Module, x: str, parts: str) -> dict[str, str]:
    previous = graph.add(f"{name}.delay", "delay", [x])
    weights = {p: graph.weight(f"{name}.time_mix_{p}", getattr(half, f"time_mix_{p}").flatten()) for p in parts}
    return {p: graph.add(f"{name}.mix_{p}", "mix", [x, previous], weight=weights[p]) for p in parts}


def _layernorm(graph: Graph, name: str, norm: nn.LayerNorm, x: str) -> str:
    weight, bias = graph.weight(f"{name}.weight", norm.weight), graph.weight(f"{name}.bias", norm.bias)
    return graph.add(name, "layernorm", [x], weight=weight, bias=bias, eps=norm.eps)


def _linear(graph: Graph, name: str, linear: nn.Module, x: str) -> str:
    """W0 x, and what each active adapter adds to it."""
    base = linear.get_base_layer() if isinstance(linear, LoraLayer) else linear
    if type(base) is not nn.Linear or base.bias is not None:
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
        if adapter in getattr(linear, "lora_gate", {}):
            passed = _gate(graph, of["lora_gate"], linear.lora_gate[adapter], passed)
        added = graph.weight(of["lora_B"], b.weight * linear.scaling[adapter])  # the scale once, in the weight
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
