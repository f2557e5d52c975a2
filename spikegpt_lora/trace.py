"""Looking on from outside: the spikes of a batch of sentences, and what the adapters did over a whole data set.

Both use forward hooks that are gone afterwards, also after an exception. Only real tokens count; padding never does.
Populations are named by their module's path inside SpikeGPTModel: "emb" (the embedding's spikes), "blocks.0.lif1",
"blocks.0.lif2", and for an adapter's gate "blocks.0.att.key.lora_gate.default" (adapter name last).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .adapters import SpikeGate
from .files import whole_file
from .model import SpikeGPTModel
from .spikes import LIF

EMBEDDING = "emb"


@dataclass
class SpikeTrace:
    """Spikes of B sentences, left-aligned; T is the longest one's length in tokens, zeros behind the others.

    spikes: population name -> int8 `(B, T, C)`, spikes per time step (0 or 1 today; the dtype has room for levels).
    values: graded populations only, name -> float32 `(B, T, C)`, what is passed on: spike times activation.
    lengths: int64 `(B,)`, tokens per sentence.
    tokens, words: str `(B, T)`, the token at each time step and the word it is part of.
    labels: int64 `(B,)`, -1 where unknown.
    """

    spikes: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    lengths: np.ndarray
    tokens: np.ndarray
    words: np.ndarray
    labels: np.ndarray

    def firing_rate(self, population: str) -> float:
        """Spikes per neuron and real token."""
        return float(self.spikes[population].sum() / (self.lengths.sum() * self.spikes[population].shape[-1]))

    def sparsity(self, population: str) -> float:
        """Share of (neuron, real token) pairs without a spike, in [0, 1]."""
        silent = (self.spikes[population] == 0) & (np.arange(self.spikes[population].shape[1])[:, None] < self._ends)
        return float(silent.sum() / (self.lengths.sum() * silent.shape[-1]))

    def spikes_per_token(self, population: str | None = None) -> float:
        """Spikes per real token, of one population or of all."""
        populations = self.spikes.values() if population is None else [self.spikes[population]]
        return float(sum(int(spikes.sum()) for spikes in populations) / self.lengths.sum())

    @property
    def _ends(self):
        return self.lengths[:, None, None]

    def save(self, path: str | Path) -> None:
        """Write one .npz file; `numpy.load` reads it without this package (no pickled objects)."""
        arrays = {f"spikes/{name}": array for name, array in self.spikes.items()}
        arrays |= {f"values/{name}": array for name, array in self.values.items()}
        arrays |= {name: getattr(self, name) for name in ("lengths", "tokens", "words", "labels")}
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "SpikeTrace":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is no spike trace.
        """
        groups: dict[str, dict] = {"spikes": {}, "values": {}, "": {}}
        try:
            with np.load(path, allow_pickle=False) as file:
                for key in file.files:
                    group, _, name = key.rpartition("/")
                    groups[group][name] = file[key]
            return cls(groups["spikes"], groups["values"], **groups[""])
        except (KeyError, TypeError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is no spike trace written by SpikeTrace.save: {error}") from error


def record_spikes(model: nn.Module, batch: Mapping, tokenizer=None) -> SpikeTrace:
    """Run `model` on `batch` in evaluation mode and return the spikes of every population.

    Args:
        model: a SpikeGPT model of any class, with or without peft adapters.
        batch: what the model takes (input_ids, attention_mask), labels optional; a tokenizer's BatchEncoding knows
            the words too.
        tokenizer: turns ids into readable tokens and words; without it they are the ids as text.

    Raises:
        ValueError: the model holds no SpikeGPT, or a spike is no integer in [-128, 127].
    """
    base = _base_model(model)
    recorded: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}

    def remember(name, graded):
        def hook(module, inputs, output):
            recorded[name] = output
            if graded:
                values[name] = output * inputs[0]

        return hook

    with _hooks((module, remember(name, isinstance(module, SpikeGate))) for name, module in _spiking(base)):
        _run(model, batch)

    mask = _mask(batch).cpu()
    front = mask.logical_not().long().argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]  # real tokens first

    def real(x, dtype):  # (B, T, C) -> numpy, left-aligned, zeros behind
        x = (x * mask.to(x.device)[..., None]).cpu().gather(1, front[..., None].expand(-1, -1, x.shape[-1]))
        if dtype == np.int8 and not torch.equal(x, x.to(torch.int8).to(x.dtype)):
            raise ValueError("a recorded spike is no integer in [-128, 127]")
        return x.float().numpy().astype(dtype)

    tokens, words = _tokens_and_words(batch, tokenizer, mask, front)
    labels = batch["labels"] if "labels" in batch else torch.full((len(mask),), -1)
    return SpikeTrace(
        spikes={name: real(x, np.int8) for name, x in recorded.items()},
        values={name: real(x, np.float32) for name, x in values.items()},
        lengths=mask.sum(1).numpy(),
        tokens=tokens,
        words=words,
        labels=np.asarray(labels, dtype=np.int64),
    )


