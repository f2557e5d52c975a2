"""Findings of a check: problems as lines that name file, place and reason."""

from collections.abc import Callable

import numpy as np

from ..utils.errors import DamagedFile
from .untrusted import reason_of

LONGEST = 500  # characters of a line


class Findings:
    """Problems, and `progress(list, text)`, which wraps whatever takes long."""

    def __init__(self, progress):
        self.problems: list[str] = []
        self.progress = progress

    def add(self, problem: str) -> None:
        """One more line, of printable characters only: names in a forged file may hold anything."""
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in problem[:LONGEST])
        if line not in self.problems:
            self.problems.append(line)

    def part(self, name: str, check: Callable, *arguments):
        """What `check(*arguments)` returns; if it cannot be done, that is a problem, and None is returned."""
        try:
            with np.errstate(all="ignore"):
                return check(*arguments)
        except DamagedFile as error:
            self.add(str(error))
        except Exception as error:  # whatever a forged file makes of numpy, h5py, nir and the simulators
            self.add(f"{name}: could not be checked, {reason_of(error)}")
        return None

    def first(self, what: str, name: str, different: np.ndarray, rows=None) -> int:
        """Add the first difference `(B, T, n)` of a population, if there is one; returns how many there are.

        Args:
            rows: the numbers of the sentences, where they are not all of them.
        """
        count = int(different.sum())
        if count:
            sample, step, unit = min(np.argwhere(different).tolist(), key=lambda at: (at[1], at[0]))
            sample = sample if rows is None else int(rows[sample])
            self.add(f"{what}: population {name}, sample {sample}, step {step}, neuron {unit} ({count} differences)")
        return count
