"""A run as a program shows it: with a bar, to its end or to the step at which it is told to stop."""

import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from ..utils.stopping import deferred
from .loop import NEWEST, Pretraining

STOPPED = "stopped; the same command goes on from the last save."  # what a program says then


def bar(items: Iterable, task: str, **kwargs) -> Iterable:
    """`items` with a bar that is gone at the end, in a terminal."""
    return tqdm(items, task, leave=False, disable=None, **kwargs)


def train(run: Pretraining, directory: Path, save_seconds: float) -> None:
    """To the last step; a first Ctrl-C or SIGTERM is obeyed after the step, which is saved. Arguments as of
    `Pretraining.train`."""
    sizes = {"total": run.options.steps, "initial": run.step, "smoothing": 0.01, "disable": None}
    mean, begun = None, run.step
    with deferred() as stop, tqdm(desc="training", unit="step", **sizes) as progress:
        for loss in run.train(directory, save_seconds):
            mean = loss if mean is None else 0.98 * mean + 0.02 * loss
            progress.update()
            if run.step % 10 == 0:
                progress.set_postfix({"loss": f"{mean:.3f}", "tokens/s": f"{tokens_per_second(run):,.0f}"})
            if stop.asked is not None:
                run.save(directory / NEWEST)
                raise stop.asked
        if progress.disable and mean is not None:
            loss = f"loss={mean:.3f}, tokens/s={tokens_per_second(run):,.0f}"
            print(f"training: from step {begun:,} to {run.step}/{run.options.steps}, {loss}", file=sys.stderr)


def tokens_per_second(run: Pretraining) -> float:
    return run.options.batch_size * run.options.length * run.step / run.seconds
