"""Runs of a comparison in processes of their own, several at a time.

A small model keeps one core busy, not many: two runs on a core each end sooner than one after the other on two.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partialmethod
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.connection import Connection, wait

import joblib
import torch
from tqdm import tqdm

from ..utils import command_line
from ..utils.errors import TRACEBACK
from ..utils.stopping import obey

# Processes are forked from one that has imported everything and computed nothing: of torch's threads a fork has none.
CONTEXT = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")


@dataclass
class _Worker:
    call: int  # which one
    line: int  # of the terminal, counted down from the first bar
    process: CONTEXT.Process  # type: ignore[name-defined]
    answer: Connection


def side_by_side(calls: Sequence[Callable[[], None]], jobs: int) -> Iterator[int]:
    """Call each of `calls`, which can be pickled, in a process of its own, `jobs` at a time on as many parts of the
    processors; gives the number of each as it ends.

    A stop (Ctrl-C, SIGTERM) and what one of them raises end the others as SIGTERM does: they save the step first.

    Raises:
        ChildProcessError: one was killed. Otherwise what a call raises.
    """
    threads = max(1, joblib.cpu_count() // jobs)
    waiting, free, busy, lock = list(enumerate(calls)), list(range(jobs)), [], CONTEXT.RLock()
    CONTEXT.set_forkserver_preload([__name__, "spikegpt_lora.finetune.run"])
    try:
        while waiting or busy:
            while waiting and free:
                number, call = waiting.pop(0)
                busy.append(_started(number, call, free.pop(0), threads, lock))
            ready = wait([worker.answer for worker in busy])
            for worker in [worker for worker in busy if worker.answer in ready]:
                busy.remove(worker)
                free.append(worker.line)
                _require_done(worker, jobs)
                yield worker.call
    finally:
        _end([worker.process for worker in busy])


def _started(number: int, call: Callable[[], None], line: int, threads: int, lock) -> _Worker:
    answer, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_work, args=(call, theirs, line, threads, lock))
    process.start()
    theirs.close()
    return _Worker(number, line, process, answer)


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
    except Exception as raised:
        error = raised
        if os.environ.get(TRACEBACK):
            traceback.print_exc(file=sys.stderr)
    answer.send(error)


def _end_with_parent() -> None:
    wait([parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGKILL)  # nobody is left who would write the results
