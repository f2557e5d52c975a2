"""python -m spikegpt_lora: every command is there, says what it takes, and does what its recipe or module does."""

import json
import sys

import pytest
from running import command, environment, finished, here

from spikegpt_lora.__main__ import COMMANDS

GREEDY = ["--temperature", "0", "--max-new-tokens", "4"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_of_its_own(name):
    done = command(name, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: spikegpt_lora {name} ")


def test_the_help_names_every_command():
    done = command("--help")
    assert done.returncode == 0 and all(f"spikegpt_lora {name}" in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["paint"]])
def test_another_command_is_refused(arguments):
    done = command(*arguments)
    assert done.returncode == 2 and "COMMAND" in done.stderr


def test_the_module_is_the_command():
    done = finished([sys.executable, "-m", "spikegpt_lora", "report", "nowhere"], environment())
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("model", [["embedded"], ["--model", "embedded"], []])
def test_generate_takes_its_model_by_place_or_by_name(model):
    done = command("generate", *model, "--prompt", "this film", *GREEDY)
    assert done.returncode == 0 and done.stdout == here("generate.py", "--prompt", "this film", *GREEDY).stdout


def test_one_model_generates():
    done = command("generate", "embedded", "--model", "other")
    assert done.returncode == 2 and "got embedded and other: leave out one of them" in done.stderr


def test_export_makes_a_bundle_and_checks_it(finetuned, tmp_path):
    (tmp_path / "lines.txt").write_text("a small gem .\nhe goes home .\n")
    done = command("export", finetuned / "base", "--text", tmp_path / "lines.txt", "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "check.json").read_text())["passed"]
    assert command("export", "check", tmp_path / "out" / "bundle").returncode == 0
    assert command("export", "check", tmp_path / "none").returncode == 2
