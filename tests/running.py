"""Recipes as a user runs them: in a process of their own, or, which takes far less time, in this one."""

import contextlib
import fcntl
import importlib.util
import os
import pty
import struct
import subprocess
import sys
import termios
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import pytest

from spikegpt_lora.utils import command_line

RECIPES = Path(__file__).parents[1] / "recipes"


def environment(**changes):
    """Without data and network."""
    return {k: v for k, v in os.environ.items() if k != "SPIKEGPT_LORA_DATA"} | {"HF_HUB_OFFLINE": "1"} | changes


def in_a_process(name, *arguments):
    command = [sys.executable, str(RECIPES / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment())


def in_a_terminal(name, *arguments):
    """What a process prints to the terminal that it is started from."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    command = [sys.executable, str(RECIPES / name), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=end, stderr=end, env=environment())
    os.close(end)
    printed = bytearray()
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(terminal, 1 << 16):
            printed += part
    os.close(terminal)
    return subprocess.CompletedProcess(command, process.wait(), printed.decode(errors="replace"), "")


def here(name, *arguments):
    """What `in_a_process` gives, without starting one."""
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(StringIO()) as stdout,
        redirect_stderr(StringIO()) as err,
    ):
        patch.setattr(sys, "argv", [str(RECIPES / name), *map(str, arguments)])
        patch.delenv("SPIKEGPT_LORA_DATA", raising=False)
        try:
            recipe = module(name)
            code = command_line.run(recipe.main, getattr(recipe, "STOPPED", "stopped"))
        except SystemExit as leave:  # argparse
            code = leave.code
    return subprocess.CompletedProcess(sys.argv, code, stdout.getvalue(), err.getvalue())


@cache
def module(name):
    """The recipe, imported."""
    path = RECIPES / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
