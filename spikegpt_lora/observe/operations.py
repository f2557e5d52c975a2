"""Counts a model's operations per real token while it runs, by NeuroBench's definitions.

    effective  pairs of a nonzero weight and a nonzero input, at every call of every nn.Linear; bias left out
    AC or MAC  a call's pairs are accumulations if its whole input holds only -1, 0 and 1, else multiply-accumulates
    dense      all pairs, zero or not: what hardware does that looks at neither

Counted is what is executed, not what might be. In SpikeGPT as published a LayerNorm stands before every W0 but two,
whose inputs are a gated average and a squared relu: no W0 ever sees spikes, so its operations are MACs, and what is
saved is saved by zeros (squared relu, silent gates). With `matrix_spikes="integer"` every W0 reads integers k, and of
each call is counted too, over all rows of W, zero weights included:

    weight reads       one a row for each nonzero input: what decides the energy
    plane additions    the ones in |k| as a binary number: k sent as planes of -1, 0 and 1, y = sum_j 2^j W b_j
    unary additions    |k|: k sent as so many spikes

Not counted, as in NeuroBench: norms, gates, WKV, token shift, neurons, look-ups.
Source: NeuroBench (arXiv 2304.04640) and its package 2.3.0, to whose numbers the tests hold this file.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ..config import SpikeGPTConfig
from ..forward import RealTokens, hooked, run, token_model
from ..model import SpikeGPTModel
from ..neurons.neuron import neurons_of
from .energy import real_valued


@dataclass
class LayerCount:
    """One nn.Linear, W `(outputs, inputs)`; operations are per real token of the model.

    dense_macs, effective_macs, effective_acs: as at the top of this file. A layer that runs once a sentence, such as a
        classifier after pooling, has its operations spread over the sentence's tokens, so layers can be added up.
    input_density: share of nonzero inputs. binary_input: every call's inputs were -1, 0 or 1.
    largest_spike: size of the largest input, where every input of every call was a whole number; else None.
    weight_reads: as at the top of this file; so are plane_additions and unary_additions, None where the inputs were no
        whole numbers.
    """

    inputs: int
    outputs: int
    dense_macs: float
    effective_macs: float
    effective_acs: float
    input_density: float
    binary_input: bool
    largest_spike: int | None = None
    weight_reads: float = 0.0
    plane_additions: float | None = None
    unary_additions: float | None = None

    @property
    def spikes(self) -> str:
        """What it reads: "integer" or "real"."""
        return "real" if self.largest_spike is None else "integer"


@dataclass
class PopulationCount:
    """Outputs of one population of neurons (an adapter's gate is one) over all real tokens, and how many were 0."""

    outputs: int
    zeros: int

    @property
    def sparsity(self) -> float:
        return self.zeros / self.outputs


@dataclass
class Operations:
    """What a model did while it read.

    tokens, sentences: real tokens and rows of the batches.
    layers: every nn.Linear that was called, by name: "blocks.0.att.key" is W0, "blocks.0.att.key.lora_A.default" the A
        of its adapter "default".
    populations: every neuron that integrates a current and was called, by name: "blocks.0.lif1",
        "blocks.0.att.key.lora_gate.default".
    connection_sparsity: share of zero weights in all nn.Linear of the model; None without any.
    footprint: bytes of all parameters and buffers, as they are in memory.
    left_out: modules with weight matrices that are not counted (convolutions, recurrent layers, AdaLoRA's and
        embeddings' adapters): where it is not empty, the totals are too small.
    real_valued: of a SpikeGPT whose matrices read integer spikes, what is done beside them (`energy.real_valued`).
    """

    tokens: int
    sentences: int
    layers: dict[str, LayerCount]
    populations: dict[str, PopulationCount]
    connection_sparsity: float | None
    footprint: int
    left_out: list[str] = field(default_factory=list)
    real_valued: dict[str, dict[str, float]] | None = None

    @property
    def dense_macs(self) -> float:
        """Per real token, all layers."""
        return sum(layer.dense_macs for layer in self.layers.values())

    @property
    def effective_macs(self) -> float:
        """Per real token, all layers."""
        return sum(layer.effective_macs for layer in self.layers.values())

    @property
    def effective_acs(self) -> float:
        """Per real token, all layers."""
        return sum(layer.effective_acs for layer in self.layers.values())

    @property
    def activation_sparsity(self) -> float | None:
        """Zeros over all outputs of all populations; None without one."""
        outputs = sum(population.outputs for population in self.populations.values())
        return sum(population.zeros for population in self.populations.values()) / outputs if outputs else None


def count_operations(model: nn.Module, batches: Iterable[Mapping]) -> Operations:
    """Let `model` read `batches` in evaluation mode and count; its modes and hooks are afterwards what they were.

    Args:
        model: any torch model; of a SpikeGPT or a transformer only the real tokens count.
        batches: keyword arguments of the model's forward, "labels" left out. A step where attention_mask is 0 is no
            token; without mask every step is one. Without input_ids and inputs_embeds the tokens are the rows of the
            first tensor `(..., features)`. A layer whose input is no row of tokens counts all its rows.

    Raises:
        ValueError: no real token in `batches`, or a weight that is packed (4 bit), so that its zeros are not known.
    """
    counter = _Counter(model)
    with hooked(counter.hooks()):
        for batch in batches:
            given = {key: value for key, value in batch.items() if key != "labels"}
            run(model, given, given)
            counter.end_of(given)
    return counter.operations()


class _Counter:
    """Sums over calls, exact in integers, by the names that `Operations` uses."""

    def __init__(self, model: nn.Module):
        self.model, self.tokens = model, RealTokens(model)
        self.read = self.sentences = 0  # real tokens, rows
        self.shapes: dict[str, tuple[int, int]] = {}
        self.layers: dict[str, Counter] = defaultdict(Counter)
        self.largest: dict[str, int] = defaultdict(int)  # input of a layer
        self.populations: dict[str, Counter] = defaultdict(Counter)

    def hooks(self):
        yield self.tokens.attach()
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear):
                hook = partial(self._linear, short_name(name), _nonzeros_of_columns(name, module))
                yield module.register_forward_hook(hook, with_kwargs=True)
        for name, neuron in neurons_of(self.model):
            if neuron.has_current:  # a look-up costs nothing
                yield neuron.register_forward_hook(partial(self._population, short_name(name)))

    def _rows(self, x: Tensor) -> tuple[Tensor, int]:
        """x as `(rows, features)`, padding rows zeroed so that they add no operations; and how many rows count."""
        real = self.tokens.real(x)
        rows = x[..., 0].numel() if real is None else int(self.tokens.count(x))
        return (x.detach() if real is None else real).reshape(-1, x.shape[-1]), rows

    def _linear(self, name, weights, linear, args, kwargs, output):
        x, rows = self._rows(args[0] if args else kwargs["input"])
        active = (x != 0).sum(dim=0)
        kind = "acs" if bool(((x == 0) | (x.abs() == 1)).all()) else "macs"
        pairs = int((active * weights).sum())  # no matrix product: CUDA has none for integers
        self.shapes[name] = (linear.in_features, linear.out_features)
        self.layers[name].update({"rows": rows, "active": int(active.sum()), kind: pairs, f"{kind}_calls": 1})
        self.layers[name].update(self._spikes(name, x.abs()))

    def _spikes(self, name: str, size: Tensor) -> dict[str, int]:
        """Additions for one output of inputs of these sizes; one that is no whole number makes the layer's real."""
        if not torch.equal(size, size.floor()) or not size.isfinite().all():
            return {"real_calls": 1}
        largest = int(size.max()) if size.numel() else 0
        self.largest[name] = max(self.largest[name], largest)
        whole = size.long()
        ones = sum(int((whole >> plane & 1).sum()) for plane in range(largest.bit_length()))
        return {"ones": ones, "units": int(whole.sum())}

    def _population(self, name, module, inputs, output):
        spikes, rows = self._rows(output)
        outputs = rows * output.shape[-1]
        self.populations[name].update(outputs=outputs, zeros=outputs - int(spikes.count_nonzero()))

    def end_of(self, batch: dict):
        """The model has read `batch`."""
        mask = self.tokens.mask
        if mask is None:  # no tokens as SpikeGPT reads them
            first = next(value for value in batch.values() if isinstance(value, Tensor))
            mask = torch.ones(first.shape[:-1])
        self.read += int(mask.sum())
        self.sentences += len(mask)

    def operations(self) -> Operations:
        if not self.read:
            raise ValueError("nothing was counted: let the model read at least one batch with a real token")
        linears = [module.weight for module in self.model.modules() if isinstance(module, nn.Linear)]
        weights, held = sum(weight.numel() for weight in linears), [*self.model.parameters(), *self.model.buffers()]
        return Operations(
            tokens=self.read,
            sentences=self.sentences,
            layers={name: self._layer(name, sums) for name, sums in self.layers.items() if sums["rows"]},
            populations={name: PopulationCount(**sums) for name, sums in self.populations.items() if sums["outputs"]},
            connection_sparsity=1 - sum(int(w.count_nonzero()) for w in linears) / weights if weights else None,
            footprint=sum(tensor.numel() * tensor.element_size() for tensor in held),
            left_out=_left_out(self.model),
            real_valued=_real_valued(self.model),
        )

    def _layer(self, name: str, sums: Counter) -> LayerCount:
        inputs, outputs = self.shapes[name]
        return LayerCount(
            inputs=inputs,
            outputs=outputs,
            dense_macs=sums["rows"] * inputs * outputs / self.read,
            effective_macs=sums["macs"] / self.read,
            effective_acs=sums["acs"] / self.read,
            input_density=sums["active"] / (sums["rows"] * inputs),
            binary_input=sums["macs_calls"] == 0,
            weight_reads=sums["active"] * outputs / self.read,
            **({} if sums["real_calls"] else self._additions(name, sums)),
        )

    def _additions(self, name: str, sums: Counter) -> dict:
        each = self.shapes[name][1] / self.read
        return {
            "largest_spike": self.largest[name],
            "plane_additions": sums["ones"] * each,
            "unary_additions": sums["units"] * each,
        }


