"""The notebook without a kernel; `.ci/run` executes it in one."""

import ast
import importlib
import json
import re

from running import RECIPES

NOTEBOOK = RECIPES / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
PLACE = re.compile(r"(?<![\w.:/<])/\w[\w.-]*/\w|\b[A-Z]:\\|file:")  # an absolute path
TIME = re.compile(r"\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d")


def text_of(outputs):
    """All that the outputs say, pictures left out."""
    said = [output.get("text", []) for output in outputs]
    shown = [
        lines for output in outputs for kind, lines in output.get("data", {}).items() if not kind.startswith("image")
    ]
    return "".join(line for lines in said + shown for line in lines)


def test_every_code_cell_is_python_and_stands_behind_a_text():
    kinds = [cell["cell_type"] for cell in CELLS]
    assert kinds == ["markdown", "code"] * len(CODE) + ["markdown"]
    for cell in CODE:
        compile("".join(cell["source"]), cell["id"], "exec")


def test_every_name_that_it_imports_from_the_package_is_there():
    trees = [ast.parse("".join(cell["source"])) for cell in CODE]
    imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [(node.module, name.name) for node in imports if "spikegpt_lora" in node.module for name in node.names]
    assert len(ours) > 5
    assert not [(module, name) for module, name in ours if not hasattr(importlib.import_module(module), name)]


def test_it_was_run_once_from_top_to_bottom_and_every_cell_says_something():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert all(cell["outputs"] for cell in CODE)
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_it_names_no_place_and_no_time_of_the_machine_that_ran_it():
    assert PLACE.search("from: /home/me/model") and PLACE.search("'/tmp/a'") and not PLACE.search("n/a, A / B, ../a/b")
    for cell in CODE:
        said = "".join(cell["source"]) + text_of(cell["outputs"])
        assert not PLACE.search(said) and not TIME.search(said), cell["id"]
        assert not cell["metadata"], f"{cell['id']}: nbconvert with --ExecutePreprocessor.record_timing=False"


def test_it_is_small():
    assert NOTEBOOK.stat().st_size < 300_000
