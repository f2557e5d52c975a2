"""Runs of a comparison in processes of their own, several at a time.

A small model keeps one core busy, not many: two runs on a core each end sooner than one after the other on two.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partialmethod
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.connection import Connection, wait
from time import perf_counter

import joblib
import torch
from tqdm import tqdm

from ..utils import command_line
from ..utils.errors import TRACEBACK, first_line, sentence
from ..utils.stopping import obey

# Processes are forked from one that has imported everything and computed nothing: of torch's threads a fork has none.
CONTEXT = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")


@dataclass
class _Worker:
    call: int  # which one
    line: int  # of the terminal, counted down from the first bar
    started: float
    process: CONTEXT.Process  # type: ignore[name-defined]
    answer: Connection


def side_by_side(calls: Iterable[Callable[[], None]], jobs: int) -> Iterator[tuple[int, float]]:
    """Call each of `calls`, which can be pickled, in a process of its own, `jobs` at a time on as many parts of the
    processors; gives the number of each, and its seconds, as it ends. A call is asked for when its turn has come.

    A stop (Ctrl-C, SIGTERM) and what one of them raises end the others as SIGTERM does: they save the step first.

    Raises:
        ChildProcessError: one was killed. ValueError: what is wrong, as a user should read it. RuntimeError: a call
            raised what nobody foresaw.
    """
    threads = max(1, joblib.cpu_count() // jobs)
    waiting, free, busy, lock = enumerate(calls), list(range(jobs)), [], CONTEXT.RLock()
    CONTEXT.set_forkserver_preload([__name__, "spikegpt_lora.finetune.run"])
    try:
        while True:
            while free and (following := next(waiting, None)):
                busy.append(_started(*following, free.pop(0), threads, lock))
            if not busy:
                return
            ready = wait([worker.answer for worker in busy])
            for worker in [worker for worker in busy if worker.answer in ready]:
                busy.remove(worker)
                free.append(worker.line)
                _require_done(worker, jobs)
                yield worker.call, perf_counter() - worker.started
    finally:
        _end([worker.process for worker in busy])


def _started(number: int, call: Callable[[], None], line: int, threads: int, lock) -> _Worker:
    answer, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_work, args=(call, theirs, line, threads, lock))
    process.start()
    theirs.close()
    return _Worker(number, line, perf_counter(), process, answer)


def _require_done(worker: _Worker, jobs: int) -> None:
    """Wait for the end of a process; raise what it raised."""
    try:
        error = worker.answer.recv()
    except EOFError:  # it ended without a word
        worker.process.join()
        raise ChildProcessError(
            f"one of {jobs} processes was ended from outside (exit status {worker.process.exitcode}), as systems do "
            "where memory is short: give the same command again, with fewer --jobs"
        ) from None
    worker.process.join()
    if error is not None:
        raise error


def _end(processes: list) -> None:
    """Have them save the step that is trained and end; a further Ctrl-C ends them at once."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.join()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        raise


def _work(call: Callable[[], None], answer: Connection, line: int, threads: int, lock) -> None:
    """The main of a process; `lock`: of who draws a bar."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; it is for the first, which ends us
    signal.signal(signal.SIGTERM, obey)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(lock)
    tqdm.__init__ = partialmethod(tqdm.__init__, position=line)  # type: ignore[method-assign]
    command_line.set_up()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    error: BaseException | None = None
    try:
        call()
    except KeyboardInterrupt as stop:
        error = stop
    except Exception as raised:  # not every one can be pickled
        known = sentence(raised)
        error = ValueError(known) if known else RuntimeError(f"{type(raised).__name__}: {first_line(raised)}")
        if os.environ.get(TRACEBACK):
            traceback.print_exc(file=sys.stderr)
    answer.send(error)


def _end_with_parent() -> None:
    wait([parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGKILL)  # nobody is left who would write the results
