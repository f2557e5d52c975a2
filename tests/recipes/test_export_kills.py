"""Export and check, killed and stopped at the same moments each time: given again, they end with the same files."""

import hashlib
import os
import shutil
import signal
import sys

import pytest
import running
import torch
from helpers import everything

from spikegpt_lora.export.__main__ import main
from spikegpt_lora.utils.files import UNFINISHED

NAME = "export_neuromorphic.py"
SUBJ_MINI = ["--task", "subj-mini", "--sentences", "6"]
MOMENTS = 12
EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "shutil.rmtree"}
STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}  # of a process that got one


@pytest.fixture(autouse=True)
def one_thread():
    """A forked process must not wait for threads that it does not have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def forked(call, folder, moment=0, by=signal.SIGKILL):
    """`call()` in a process that gets a signal right before its file event number `moment` below `folder`; 0 is never.

    Returns:
        its exit status and the number of such events.
    """
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        count, status = 0, 98

        def watch(event, given):
            nonlocal count
            if event in EVENTS and any(str(folder) in str(one) for one in given[:2]):
                count += 1
                if count == moment:
                    os.kill(os.getpid(), by)

        try:
            sys.addaudithook(watch)
            status = call()
        finally:
            os.write(writing, str(count).encode())
            os._exit(status)
    os.close(writing)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reading) as pipe:
        return os.waitstatus_to_exitcode(status), int(pipe.read() or 0)


def hashes(folder):
    """Of every file but the lock, by its path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".lock"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.attack
@pytest.mark.parametrize("by", STATUS)
def test_a_stopped_export_goes_on_to_the_same_files(by, finetuned, tmp_path):
    def export(folder):
        options = ["--event-driven", "--accuracy", "--output-dir", folder]
        return running.here(NAME, finetuned / "spikelora", *SUBJ_MINI, *options).returncode

    unbroken, out = tmp_path / "unbroken", tmp_path / "out"
    status, events = forked(lambda: export(unbroken), unbroken)
    wanted = hashes(unbroken)
    assert status == 0 and events > 5 * MOMENTS and len(wanted) > 30
    for number in range(1, MOMENTS + 1):
        moment = number * events // MOMENTS
        assert forked(lambda: export(out), out, moment, by)[0] == STATUS[by], moment
        assert by is signal.SIGKILL or not list(out.rglob(f"{UNFINISHED}*")), moment
        assert forked(lambda: export(out), out)[0] == 0, moment
        assert hashes(out) == wanted, moment
        shutil.rmtree(out)


@pytest.mark.attack
@pytest.mark.parametrize("by", STATUS)
def test_a_stopped_check_leaves_a_right_bundle_right(by, finetuned, tmp_path, monkeypatch):
    bundle, results = tmp_path / "out" / "bundle", tmp_path / "results"
    assert running.here(NAME, finetuned / "base", *SUBJ_MINI, "--output-dir", tmp_path / "out").returncode == 0
    monkeypatch.setattr(sys, "argv", ["export", "check", str(bundle), "--write", str(results)])
    before = everything(bundle)
    status, events = forked(main, tmp_path)
    wanted = hashes(results)
    assert status == 0 and events > 2 * MOMENTS
    for number in range(1, MOMENTS + 1):
        shutil.rmtree(results)
        assert forked(main, tmp_path, number * events // MOMENTS, by)[0] == STATUS[by]
        assert everything(bundle) == before
        assert forked(main, tmp_path)[0] == 0
        assert everything(bundle) == before and hashes(results) == wanted
