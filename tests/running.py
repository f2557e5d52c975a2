"""Recipes as a user runs them: in a process of their own, or, which takes far less time, in this one."""

import importlib.util
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"


def environment(**changes):
    """Without data and network."""
    return {k: v for k, v in os.environ.items() if k != "SPIKEGPT_LORA_DATA"} | {"HF_HUB_OFFLINE": "1"} | changes


def in_a_process(name, *arguments):
    command = [sys.executable, str(RECIPES / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment())


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
            code = module(name).main()
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
