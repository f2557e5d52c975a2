"""Recipes and commands as a user runs them: in a process of their own, or, which takes far less time, in this one."""

import contextlib
import fcntl
import importlib.util
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import pytest

from spikegpt_lora import __main__ as package
from spikegpt_lora.utils import command_line

RECIPES = Path(__file__).parents[1] / "recipes"


def environment(**changes):
    """Without data and network."""
    return {k: v for k, v in os.environ.items() if k != "SPIKEGPT_LORA_DATA"} | {"HF_HUB_OFFLINE": "1"} | changes


@contextlib.contextmanager
def started(command, env, stdout=subprocess.PIPE, stderr=subprocess.PIPE):
    """A process, killed at the end with all that it started, if they still run."""
    command, pipes = list(map(str, command)), {"stdout": stdout, "stderr": stderr, "text": True}
    with subprocess.Popen(command, env=env, start_new_session=True, **pipes) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def in_a_process(name, *arguments):
    return finished([sys.executable, RECIPES / name, *arguments], environment())


def finished(command, env):
    with started(command, env) as process:
        printed, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, printed, errors)


def interrupted(name, *arguments, once):
    """What `in_a_process` gives where Ctrl-C is pressed as soon as `once()` is true."""
    with started([sys.executable, RECIPES / name, *arguments], environment()) as process:
        while not once():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, printed, errors)


def in_a_terminal(name, *arguments):
    """What a process prints to the terminal that it is started from."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    printed = bytearray()
    with started([sys.executable, RECIPES / name, *arguments], environment(), end, end) as process:
        os.close(end)
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while part := os.read(terminal, 1 << 16):
                printed += part
        os.close(terminal)
        process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, printed.decode(errors="replace"), "")


def here(name, *arguments):
    """What `in_a_process` gives, without starting one."""

    def recipe():
        loaded = module(name)
        return command_line.run(loaded.main, getattr(loaded, "STOPPED", "stopped"))

    return _here(recipe, [RECIPES / name, *arguments])


def command(*arguments, piped=None):
    """What `spikegpt_lora ARGUMENTS` gives, without starting a process; `piped`: bytes for its stdin."""
    stdin = TextIOWrapper(BytesIO(piped)) if piped is not None else None
    return _here(package.main, ["spikegpt_lora", *arguments], stdin)


def _here(main, command, stdin=None):
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(StringIO()) as stdout,
        redirect_stderr(StringIO()) as err,
    ):
        patch.setattr(sys, "argv", list(map(str, command)))
        patch.setattr(sys, "stdin", stdin)
        patch.delenv("SPIKEGPT_LORA_DATA", raising=False)
        try:
            code = main()
        except SystemExit as leave:  # argparse
            code = leave.code
    return subprocess.CompletedProcess(command, code, stdout.getvalue(), err.getvalue())


@cache
def module(name):
    """The recipe, imported."""
    path = RECIPES / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
