"""How many threads torch starts, and how they wait: for a recipe, unless its user says otherwise."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spikegpt_lora.utils.threads import keep_to_own_processors

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("granted, named, threads", [("1", None, 1), ("64", None, 2), ("1", "2", 2)])
def test_threads_are_no_more_than_processors_unless_named(two_threads, monkeypatch, granted, named, threads):
    monkeypatch.setattr("joblib.cpu_count", lambda: int(granted))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if named:
        monkeypatch.setenv("OMP_NUM_THREADS", named)
    keep_to_own_processors()
    assert torch.get_num_threads() == threads


def test_a_program_that_is_set_up_keeps_to_its_processors():
    code = """
import torch
from spikegpt_lora.utils.command_line import set_up
torch.set_num_threads(2)
set_up()
print(torch.get_num_threads())
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["LOKY_MAX_CPU_COUNT"] = "1"  # what joblib takes for a quota
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


@pytest.mark.parametrize("given, policy", [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_a_recipes_threads_sleep_while_they_wait_unless_told_otherwise(given, policy):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({"OMP_WAIT_POLICY": given} if given else {})
    command = [sys.executable, str(RECIPES / "generate.py"), "--help"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr
    if "OPENMP DISPLAY ENVIRONMENT" not in said:
        pytest.skip("torch computes without OpenMP here")
    assert f"OMP_WAIT_POLICY = '{policy}'" in said


def test_every_recipe_with_torch_says_how_to_wait_before_anything_can_load_torch():
    for file in RECIPES.glob("*.py"):
        statements = ast.parse(file.read_text(encoding="utf-8")).body
        loading = [i for i, node in enumerate(statements) if packages(node) - sys.stdlib_module_names]
        said = [i for i, node in enumerate(statements) if "setdefault('OMP_WAIT_POLICY'" in ast.unparse(node)]
        assert file.name == "replay_in_lava.py" or not loading or said[0] < loading[0], file.name


def packages(node):
    names = [node.module] if isinstance(node, ast.ImportFrom) else [x.name for x in getattr(node, "names", [])]
    return {name.partition(".")[0] for name in names}
