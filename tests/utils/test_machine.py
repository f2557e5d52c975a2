"""What a record keeps of the process that made it."""

import subprocess
import sys

import torch

from spikegpt_lora.utils.machine import commit, made_by, processor_name


def test_the_processors_name_is_what_linux_says_and_elsewhere_what_python_says(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.processor", lambda: "arm")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: Other\n")
    assert processor_name(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"
    assert processor_name(tmp_path / "nowhere") == "arm"


def test_the_command_can_be_given_again_as_it_stands(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/a.py", "--output-dir", "my runs"])
    made = made_by(torch.device("cpu"))
    assert made["command"] == "python recipes/a.py --output-dir 'my runs'"
    assert made["threads"] == torch.get_num_threads() and made["processor"] == processor_name()


def test_the_commit_is_that_of_the_checkout_and_says_what_was_changed_since(tmp_path):
    def git(*arguments):
        named = ["-c", "user.name=me", "-c", "user.email=me"]
        return subprocess.run(["git", "-C", tmp_path, *named, *arguments], check=True, capture_output=True, text=True)

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    git("tag", "v1")
    head = git("rev-parse", "HEAD").stdout.strip()
    assert commit(tmp_path) == head
    (tmp_path / "file").write_text("two")
    assert commit(tmp_path) == f"{head}-dirty"


def test_a_folder_inside_somebody_elses_checkout_is_not_taken_for_it(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr("spikegpt_lora.utils.machine._installed_commit", lambda: None)
    assert commit(tmp_path / "site-packages") is None
