"""Records the spikes of a batch of sentences, by forward hooks that are gone afterwards.

Only real tokens count; padding never does. Spikes are whole numbers: a rate is the share of them that are not 0, spikes
a token are their sizes added up.
Populations are named by their module's path inside SpikeGPTModel: "emb" (the embedding's spikes), "blocks.0.lif1",
"blocks.0.lif2", and for an adapter's gate "blocks.0.att.key.lora_gate.default" (adapter name last).
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..forward import READ, hooked, real_first, run, tokens_of
from ..model import SpikeGPTModel
from ..neurons.neuron import Neuron, neurons_of
from ..utils.errors import DamagedFile
from ..utils.files import whole_file
from ..utils.npz import read_npz

EMBEDDING = "emb"
GROUPS = ("spikes", "values", "currents", "membranes")  # of a trace: arrays (B, T, C) by population
ALONE = ("lengths", "tokens", "words", "labels", "note")  # the other arrays of its file
GATE = ".lora_gate."  # in the name of an adapter's population, between its module and its adapter


@dataclass
class SpikeTrace:
    """Spikes of B sentences, left-aligned; T is the longest one's length in tokens, zeros behind the others.

    spikes: population name -> int8 `(B, T, C)`, at each time step one of the neuron's levels, 0 where it is silent;
        int16 where one does not fit in a byte.
    values: graded populations only, name -> float32 `(B, T, C)`, what is passed on: spike times activation.
    lengths: int64 `(B,)`, tokens per sentence.
    tokens, words: str `(B, T)`, the token at each time step and the word it is part of.
    labels: `(B,)` as given, -1 where unknown.
    note: what was recorded, in the words of whoever recorded it.
    currents: where asked for, name -> float32 `(B, T, C)`, what the neurons integrate (not of "emb", which has none).
    membranes: where asked for, name -> float32 `(B, T, C)`, after each token and its reset (not of "emb").
    logits: of a classifier, what it gave, `(B, classes)`; not kept in the file.
    """

    spikes: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    lengths: np.ndarray
    tokens: np.ndarray
    words: np.ndarray
    labels: np.ndarray
    note: str = ""
    currents: dict[str, np.ndarray] = field(default_factory=dict)
    membranes: dict[str, np.ndarray] = field(default_factory=dict)
    logits: np.ndarray | None = None

    def firing_rate(self, population: str) -> float:
        """Share of (neuron, real token) pairs with a spike, of whatever size, in [0, 1]."""
        spikes = self.spikes[population]
        return float(np.count_nonzero(spikes) / (self.lengths.sum() * spikes.shape[-1]))

    def sparsity(self, population: str) -> float:
        """Share of (neuron, real token) pairs without a spike, in [0, 1]."""
        silent = (self.spikes[population] == 0) & (np.arange(self.spikes[population].shape[1])[:, None] < self._ends)
        return float(silent.sum() / (self.lengths.sum() * silent.shape[-1]))

    def dead(self, population: str) -> float:
        """Share of neurons without a single spike, in [0, 1]."""
        return float((self.spikes[population] == 0).all(axis=(0, 1)).mean())

    def saturated(self, population: str) -> float:
        """Share of neurons with a spike at every real token, in [0, 1]."""
        beyond = np.arange(self.spikes[population].shape[1])[:, None] >= self._ends
        return float(((self.spikes[population] != 0) | beyond).all(axis=(0, 1)).mean())

    def spikes_per_token(self, population: str | None = None) -> float:
        """Spikes per real token, of one population or of all; a spike of size 2, or -2, counts as two."""
        populations = self.spikes.values() if population is None else [self.spikes[population]]
        return float(sum(int(np.abs(s, dtype=np.int16).sum()) for s in populations) / self.lengths.sum())

    @property
    def _ends(self):
        return self.lengths[:, None, None]

    def save(self, path: str | Path) -> None:
        """Write one .npz file; `numpy.load` reads it without this package (no pickled objects)."""
        arrays = {f"{group}/{name}": array for group in GROUPS for name, array in getattr(self, group).items()}
        arrays |= {name: getattr(self, name) for name in ALONE}
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | Path, most: int = 1 << 30) -> "SpikeTrace":
        """Read what `save` wrote.

        Args:
            most: bytes that it may take up in memory; a larger one is refused unread.

        Raises:
            DamagedFile: the file is no spike trace, or larger.
            OSError: it cannot be opened.
        """
        groups: dict[str, Any] = {group: {} for group in GROUPS}
        try:
            arrays = read_npz(path, most)
            if missing := [name for name in ALONE if name not in arrays]:
                raise ValueError(f"it has no {', '.join(missing)}")
            alone: dict[str, Any] = {name: arrays.pop(name) for name in ALONE}
            for key, array in arrays.items():
                group, _, name = key.partition("/")
                if group not in groups:
                    raise ValueError(f"{key} is no array of a trace")
                groups[group][name] = array
            trace = cls(**groups, **alone | {"note": str(alone["note"])})
            trace._require_one_shape()
            return trace
        except ValueError as error:
            raise DamagedFile(f"{path} is no spike trace written by SpikeTrace.save: {error}") from error

    def _require_one_shape(self) -> None:
        if self.tokens.ndim != 2 or self.lengths.dtype.kind not in "iu":
            raise ValueError("tokens must be (B, T), lengths integers")
        B, T = self.tokens.shape
        if self.words.shape != (B, T) or self.lengths.shape != (B,) or self.labels.shape[:1] != (B,):
            raise ValueError(f"words, lengths or labels do not fit tokens of shape {(B, T)}")
        if (self.lengths < 0).any() or (self.lengths > T).any() or not self.lengths.any():
            raise ValueError(f"lengths must be in [0, {T}] and not all 0, got {self.lengths}")
        for group in GROUPS:
            for name, x in getattr(self, group).items():
                if x.ndim != 3 or x.shape[:2] != (B, T) or not x.shape[2]:
                    raise ValueError(f"{group}/{name} of shape {x.shape} does not fit tokens of shape {(B, T)}")
                if x.dtype not in ((np.int8, np.int16) if group == "spikes" else (np.float32,)):
                    raise ValueError(f"{group}/{name} must be int8 or int16 (spikes) or float32, got {x.dtype}")
                if not np.isfinite(x).all():
                    raise ValueError(f"{group}/{name} must be finite")


def record_spikes(
    model: nn.Module,
    batch: Mapping,
    tokenizer: PreTrainedTokenizerBase | None = None,
    note: str = "",
    currents: bool = False,
    membranes: bool = False,
) -> SpikeTrace:
    """Run `model` on `batch` in evaluation mode and return the spikes of every population.

    Args:
        model: a SpikeGPT model of any class, with or without peft adapters.
        batch: what the model takes (input_ids, attention_mask), labels optional; a tokenizer's BatchEncoding knows
            the words too.
        tokenizer: turns ids into readable tokens and words; without it they are the ids as text.
        note: kept with the trace.
        currents: record what the neurons integrate too, four bytes a neuron and token.
        membranes: record the neurons' and gates' membranes after each token too, four bytes a neuron and token.

    Raises:
        ValueError: the model holds no SpikeGPT, `batch` is none or has no real token, its labels are not one a
            sentence, or a spike is no integer of 16 bit.
    """
    neurons = _populations(_base_model(model))
    _require_batch(batch)
    recorded: dict[str, dict[str, Tensor]] = {group: {} for group in GROUPS}
    hooks = (neuron.register_forward_hook(_remember(recorded, name, currents, membranes)) for name, neuron in neurons)
    with _storing([neuron for _, neuron in neurons if membranes and neuron.has_membrane]), hooked(hooks):
        output = run(model, batch)

    mask, front = real_first(batch)
    tokens, words = _tokens_and_words(batch, tokenizer, mask, front)
    labels = torch.full((len(mask),), -1) if batch.get("labels") is None else batch["labels"]
    spikes = {name: _as_integers(_left_aligned(x, mask, front)) for name, x in recorded.pop("spikes").items()}
    others: dict[str, Any] = {
        group: {name: _left_aligned(x, mask, front).float().numpy() for name, x in by_name.items()}
        for group, by_name in recorded.items()
    }
    given: dict[str, Any] = {
        "lengths": mask.sum(1).numpy(),
        "labels": torch.as_tensor(labels).cpu().numpy(),
        "note": note,
    }
    return SpikeTrace(spikes, tokens=tokens, words=words, logits=_logits(output), **others, **given)


def _remember(recorded: dict[str, dict[str, Tensor]], name: str, currents: bool, membranes: bool) -> Callable:
    """A forward hook that notes what population `name` does in `recorded`, by group."""

    def hook(neuron, inputs, output):
        recorded["spikes"][name] = output
        if neuron.graded:
            recorded["values"][name] = output * inputs[0]
        if currents and neuron.has_current:
            recorded["currents"][name] = inputs[0]
        if membranes and neuron.has_membrane:
            recorded["membranes"][name] = neuron.v_seq

    return hook


@contextmanager
def _storing(neurons: list[Neuron]):
    """Within it `neurons` store their membranes; afterwards they hold none."""
    before = [neuron.store_v_seq for neuron in neurons]
    try:
        for neuron in neurons:
            neuron.store_v_seq = True
        yield
    finally:
        for neuron, stored in zip(neurons, before):
            neuron.store_v_seq = stored


def _require_batch(batch: Mapping) -> None:
    """Raise unless `batch` holds tokens, at least one of them real, and no labels or one a sentence."""
    given = {key: batch[key] for key in READ if key in batch} if isinstance(batch, Mapping) else {}
    for key, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{key} of a batch to record must be a tensor, got {type(value).__name__}: a tokenizer makes them with "
                "return_tensors='pt'"
            )
    if (tokens := tokens_of(given)) is None:
        got = ", ".join(map(str, batch)) or "nothing" if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"a batch to record must be a mapping with input_ids or inputs_embeds, got {got}")
    if tokens.dim() < 2 or 0 in tokens.shape[:2] or not given.get("attention_mask", torch.ones(1)).any():
        raise ValueError(f"a batch to record must hold at least one real token, got tokens {tuple(tokens.shape)}")
    labels = batch.get("labels")
    if labels is not None and np.shape(labels)[:1] != (len(tokens),):
        raise ValueError(f"labels must be one for each of {len(tokens)} sentences, got shape {tuple(np.shape(labels))}")


def _left_aligned(x: Tensor, mask: Tensor, front: Tensor) -> Tensor:
    """x `(B, T, C)` on the CPU with the real tokens in front and zeros behind."""
    return (x * mask.to(x.device)[..., None]).cpu().gather(1, front[..., None].expand(-1, -1, x.shape[-1]))


def _as_integers(spikes: Tensor) -> np.ndarray:
    for dtype in (torch.int8, torch.int16):
        if torch.equal(spikes, spikes.to(dtype).to(spikes.dtype)):
            return spikes.to(dtype).numpy()
    raise ValueError("a recorded spike is no integer of 16 bit")


def _logits(output) -> np.ndarray | None:
    """Of a classifier; a language model's, one vector a token, would take up more than all spikes."""
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim() != 2:
        return None
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu().numpy()


def _base_model(model: nn.Module) -> SpikeGPTModel:
    for module in model.modules():
        if isinstance(module, SpikeGPTModel):
            return module
    raise ValueError(f"{type(model).__name__} holds no SpikeGPTModel to record")


def _populations(base: SpikeGPTModel) -> list[tuple[str, Neuron]]:
    return [(EMBEDDING if neuron is base.emb_spike else name, neuron) for name, neuron in neurons_of(base)]


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
        words[i, : len(ids)] = [
            token if of_word[t] is None else tokenizer.decode(pieces[of_word[t]]).strip()  # special tokens: no word
            for t, token in zip(row, tokens[i, : len(ids)])
        ]
    return tokens.astype(np.str_), words.astype(np.str_)
