"""recipes/efficiency.py as a user runs it: every way beside the dense one, and beside fewer steps of the same time."""

import json

import pytest
import running
import torch

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM, load_task
from spikegpt_lora.finetune.efficient.ways import short
from spikegpt_lora.pretrain.tokenizer import train_tokenizer

NAME = "efficiency.py"
WAYS = ["static", "drop-0.75", "trunk", "novelty"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("efficiency") / "model"
    tokenizer = train_tokenizer(load_task("subj-mini")["train"]["text"], 300)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 2}
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = SpikeGPTForCausalLM(SpikeGPTConfig(**sizes, **tokens))
    for parameter in model.parameters():  # most initial values are 0
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(model, out, *arguments):
    settings = ["--task", "subj-mini", "--model", model, "--epochs", "1", "--max-train-samples", "64"]
    precision = ["--precision", "float32"]  # on any processor
    return running.here(NAME, *settings, *precision, "--output-dir", out, *arguments)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("frontier")
    return out, recipe(model, out, "--ways", *WAYS, "--seeds", "0", "1")


def test_every_way_has_a_rival_of_its_time(finished):
    out, done = finished
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    methods = {run["method"] for run in results["runs"]}
    assert results["complete"] and {"dense", *WAYS} <= methods
    assert all(name.startswith("short-") for name in methods - {"dense", *WAYS})
    text = (out / "results.md").read_text()
    assert text in done.stdout and (out / "frontier.png").stat().st_size > 5000
    rows = [line.split("|") for line in text.splitlines()[2:] if line.startswith("|")]
    assert all("…" in row[-2] and "…" in row[-3] for row in rows[1 : 1 + len(WAYS)])


def test_a_record_says_what_was_done(finished):
    runs = {(run["method"], run["seed"]): run for run in json.loads((finished[0] / "results.json").read_text())["runs"]}
    assert runs["dense", 0]["updates"] == runs["dense", 0]["steps"] == 2
    assert runs["novelty", 0]["updates"] < 2 or runs["novelty", 0]["steps"] == 2
    assert all(run["seconds"] > 0 and 0 <= run["accuracy"] <= 1 for run in runs.values())
    assert len(runs["static", 1]["test_correct"]) == len(load_task("subj-mini")["test"])


def test_what_is_finished_is_not_done_again_and_other_settings_are_refused(finished, model):
    out, _ = finished
    before = (out / "static" / "seed0" / "run.json").stat().st_mtime_ns
    done = recipe(model, out, "--ways", "static", "--seeds", "0")
    assert done.returncode == 0 and (out / "static" / "seed0" / "run.json").stat().st_mtime_ns == before
    done = recipe(model, out, "--adapter", "spikelora")
    assert done.returncode == 2 and "holds results of other settings (adapter was 'lora'" in done.stderr


def test_a_language_model_is_judged_by_its_loss(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(list(load_task("subj-mini")["train"]["text"]) * 30))
    ways = ["--ways", "static", "novelty", "trunk", "--max-train-samples", "160"]
    done = recipe(model, tmp_path / "out", "--text", text, "--seeds", "0", *ways)
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert all("accuracy" not in run and run["loss"] != run["before"] for run in runs if run["updates"] > 2)


def test_too_little_text_is_told_how_much_is_needed(model, tmp_path):
    (tmp_path / "text.txt").write_text("one sentence .\n")
    done = recipe(model, tmp_path / "out", "--text", tmp_path / "text.txt")
    assert done.returncode == 2 and "must hold 29,696 tokens or more" in done.stderr


def test_checks_of_too_few_batches_say_how_many_sentences_are_needed(model, tmp_path):
    done = recipe(model, tmp_path, "--checks")
    assert done.returncode == 2 and "--checks needs 960 training sentences or more" in done.stderr


@pytest.mark.parametrize("time, name", [(0.66, "short-0.65"), (1.3, "dense"), (0.98, "dense"), (0.01, "short-0.05")])
def test_the_rivals_share_of_the_steps_is_that_of_the_time(time, name):
    assert short(time) == name
