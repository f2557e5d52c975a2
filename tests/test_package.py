"""The package as a whole: a silent import, one-way imports between modules, the public names."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import spikegpt_lora

PACKAGE = Path(spikegpt_lora.__file__).parent

# Each module may import from the rows above its own, never from its own row or below.
LAYERS = [
    {"errors"},
    {"files", "hub", "statistics", "rules", "inputs", "tokenizer", "baselines", "memory", "kneser_ney", "stopping"},
    {"saved"},
    {"export.interpreter", "export.islands"},
    {"config", "settings", "data", "command_line", "npz", "extension.build", "export.untrusted"},
    {"extension"},
    {"extension.__main__", "wkv", "spikes", "token_shift", "gates", "dropout"},
    {"model"},
    {"forward"},
    {"checkpoint"},
    {"corpus", "adapters.sequence"},
    {"adapters.gate", "adapters.fingerprint"},
    {"adapters.config", "adapters.layer", "adapters.observe"},
    {"adapters.quantized", "adapters.control"},
    {"adapters.model"},
    {"adapters.adalora"},
    {"adapters"},
    {"trace", "trainer", "sentence_pairs", "export.graph", "export.cost", "export.findings"},
    {"training", "report", "pretraining", "export.events", "export.event_driven", "export.shapes"},
    {"export.stored"},
    {"export.bundle", "export.reruns", "export.recount"},
    {"export.check", "export.pictures"},
    {"export"},
    {"export.__main__"},
]


def modules():
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name:
            yield name, file


def imported(name, file):
    """Absolute names of everything that a module imports, at its top or inside a function."""
    package = ["spikegpt_lora", *name.split(".")]
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
    rank = {module: i for i, names in enumerate(LAYERS) for module in names}
    for other in imported(name, file):
        top, _, module = other.partition(".")
        if top == "recipes" or (top == "spikegpt_lora" and not module):
            yield f"{name} -> {other}"
        elif top == "spikegpt_lora" and rank.get(module, len(LAYERS)) >= rank[name]:
            yield f"{name} -> {other}"


def test_every_module_has_a_layer_and_imports_only_from_lower_ones():
    found = dict(modules())
    assert found.keys() == set().union(*LAYERS)
    assert not [line for name, file in found.items() for line in violations(name, file)]


@pytest.mark.parametrize(
    "line",
    [
        "from recipes.subj_finetune import main",
        "import recipes.subj_finetune",
        "import spikegpt_lora.training",
        "from spikegpt_lora.training import adapt",
        "from .training import adapt",
        "from . import record_spikes",
    ],
)
def test_an_arrow_that_goes_up_is_seen(line, tmp_path):
    (tmp_path / "wkv.py").write_text(f"def late():\n    {line}\n")
    assert list(violations("wkv", tmp_path / "wkv.py"))


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
