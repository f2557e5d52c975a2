"""The package as a whole: a silent import, one-way imports between modules, the public names."""

import ast
import subprocess
import sys
from pathlib import Path

import spikegpt_lora

PACKAGE = Path(spikegpt_lora.__file__).parent

# Each module may import from the rows above its own, never from its own row or below.
LAYERS = [
    {"files", "wkv", "spikes", "data", "statistics", "config", "tokenizer", "baselines", "hub"},
    {"model", "adapters.layer", "adapters.config"},
    {"adapters.model"},
    {"adapters"},
    {"checkpoint", "trace"},
    {"training", "report"},
]
ALLOWED_WITHIN_A_ROW = {("data", "hub")}


def modules():
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name:
            yield name, file


def imported(name, file):
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package if node.level == 1 else package.rpartition(".")[0]
            yield f"{base}.{node.module}".strip(".") if node.module else base


def test_every_module_has_a_layer_and_imports_only_from_lower_ones():
    rank = {name: i for i, names in enumerate(LAYERS) for name in names}
    found = dict(modules())
    assert found.keys() <= rank.keys(), f"no layer for {found.keys() - rank.keys()}"
    upward = [
        f"{name} -> {other}"
        for name, file in found.items()
        for other in imported(name, file)
        if rank[other] >= rank[name] and (name, other) not in ALLOWED_WITHIN_A_ROW
    ]
    assert not upward


def test_nothing_imports_a_recipe():
    for _, file in modules():
        assert "recipes" not in file.read_text(encoding="utf-8").split("import", 1)[-1].split("\n")[0]
    recipes = {file.stem for file in PACKAGE.parent.joinpath("recipes").glob("*.py")}
    for _, file in modules():
        names = {
            n.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import) for n in node.names
        }
        assert not names & recipes


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
