"""Calls in processes of their own, several at a time."""

import os
import signal
import time
from functools import partial

import pytest
import torch

from spikegpt_lora.finetune.workers import side_by_side


def note(folder, name):
    (folder / name).write_text(f"{os.getpid()} {torch.get_num_threads()}")


def fail():
    raise ValueError("a rule, a value and a next step")


def fail_oddly():
    class Odd(Exception):
        """None that another process could read."""

    raise Odd("by itself")


def wait_until_stopped(folder):
    (folder / "began").touch()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        (folder / "saved").touch()
        raise


def after(folder, name, then):
    while not (folder / name).exists():
        time.sleep(0.01)
    then()


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_each_call_has_a_process_of_its_own_with_its_share_of_the_processors(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("joblib.cpu_count", lambda: 6)
    names = ["a", "b"]
    ended = list(side_by_side([partial(note, tmp_path, name) for name in names], jobs=2))
    assert sorted(number for number, _ in ended) == [0, 1] and all(seconds > 0 for _, seconds in ended)
    processes, threads = zip(*((tmp_path / name).read_text().split() for name in names))
    assert len({*processes, str(os.getpid())}) == 3 and set(threads) == {"3"}
    assert "OMP_NUM_THREADS" not in os.environ


def test_what_one_raises_is_raised_when_the_others_have_saved(tmp_path):
    calls = [partial(wait_until_stopped, tmp_path), partial(after, tmp_path, "began", fail)]
    with pytest.raises(ValueError, match="a rule, a value and a next step"):
        list(side_by_side(calls, jobs=2))
    assert (tmp_path / "saved").exists()


def test_what_nobody_foresaw_is_told_too():
    with pytest.raises(RuntimeError, match="Odd: by itself"):
        list(side_by_side([fail_oddly], jobs=1))


def test_one_that_is_killed_is_said_and_the_others_save(tmp_path):
    calls = [partial(wait_until_stopped, tmp_path), partial(after, tmp_path, "began", killed)]
    with pytest.raises(ChildProcessError, match="one of 2 processes was ended from outside .exit status -9"):
        list(side_by_side(calls, jobs=2))
    assert (tmp_path / "saved").exists()
