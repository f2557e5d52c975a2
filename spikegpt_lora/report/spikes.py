"""What the page shows of recorded spikes: the raster of one sentence, and how much each block fires.

A raster has tokens from left to right and populations from the embedding downwards, each a band; a band's neurons
stand in the order of how often they fire, those that never do at its foot.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoint import load_classifier
from ..observe.traces import GATE, SpikeTrace, record_spikes
from ..tasks.text import to_ascii
from .markup import INK
from .plots import named_once
from .results import folder_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPIKE, OPPOSITE, DEAD = "#2a8fd6", "#e8860c", "#d6272860"  # seen on white and on black
HEIGHTS = {True: 0.26, False: 0.4}  # inches of a band: of a gate's few units, of others
KINDS = {  # of neurons: what their names are like
    "after SRWKV": r"lif1",
    "after SRFFN": r"lif2",
    "read by SRWKV's matrices": r"att\.spike_\w+",
    "read by SRFFN's matrices": r"ffn\.spike_\w+",
    "adapters' gates": rf".*{re.escape(GATE)}.*",
    "others": r".*",
}


def gate_of(name: str) -> tuple[str, str]:
    """Where a gate sits, as (block, module): ("block 0", "att.key"); the adapter's name where it is not "default"."""
    module, _, adapter = name.partition(GATE)
    block, module = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*)", module).groups()
    return f"block {block}" if block else "", module + ("" if adapter == "default" else f" ({adapter})")


def readable(name: str) -> str:
    """A population's name as a label: "block 0 lif1", "block 0 att.key"."""
    return " ".join(gate_of(name)).strip() if GATE in name else re.sub(r"^blocks\.(\d+)\.", r"block \1 ", name)


# ---- a raster


def size_of(trace: SpikeTrace, sentence: int) -> tuple[float, float]:
    """Width and height of a raster, in inches; the same for all but long sentences."""
    height = sum(HEIGHTS[GATE in name] for name in trace.spikes)
    return max(4.2, 1.8 + 0.12 * int(trace.lengths[sentence])), 1.6 + height


def draw_sentence(trace: SpikeTrace, sentence: int, others: SpikeTrace, axis: "Axes") -> None:
    """Draw one sentence's spikes. Blue: a spike, of integer ones the larger the stronger, orange: one below 0; red: a
    neuron without a spike in `others`, sentences that the same model read, and in this one."""
    length, y, block = int(trace.lengths[sentence]), 0.0, ""
    places: dict[float, str] = {}  # the middle of a band -> its label
    for name in trace.spikes:
        ordered, dead = _ordered(trace.spikes[name][sentence, :length], others.spikes[name])
        foot = y + HEIGHTS[GATE in name]
        extent = (-0.5, length - 0.5, foot, y)
        axis.imshow(_painted(ordered, dead), extent=extent, interpolation="none", aspect="auto")
        before, block = block, _block_of(name)
        axis.axhline(y, color=INK, linewidth=0.5 if block == before else 1.6)
        label = readable(name).removeprefix(f"{block} " if block == before else "")  # said once
        places[(y + foot) / 2] = label + " gate" * (GATE in name) + (f", {dead} dead" if dead else "")
        y = foot
    axis.set(xlim=(-0.5, length - 0.5), ylim=(y, 0))
    axis.set_yticks(list(places), list(places.values()), fontsize=8)
    words = trace.words[sentence, :length]
    first = named_once(words)
    axis.set_xticks(first, words[first], rotation=90, fontsize=7.5)
    axis.tick_params(labeltop=True, length=2)


def _block_of(name: str) -> str:
    """ "block 0" of "blocks.0.lif1", nothing of "emb"."""
    number = re.match(r"blocks\.(\d+)\.", name)
    return f"block {number[1]}" if number else ""


def _ordered(spikes: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, int]:
    """A sentence's spikes `(T, C)` by how often a neuron fires in others `(B, T, C)`, most often first; and how many
    neurons, the last ones, fire in neither."""
    fired = np.count_nonzero(others, axis=(0, 1)) + np.count_nonzero(spikes, axis=0)
    return spikes[:, np.argsort(-fired, kind="stable")], int((fired == 0).sum())


def _painted(spikes: np.ndarray, dead: int) -> np.ndarray:
    """RGBA `(C, T, 4)` of spikes `(T, C)`."""
    from matplotlib.colors import to_rgba

    painted = np.zeros((*spikes.T.shape, 4))
    size = np.abs(spikes.T, dtype=np.int16)
    for color, seen in ((SPIKE, spikes.T > 0), (OPPOSITE, spikes.T < 0)):
        painted[seen] = to_rgba(color)
    painted[..., 3] *= np.where(size > 0, 0.4 + 0.6 * size / max(1, size.max()), 0)
    if dead:
        painted[-dead:] = to_rgba(DEAD)
    return painted


def shown_sentences(trace: SpikeTrace, longest: int = 20) -> list[int]:
    """One sentence of each class: the first of at most `longest` tokens, else the shortest."""
    chosen = []
    for label in np.unique(trace.labels):
        of_class = np.flatnonzero(trace.labels == label)
        short = of_class[trace.lengths[of_class] <= longest]
        chosen.append(int(short[0] if len(short) else of_class[trace.lengths[of_class].argmin()]))
    return chosen


# ---- what a comparison's folder holds


def trace_of(folder: Path, run: dict) -> SpikeTrace | None:
    """The spikes that a run left, where it left some.

    Raises:
        DamagedFile: a file that is no trace.
    """
    file = folder / "traces" / f"{folder_of(run).replace('/', '-')}.npz"
    return SpikeTrace.load(file) if file.is_file() else None


def record_text(folder: Path, run: dict, text: str, max_length: int) -> tuple[SpikeTrace, str]:
    """The spikes of the model of `run` while it reads `text`, and what it answers, in words.

    Raises:
        ValueError: the model is not in `folder`, or the text has no token.
    """
    model, tokenizer = load_classifier(folder / folder_of(run))
    batch = tokenizer([to_ascii(text)], truncation=True, max_length=max_length, return_tensors="pt")
    if not batch["input_ids"].numel():
        raise ValueError(f"--trace-text must be a sentence, got {text!r}, which has no token: write words")
    trace = record_spikes(model, batch, tokenizer)
    assert trace.logits is not None  # of a classifier
    shares = np.exp(trace.logits[0] - trace.logits[0].max())
    answer = int(shares.argmax())
    return trace, f"{model.config.id2label[answer]} ({shares[answer] / shares.sum():.2f})"


def firing_by_block(trace: SpikeTrace) -> dict[str, list[float]]:
    """Of each of KINDS that there is, by block the share of (neuron, real token) pairs with a spike."""
    tokens = int(trace.lengths.sum())
    pairs: dict[str, dict[int, np.ndarray]] = {}  # kind -> block -> how many fire, and how many there are
    for name, spikes in trace.spikes.items():
        if block := re.match(r"blocks\.(\d+)\.", name):
            kind = next(kind for kind, like in KINDS.items() if re.fullmatch(like, name[block.end() :]))
            by_block = pairs.setdefault(kind, {})
            seen = np.array([np.count_nonzero(spikes), tokens * spikes.shape[-1]])
            by_block[int(block[1])] = by_block.get(int(block[1]), 0) + seen
    rates = {kind: [float(np.divide(*by_block[n])) for n in sorted(by_block)] for kind, by_block in pairs.items()}
    return {kind: rates[kind] for kind in KINDS if kind in rates}