def _nonzeros_of_columns(name: str, linear: nn.Linear) -> Tensor:
    """How many outputs each input reaches, int64 `(inputs,)`."""
    weight = linear.weight.detach()
    if weight.shape != (linear.out_features, linear.in_features):
        raise ValueError(f"the weight of {name} is packed, {tuple(weight.shape)}: count before quantizing to 4 bit")
    return (weight != 0).sum(dim=0)


def short_name(name: str) -> str:
    """A module's path in SpikeGPTModel, or in the model that peft wraps; W0 and a classifier that peft trains bear the
    name of the layer that they are."""
    name = name.removeprefix("base_model.model.").removeprefix("spikegpt.").removesuffix(".base_layer")
    return name.partition(".modules_to_save.")[0].removesuffix(".original_module")


def _left_out(model: nn.Module) -> list[str]:
    def matrices(module):
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        return [p for key, p in own if p.dim() > 1 and ("weight" in key or isinstance(module, nn.ParameterDict))]

    counted = (nn.Linear, nn.Embedding)  # a look-up is no operation
    others = ((name, module) for name, module in model.named_modules() if not isinstance(module, counted))
    return [short_name(name) for name, module in others if matrices(module)]


def _real_valued(model: nn.Module) -> dict | None:
    inside = token_model(model)
    if not isinstance(inside, SpikeGPTModel):
        return None
    config = cast(SpikeGPTConfig, inside.config)
    return real_valued(config) if config.matrix_spikes == "integer" else None
