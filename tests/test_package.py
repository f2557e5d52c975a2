"""The package as a whole: a silent import, one-way imports between modules and none between tests, the public names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import spikegpt_lora

PACKAGE = Path(spikegpt_lora.__file__).parent

# Each folder, and each module at the top, may import from the rows above its own and from what stands left of it in its
# own row; "" is the package's own __init__.
ROWS = [
    ["utils", "ops"],
    ["neurons", "config", "tasks"],
    ["model"],
    ["forward", "checkpoint", "pretrain"],
    ["adapters", "convert"],
    ["observe"],
    ["report"],
    ["finetune", "export"],
    [""],
    ["commands"],
    ["__main__"],
    ["recipes"],
]
ORDER = [room for row in ROWS for room in row]


RECIPES = PACKAGE.parent / "recipes"


def modules():
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).parts[0] == "assets":  # a saved model's own code
            continue
        yield ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."), file


def room_of(module):
    return module.partition(".")[0]


def imported(name, file):
    """Absolute names of everything that a module imports, at its top or inside a function."""
    package = ["spikegpt_lora", *name.split(".")] if name else ["spikegpt_lora"]
    package = package if file.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            if node.module:
                yield ".".join([*base, node.module])
            else:  # from . import name
                yield from (".".join([*base, alias.name]) for alias in node.names)


def violations(name, file):
    for other in imported(name, file):
        top, _, module = other.partition(".")
        room = "recipes" if top == "recipes" else room_of(module)
        if top not in ("recipes", "spikegpt_lora") or (room == room_of(name) and room):
            continue
        if room not in ORDER or ORDER.index(room) >= ORDER.index(room_of(name)):
            yield f"{name} -> {other}"


def test_every_folder_has_a_row_and_imports_only_from_those_before_it():
    found = dict(modules())
    assert {room_of(name) for name in found} <= set(ORDER)
    assert not [line for name, file in found.items() for line in violations(name, file)]


def test_no_recipe_imports_another():
    files = list(RECIPES.glob("*.py"))
    places = {"recipes", "spikegpt_lora.recipes"}
    recipes = places | {file.stem for file in files} | {f"{place}.{file.stem}" for place in places for file in files}
    assert len(files) > 5 and not [file for file in files if recipes & set(imported("recipes.x", file))]


@pytest.mark.parametrize(
    "line",
    [
        "from recipes.subj_finetune import main",
        "import recipes.subj_finetune",
        "import spikegpt_lora.finetune.run",
        "from spikegpt_lora.finetune.run import adapt",
        "from ..finetune.run import adapt",
        "from .. import record_spikes",
    ],
)
def test_an_arrow_that_goes_up_is_seen(line, tmp_path):
    (tmp_path / "wkv.py").write_text(f"def late():\n    {line}\n")
    assert list(violations("ops.wkv", tmp_path / "wkv.py"))


def test_no_test_file_imports_another():
    """What several need stands in a helpers.py, builders.py or conftest.py: a file can be moved, or run, alone."""
    files = list(Path(__file__).parent.rglob("*.py"))
    found = [f"{file.name} -> {other}" for file in files for other in imported("", file) if "test_" in other]
    assert len(files) > 50 and not found


def test_importing_prints_nothing_builds_nothing_and_changes_no_setting():
    code = """
import logging, os, torch
def settings():
    return (logging.getLogger().level, list(logging.getLogger().handlers), torch.get_num_threads(),
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.matmul.allow_tf32, torch.initial_seed(), os.getcwd())
before = settings()
import spikegpt_lora
assert settings() == before, (before, settings())
import sys
assert "torch.utils.cpp_extension" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")


def test_every_public_name_exists():
    assert all(hasattr(spikegpt_lora, name) for name in spikegpt_lora.__all__)
    assert sorted(spikegpt_lora.__all__) == spikegpt_lora.__all__
