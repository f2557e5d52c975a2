"""How many threads torch computes with."""

import os

import joblib
import torch


def keep_to_own_processors() -> None:
    """Let torch start no more threads than this process has processors; for a program's main, not for a library.

    torch counts the processors that a process may run on, not the share of their time that its container is granted:
    with the time of two processors out of 64 it starts 64 threads, which wait for each other. OMP_NUM_THREADS, where it
    is set, is obeyed; fewer threads stay fewer.
    """
    processors = joblib.cpu_count()
    if processors < torch.get_num_threads() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(processors)
