"""What setup.py says of the package, beside the other places that say it."""

import runpy
from pathlib import Path

import yaml

import spikegpt_lora

ROOT = Path(__file__).parents[1]


def test_version_licence_and_authors_are_those_of_the_citation(monkeypatch):
    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **arguments: given.update(arguments))
    runpy.run_path(ROOT / "setup.py")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert given["version"] == citation["version"] == spikegpt_lora.__version__
    assert given["license"] == citation["license"]
    assert given["author"] == ", ".join(author["name"] for author in citation["authors"])