@dataclass
class AdapterActivity:
    """What a model's active adapters did over all real tokens of a data set.

    sparsity: share of gate outputs that are silent; None without spiking gates.
    dead_ranks: share of rank units that never fired; None without spiking gates.
    contribution: norm of what the adapters add over the norm of W0 x, both over all adapted modules and real tokens.
    modules: the same three by module name (contribution is None where W0 x is 0).
    """

    sparsity: float | None
    dead_ranks: float | None
    contribution: float
    modules: dict[str, dict]


def adapter_activity(model: nn.Module, batches: Iterable[Mapping]) -> AdapterActivity | None:
    """Observe the active adapters while `model` reads `batches`; None if it has no adapters.

    Counts are summed over all batches, so a batch's size or padding does not weigh (the authors' library reports the
    last batch only, padding included).
    """
    base = _base_model(model)
    adapted = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    if not adapted:
        return None
    squares = defaultdict(lambda: [0.0, 0.0])  # name -> |adapter's part|^2, |W0 x|^2
    fired: dict[str, Tensor] = {}  # name of the gate -> spikes per rank unit
    frozen_output: dict[str, Tensor] = {}
    mask = None
    tokens = 0

    def on_frozen(name):
        def hook(module, inputs, output):
            frozen_output[name] = output

        return hook

    def on_adapted(name):
        def hook(module, inputs, output):
            before = frozen_output.pop(name)
            squares[name][0] += float(((output - before)[mask].double() ** 2).sum())
            squares[name][1] += float((before[mask].double() ** 2).sum())

        return hook

    def on_gate(name):
        def hook(module, inputs, output):
            fired[name] = fired.get(name, 0) + output[mask].double().sum(0)

        return hook

    gates = [(name, module) for name, module in base.named_modules() if isinstance(module, SpikeGate)]
    wanted = [(module.base_layer, on_frozen(name)) for name, module in adapted.items()]
    wanted += [(module, on_adapted(name)) for name, module in adapted.items()]
    wanted += [(module, on_gate(name)) for name, module in gates]
    with _hooks(wanted):
        for batch in batches:
            mask = _mask(batch).to(next(model.parameters()).device)
            tokens += int(mask.sum())
            _run(model, batch)
    return _summary(squares, fired, tokens)


def _summary(squares, fired, tokens) -> AdapterActivity:
    modules = {
        name: {"contribution": (added / frozen) ** 0.5 if frozen else None} for name, (added, frozen) in squares.items()
    }
    for name, counts in fired.items():
        modules[name.split(".lora_gate.")[0]] |= {
            "sparsity": 1 - float(counts.mean()) / tokens,
            "dead_ranks": float((counts == 0).double().mean()),
        }
    counts = torch.cat(list(fired.values())) if fired else None
    added, frozen = (sum(pair[i] for pair in squares.values()) for i in (0, 1))
    return AdapterActivity(
        sparsity=None if counts is None else 1 - float(counts.mean()) / tokens,
        dead_ranks=None if counts is None else float((counts == 0).double().mean()),
        contribution=(added / frozen) ** 0.5,
        modules=modules,
    )


def _base_model(model: nn.Module) -> SpikeGPTModel:
    for module in model.modules():
        if isinstance(module, SpikeGPTModel):
            return module
    raise ValueError(f"{type(model).__name__} holds no SpikeGPTModel to record")


def _spiking(base: SpikeGPTModel) -> list[tuple[str, nn.Module]]:
    neurons = [(name, module) for name, module in base.named_modules() if isinstance(module, LIF)]
    return [(EMBEDDING, base.emb_spike)] + neurons


@contextmanager
def _hooks(wanted: Iterable[tuple[nn.Module, Callable]]):
    handles = [module.register_forward_hook(hook) for module, hook in wanted]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _run(model: nn.Module, batch: Mapping):
    device, training = next(model.parameters()).device, model.training
    inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask", "inputs_embeds") if key in batch}
    model.eval()
    try:
        model(**inputs)
    finally:
        model.train(training)


def _mask(batch: Mapping) -> Tensor:
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    tensor = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]
    return torch.ones(tensor.shape[:2], dtype=torch.bool)


def _tokens_and_words(batch, tokenizer, mask: Tensor, front: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both as str `(B, T)`, left-aligned, "" behind the sentence's end."""
    tokens, words = np.full(front.shape, "", dtype=object), np.full(front.shape, "", dtype=object)
    for i, (row, length) in enumerate(zip(front.tolist(), mask.sum(1).tolist())):
        ids = [int(batch["input_ids"][i][t]) for t in row[:length]] if "input_ids" in batch else []
        tokens[i, : len(ids)] = [str(n) for n in ids] if tokenizer is None else tokenizer.convert_ids_to_tokens(ids)
        of_word = batch.word_ids(i) if getattr(batch, "encodings", None) else None
        if of_word is None or tokenizer is None:
            words[i] = tokens[i]
            continue
        pieces = defaultdict(list)
        for t, token_id in zip(row, ids):
            pieces[of_word[t]].append(token_id)
        words[i, : len(ids)] = [tokenizer.decode(pieces[of_word[t]]).strip() for t in row[: len(ids)]]
    return tokens.astype(np.str_), words.astype(np.str_)
