"""recipes/subj_finetune.py killed and stopped at random moments: what goes on from there ends with the same figures.

KILLED_MODEL=embedded in the environment takes the package's model instead of a tiny random one: far longer.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import sys
import time

import numpy as np
import pytest
import running

from spikegpt_lora.utils import command_line

pytestmark = pytest.mark.attack

MODEL = os.environ.get("KILLED_MODEL", "random")
CLASSES = [("objective", "home"), ("subjective", "fine")]  # words of an intermediate task's sentences
SIZES = ["--n-embd", "8", "--n-layer", "1", "--vocab-size", "300"] if MODEL == "random" else []
COMMAND = ["--task", "subj-mini", "--model", MODEL, *SIZES, "--epochs", "3", "--batch-size", "16"]
COMMAND += ["--max-train-samples", "64", "--methods", "full", "spikelora", "--seeds", "0", "1"]
COMMAND += ["--precision", "float32"]
FIRST = [f"{label}\tsay {number} , {word} {number} it is .\n" for number in range(40) for label, word in CLASSES]
WRITES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"}  # audit events of Python's own


class Child:
    """The recipe in a forked process: everything is imported once.

    Args:
        at: which of its file events in `out` something happens at, None for none.
        what: happens then.
        first: whether there is an intermediate task.
    """

    def __init__(self, out, at=None, what=None, first=False):
        self.out, self.log, self.at, self.what, self.events = str(out), out.with_suffix(".log"), at, what, 0
        self.log.unlink(missing_ok=True)
        self.first = ["--intermediate", str(intermediate(out.parent))] if first else []
        self.pid = os.fork()
        if not self.pid:
            self._run()

    def _run(self):
        handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1), os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["subj_finetune.py", *COMMAND, "--output-dir", self.out, *self.first]
        sys.addaudithook(self._look)
        recipe = running.module("subj_finetune.py")
        code = command_line.run(lambda: print("begun", flush=True) or recipe.main(), recipe.STOPPED)
        sys.stdout.flush(), sys.stderr.flush()
        os.write(1, f"{self.events} events\n".encode())
        os._exit(code)

    def _look(self, event, arguments):
        if (
            event in WRITES
            and isinstance(arguments[0], str | os.PathLike)
            and os.fspath(arguments[0]).startswith(self.out)
        ):
            if event == "open" and not (isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")):
                return
            self.events += 1
            if self.events == self.at:
                self.what()

    def status(self):
        """Its exit status, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def wait_until_begun(self):
        while not self.log.is_file() or "begun" not in self.said():
            time.sleep(0.01)

    def said(self):
        return self.log.read_text(errors="replace")


def intermediate(folder):
    """A file of sentences that are trained on first, in `folder`."""
    (path := folder / "first.tsv").write_text("".join(FIRST), encoding="utf-8")
    return path


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_soon(seconds):
    """By SIGALRM, which nobody handles: also in the middle of what C++ and Rust write."""
    return lambda: signal.setitimer(signal.ITIMER_REAL, seconds)


def figures(out):
    """All that must not depend on how often a run was broken off."""
    results = json.loads((out / "results.json").read_text())
    text = re.sub(r'"seconds(_spread)?": [^,}]*', "", json.dumps(results)).replace(str(out), "OUT")
    files = {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("*.safetensors"))
    }
    traces = {}
    for file in sorted(out.glob("traces/*.npz")):
        with np.load(file) as arrays:
            traces[file.name] = {name: arrays[name].tobytes() for name in arrays.files}
    return text, files, traces


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """An unbroken run's figures, how many file events it has and how many seconds it takes."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    began, child = time.perf_counter(), Child(out)
    assert child.status() == 0, child.said()
    seconds = time.perf_counter() - began
    return figures(out), int(re.search(r"(\d+) events", child.said())[1]), seconds


def finish(out, unbroken):
    child = Child(out)
    assert child.status() == 0, child.said()
    assert figures(out) == unbroken[0]
    left = [file for file in out.rglob("*") if file.name.startswith(".unfinished") or file.name == "training"]
    assert left == []


def half_saved(out):
    """Whether something stands there that was being written when the process died."""
    checkpoints = [file for file in out.rglob("checkpoint-*") if file.is_dir()]
    half = [folder for folder in checkpoints if not (folder / "trainer_state.json").is_file()]
    return bool(half or list(out.rglob(".unfinished-*")))


@pytest.mark.parametrize("chain", range(6))
def test_killed_at_a_file_event_inside_a_save_or_at_any_time_it_ends_with_the_same_figures(unbroken, tmp_path, chain):
    _, events, seconds = unbroken
    draw, ended, inside = random.Random(chain), [], []
    for number in range(6):
        at = draw.randint(1, events // 3)
        if number % 3 == 0:
            child = Child(tmp_path / "out", at, killed)
        elif number % 3 == 1:
            child = Child(tmp_path / "out", at, killed_soon(draw.uniform(1e-5, 4e-3)))
        else:
            child = Child(tmp_path / "out", 1, killed_soon(draw.uniform(0, seconds / 3)))
        ended.append(child.status())
        assert ended[-1] in (0, -signal.SIGKILL, -signal.SIGALRM), child.said()
        assert "Traceback" not in child.said()
        inside.append(half_saved(tmp_path / "out"))
    print(f"chain {chain}: ended with {ended}; {sum(inside)} inside a save")
    assert sum(status < 0 for status in ended) >= 5
    finish(tmp_path / "out", unbroken)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("chain", range(3))
def test_stopped_at_any_moment_it_says_so_and_ends_with_the_same_figures(unbroken, tmp_path, chain, sent):
    draw, out, ended, waited = random.Random(chain), tmp_path / "0", [], []
    while len(ended) - ended.count(0) < 5:
        child = Child(out)
        child.wait_until_begun()
        time.sleep(draw.uniform(0, unbroken[2] / 4))
        began = time.perf_counter()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, sent)
        ended.append(child.status())
        waited.append(time.perf_counter() - began)
        assert ended[-1] in (0, 130 if sent == signal.SIGINT else 143), child.said()
        assert "Traceback" not in child.said()
        assert ended[-1] == 0 or "the same command goes on from here" in child.said()
        if ended[-1] == 0:  # it was done before; the rest of the stops are another run's
            finish(out, unbroken)
            out = tmp_path / str(len(ended))
    print(f"chain {chain}, {sent.name}: ended with {ended} after {max(waited):.1f} s at most")
    finish(out, unbroken)


def test_a_second_signal_stops_at_once_and_the_run_goes_on(unbroken, tmp_path):
    child = Child(tmp_path / "out")
    while not (tmp_path / "out" / "base").is_dir():
        time.sleep(0.01)
    for _ in range(3):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGTERM)
        time.sleep(1.1)
    assert child.status() == 143 and "Traceback" not in child.said()
    finish(tmp_path / "out", unbroken)


def test_killed_in_or_behind_the_intermediate_task_it_ends_with_the_same_figures(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    child = Child(whole, first=True)
    assert child.status() == 0, child.said()
    draw, ended, events = random.Random(0), [], int(re.search(r"(\d+) events", child.said())[1])
    for _ in range(8):
        child = Child(broken, draw.randint(1, events // 4), killed, first=True)
        ended.append(child.status())
        assert "Traceback" not in child.said()
    child = Child(broken, first=True)
    assert child.status() == 0 and ended.count(-signal.SIGKILL) >= 5, child.said()
    assert figures(broken) == figures(whole)
