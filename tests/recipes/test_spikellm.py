"""recipes/spikellm.py as a user runs it, on tiny models."""

import json
import re
import shutil

import numpy as np
import pytest
import running
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from spikegpt_lora import load_task
from spikegpt_lora.pretrain.tokenizer import train_tokenizer

NAME = "spikellm.py"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a language model, an encoder, a text, and the same as a corpus."""
    folder = tmp_path_factory.mktemp("spikellm")
    sentences = load_task("subj-mini")["train"]["text"]
    tokenizer = train_tokenizer(sentences, 300)
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, **vocabulary)).save_pretrained(folder / "gpt2")
    BertModel(BertConfig(**sizes, **vocabulary)).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "bert")
    (folder / "text.txt").write_text("\n".join(sentences), encoding="utf-8")
    tokenizer.save_pretrained(folder / "corpus" / "tokenizer")
    ids = np.array(tokenizer(" ".join(sentences))["input_ids"], np.uint16)
    np.save(folder / "corpus" / "train.npy", ids[:600])
    np.save(folder / "corpus" / "validation.npy", ids[600:])
    (folder / "corpus" / "corpus.json").write_text("{}")
    return folder


def recipe(here, model, data, out, *arguments):
    short = ["--length", "16", "--tokens", "400", "--calibration-tokens", "64", "--clip-epochs", "2"]
    short += ["--train-sentences", "40", "--sentences", "20"]
    return running.here(NAME, here / model, data, *short, "--output-dir", out, *arguments)


@pytest.mark.parametrize("data", ["text.txt", "corpus"])
def test_every_row_of_a_language_model_is_measured_and_the_table_is_printed(here, tmp_path, data):
    done = recipe(here, "gpt2", here / data, tmp_path, "--columns", "W4A4", "--seeds", "0", "1")
    assert done.returncode == 0, done.stderr
    cells = {(c["row"], c["seed"]): c for c in json.loads((tmp_path / "results.json").read_text())["cells"]}
    assert len(cells) == 11 + 2 * 2 and all(len(c["values"]) == 25 and c["moved"] is None for c in cells.values())
    steps = {row: round(c["steps"], 2) for (row, _), c in cells.items()}
    assert steps["uniform"] == 1 and steps["7-levels"] == 0.43 and steps["wider"] == 1.14
    assert steps["random-10x2"] == steps["absolute-10x2"] == steps["first-order-10x2-clipped"]
    assert 1.05 < steps["magnitude-10x2"] < steps["magnitude-5x4"] < 1.3
    assert cells["random-5x4", 0]["values"] != cells["random-5x4", 1]["values"]
    assert (tmp_path / "results.md").read_text() in done.stdout and "| random-5x4 |" in done.stdout


def test_an_encoder_is_judged_by_its_sentence_vectors_and_parity_says_what_it_follows(here, tmp_path):
    rows = ["--rows", "uniform", "magnitude-10x2", "--columns", "W8A8", "W4A4", "--parity", "spikellm"]
    done = recipe(here, "bert", "subj-mini", tmp_path, *rows)
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert [len(c["values"]) for c in cells] == [20] * 4 and set(cells[0]["values"]) <= {0, 100}
    assert 0 < cells[0]["moved"] < cells[2]["moved"] and cells[0]["nonzero"] > 0.9
    assert "Follows SpikeLLM (arXiv 2407.04752" in done.stdout and "Differs: " in done.stdout
    assert "Sentence vectors moved" in done.stdout


def test_finished_cells_are_kept_and_other_options_are_refused(here, tmp_path):
    rows = ["--columns", "W4A4", "--rows", "uniform"]
    recipe(here, "gpt2", here / "text.txt", tmp_path, *rows)
    before = json.loads((tmp_path / "results.json").read_text())["cells"]
    done = recipe(here, "gpt2", here / "text.txt", tmp_path, *rows, "7-levels")
    after = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert done.returncode == 0 and after[:1] == before and len(after) == 2
    done = recipe(here, "gpt2", here / "text.txt", tmp_path, *rows, "--steps", "channel")
    assert done.returncode == 2 and "other options (steps was token, is channel): give another" in done.stderr


def other_tokens(folder):
    file = folder / "corpus" / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] = {name + "x": i for name, i in content["model"]["vocab"].items()}
    content["model"]["merges"] = []
    file.write_text(json.dumps(content))


def test_a_corpus_of_another_tokenizer_is_refused(here, tmp_path):
    shutil.copytree(here / "corpus", tmp_path / "corpus")
    other_tokens(tmp_path)
    done = recipe(here, "gpt2", tmp_path / "corpus", tmp_path / "out")
    assert done.returncode == 2 and "must hold tokens of the model's tokenizer, holds another's" in done.stderr


BAD = [
    (["nowhere", "subj-mini"], "no tokenizer at '.*nowhere'"),
    (["gpt2", "nothing.txt"], "'nothing.txt' is no file or folder"),
    (["gpt2", "text.txt", "--length", "4000"], "must have 8000 tokens beside 4000 of calibration"),
    (["gpt2", "text.txt", "--parity", "spikellm", "--steps", "tensor"], "has steps by token, got --steps tensor"),
    (["gpt2", "text.txt", "--rows", "most"], "invalid choice: 'most'"),
]


@pytest.mark.parametrize("arguments, message", BAD)
def test_what_is_given_wrongly_is_said_in_a_sentence(here, tmp_path, arguments, message):
    model, data, *rest = arguments
    done = recipe(here, model, here / data if data == "text.txt" else data, tmp_path, *rest)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(message, done.stderr)
