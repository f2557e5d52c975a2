"""A bundle's spikes as address events (AER), and in the shapes that other tools take.

events.npz holds `events`, sorted, one a spike: sample, t (token), population, index, value (the spike's, 1 of a binary
population, or of a graded gate what it passes on); `populations` and `sizes` say what the numbers mean. The words stand
in sentences.npz.
"""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ..observe.traces import SpikeTrace
from ..utils.errors import read_json
from ..utils.files import whole_file
from .islands import DT

EVENT = np.dtype(
    [("sample", np.int32), ("t", np.int32), ("population", np.int16), ("index", np.int32), ("value", np.float32)]
)
TONIC = np.dtype([("t", np.int64), ("x", np.int64), ("p", np.int64)])  # tonic's own names and order
MICROSECONDS = round(1e6 * DT)  # a token in `to_tonic`


def events_of(trace: SpikeTrace) -> np.ndarray:
    """All spikes of a trace as `EVENT` records, by sample, token, population and neuron."""
    found = []
    for number, (name, spikes) in enumerate(trace.spikes.items()):
        where = np.nonzero(spikes)
        events = np.zeros(len(where[0]), EVENT)
        events["sample"], events["t"], events["index"] = where
        events["population"] = number
        events["value"] = trace.values.get(name, spikes)[where]
        found.append(events)
    events = np.concatenate(found)
    return events[np.lexsort([events[key] for key in ("index", "population", "t", "sample")])]


def save_events(trace: SpikeTrace, path: Path) -> None:
    """Write events.npz: `events_of(trace)`, and the populations' names and sizes (neurons) by number."""
    names, sizes = list(trace.spikes), [spikes.shape[-1] for spikes in trace.spikes.values()]
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, events=events_of(trace), populations=np.array(names), sizes=np.array(sizes))


class EventDataset(Dataset):
    """A bundle's sentences as spikes: item i is (spikes `(T, N)` float32, label), T its own length in tokens.

    The N neurons are those of `populations`, one after the other; `slices` says which are whose. Spikes have the values
    that they have (1 of a binary population), those of graded gates 1.

    Args:
        bundle: its folder. populations: which ones, in which order (default: all).

    Raises:
        ValueError: a population that the bundle does not have.
    """

    def __init__(self, bundle: str | Path, populations: list[str] | None = None):
        with np.load(Path(bundle) / "events.npz") as file:
            self.events, names, sizes = file["events"], file["populations"].tolist(), file["sizes"].tolist()
        with np.load(Path(bundle) / "sentences.npz") as file:
            self.lengths, self.labels, self.words = file["lengths"], file["labels"], file["words"]
        wanted = names if populations is None else list(populations)
        if unknown := set(wanted) - set(names):
            raise ValueError(f"no population {sorted(unknown)[0]!r} in {bundle}; there are {', '.join(names)}")
        size = dict(zip(names, sizes))
        ends = np.cumsum([0] + [size[name] for name in wanted])
        self.slices = {name: slice(end, end + size[name]) for name, end in zip(wanted, ends.tolist())}
        first = np.full(len(names), -1)
        for name, place in self.slices.items():
            first[names.index(name)] = place.start
        kinds = {one["name"]: one["kind"] for one in read_json(Path(bundle) / "manifest.json")["populations"]}
        graded = np.array([kinds[name] == "graded" for name in names])
        self.events = self.events[first[self.events["population"]] >= 0]
        self.spikes = np.where(graded[self.events["population"]], 1, self.events["value"])  # of each event, its spike
        self.units = first[self.events["population"]] + self.events["index"]  # of each event, its place among the N
        self.starts = np.searchsorted(self.events["sample"], np.arange(len(self.lengths) + 1))
        self.size = int(ends[-1])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        t, units, values = self._of(i)
        spikes = torch.zeros(int(self.lengths[i]), self.size)
        spikes[torch.from_numpy(t), torch.from_numpy(units)] = torch.from_numpy(values)
        return spikes, self.labels[i].item()

    def words_of(self, i: int) -> list[str]:
        """The word of each token of sentence i."""
        return self.words[i, : self.lengths[i]].tolist()

    def _of(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of a sentence's events the tokens (int64), the neurons and the spikes (float32)."""
        if not 0 <= i < len(self):
            raise IndexError(i)  # what ends a for loop over a data set
        part = slice(self.starts[i], self.starts[i + 1])
        return self.events["t"][part].astype(np.int64), self.units[part], self.spikes[part]


class AddressEventDataset(EventDataset):
    """The same sentences as (events, label), the events as tonic and the Spiking Heidelberg Digits have them: what
    tonic's transforms, `DiskCachedDataset` and `MemoryCachedDataset` take. The words are those of `words_of(i)`.

    events: structured array of t (microseconds, 100 a token), x (neuron, as `EventDataset` numbers them), p (the
    spike's value, as there), in the order of t.
    """

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        t, units, values = self._of(i)
        record = np.zeros(len(t), TONIC)
        record["t"], record["x"], record["p"] = t * MICROSECONDS, units, values
        return record[np.lexsort((record["x"], record["t"]))], self.labels[i].item()


def to_tonic(bundle: str | Path, populations: list[str] | None = None) -> list[tuple[np.ndarray, int, list[str]]]:
    """Of each sentence (events, label, words) at once: the items of `AddressEventDataset`, and its words."""
    data = AddressEventDataset(bundle, populations)
    return [(*data[i], data.words_of(i)) for i in range(len(data))]
