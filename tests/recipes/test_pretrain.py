"""recipes/pretrain.py and recipes/generate.py as a user runs them: from a text file to a model that writes."""

import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from running import RECIPES, here, in_a_process, interrupted
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spikegpt_lora import SpikeGPTForSequenceClassification, embedded_checkpoint, load_task
from spikegpt_lora.checkpoint import load_language_model
from spikegpt_lora.convert.generation import WEIGHTS, pack_weights
from spikegpt_lora.pretrain.loop import Pretraining

SMALL = ["--n-layer", "1", "--n-embd", "16", "--vocab-size", "400", "--batch-size", "4", "--length", "16"]
MINI = ["--decontaminate", "subj-mini", "--precision", "float32"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents made of the built-in sentences' words in another order, and three that quote one."""
    sentences = [text for split in load_task("subj-mini").values() for text in split["text"]]
    words, shuffle = " ".join(sentences).split(), random.Random(0)
    documents = [" ".join(shuffle.sample(words, 60)) for _ in range(150)]
    long = [sentence for sentence in sentences if len(sentence.split()) > 12]
    documents += [f"I read: {sentence.upper()}" for sentence in long[:3]]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrain") / "out"
    done = in_a_process("pretrain.py", text, "--output-dir", out, "--steps", 120, *MINI, *SMALL)
    assert done.returncode == 0, done.stderr
    return out, done


def test_it_says_what_it_left_out_how_fast_it_is_and_how_good(trained):
    _, done = trained
    assert "153 documents, without 0 duplicates and 3 that share 8 words" in done.stdout
    assert "120/120" in done.stderr and "loss=" in done.stderr and "tokens/s=" in done.stderr
    assert "| text, this model |" in done.stdout and "| text, 5-gram Kneser-Ney |" in done.stdout
    assert "Warning" not in done.stderr


def test_the_folder_holds_a_model_that_auto_classes_load_and_its_card(trained):
    folder = trained[0] / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == 400 and model.config.eos_token_id == tokenizer.eos_token_id
    record = json.loads((folder / "pretraining.json").read_text())
    assert record["tokens"] == 120 * 4 * 16 and record["texts"]["text"]["left_out"] == 3
    card = (folder / "README.md").read_text(encoding="utf-8")
    for population in ("emb", "blocks.0.lif1", "blocks.0.lif2"):
        assert f"| {population} | {record['firing'][population]['rate']:.3f} |" in card
    assert (folder / "loss.csv").read_text().splitlines()[0] == "step,loss,seconds"
    assert len(record["samples"]) == 10 and all(f"- {text}" in card for text in record["samples"])
    assert card.startswith("---\nlanguage: en\n") and (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_with_integer_spikes_every_matrix_reads_integers_and_the_model_is_centred(text, tmp_path):
    spikes = ["--matrix-spikes", "integer", "--steps", "8"]
    done = here("pretrain.py", text, "--output-dir", tmp_path, *spikes, *MINI, *SMALL)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "model" / "pretraining.json").read_text())
    sources = {row["matrix"]: (row["reads"], row["levels"] is None) for row in record["matrices"]}
    assert len(sources) == 8 and not any(real for _, real in sources.values())
    assert sources["head"][0] == "residual stream" and sources["ffn.value"][0] == "ffn.spike_value"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.token_shift == "rows" and any(m.centre.any() for m in model.modules() if hasattr(m, "centre"))


def test_a_trained_model_is_made_to_read_integer_spikes_and_trained_further(trained, text, tmp_path):
    further = ["--model", trained[0] / "model", "--batch-size", "4", "--length", "16", "--steps", "8", *MINI]
    spikes = [
        "--token-shift",
        "rows",
        "--matrix-spikes",
        "integer",
        "--spike-levels",
        "7",
        "--teacher",
        trained[0] / "model",
    ]
    done = here("pretrain.py", text, "--output-dir", tmp_path, *further, *spikes)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "model" / "pretraining.json").read_text())
    assert record["config"]["spike_levels"] == 7 and all(row["levels"] for row in record["matrices"])
    assert record["texts"]["text"]["model"]["nats_per_token"] < 5.9  # of 400 tokens, chance is 5.99
    assert f"towards what {trained[0] / 'model'} says of each next token" in done.stdout


def test_several_texts_are_measured_one_by_one(trained, text, tmp_path):
    (tmp_path / "other.txt").write_text(
        "\n".join(f"zebra {i} trots on and on, as zebras do" for i in range(2000)), encoding="utf-8"
    )
    texts = [f"{text}=3", f"{tmp_path / 'other.txt'}=1", "--model", trained[0] / "model", "--length", "16"]
    done = here("pretrain.py", *texts, "--output-dir", tmp_path / "out", "--steps", "4", *MINI)
    assert done.returncode == 0, done.stderr
    assert "| text, this model |" in done.stdout and "| other, this model |" in done.stdout
    record = json.loads((tmp_path / "out" / "model" / "pretraining.json").read_text())
    assert {name: facts["streams"] for name, facts in record["texts"].items()} == {"text": 3, "other": 1}


def test_a_finished_run_is_made_longer(trained, text):
    out, _ = trained
    done = here("pretrain.py", text, "--output-dir", out, "--steps", 130, *MINI, *SMALL)
    assert done.returncode == 0 and "going on from step 96" in done.stdout


def test_a_model_is_trained_further_with_its_tokenizer_and_on_pairs(trained, text, tmp_path):
    model = trained[0] / "model"
    sizes = ["--batch-size", "4", "--length", "16", "--steps", "50", "--pairs", "2"]
    done = here("pretrain.py", text, "--model", model, "--output-dir", tmp_path, *sizes, *MINI)
    assert done.returncode == 0, done.stderr
    assert "2 pairs of neighbouring sentences" in done.stdout
    assert (tmp_path / "model" / "loss.csv").read_text().startswith("step,loss,pair_loss,seconds\n")
    assert (tmp_path / "model" / "tokenizer.json").read_text() == (model / "tokenizer.json").read_text()
    first = float((tmp_path / "model" / "loss.csv").read_text().splitlines()[1].split(",")[1])
    assert first < float((model / "loss.csv").read_text().splitlines()[1].split(",")[1])  # it did not begin anew


def test_a_run_goes_on_in_its_own_precision_on_any_processor(text, tmp_path, cpu):
    command = ["pretrain.py", text, "--output-dir", tmp_path, "--decontaminate", "none", *SMALL, "--steps"]
    cpu("amx_bf16")
    assert "precision: bfloat16 (" in here(*command, 4).stdout
    cpu("avx2")
    done = here(*command, 8)
    assert "precision: bfloat16 (as the folder was begun; " in done.stdout and "going on from step 3" in done.stdout
    record = json.loads((tmp_path / "model" / "pretraining.json").read_text())
    assert record["precision"] == "bfloat16" and record["options"]["bf16"] is True
    assert "in bfloat16, the last" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    refused = here(*command, 8, "--precision", "float32")
    assert refused.returncode == 2 and "other settings (bf16 was True, is False)" in refused.stderr


def test_ctrl_c_says_how_to_go_on(text, tmp_path):
    arguments = [text, "--output-dir", tmp_path, "--steps", "100000", "--save-minutes", "0", *MINI, *SMALL]
    done = interrupted("pretrain.py", *arguments, once=(tmp_path / "training.safetensors").is_file)
    assert done.returncode == 130 and "the same command goes on" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("sent, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("step", [7, 16, 20], ids=["steady", "where the decay begins", "last"])
def test_a_stopped_pretraining_has_saved_its_step_and_ends_with_the_same_weights(
    text, tmp_path, monkeypatch, step, sent, status
):
    command = ["pretrain.py", text, "--steps", "20", *MINI, *SMALL, "--output-dir"]
    assert here(*command, tmp_path / "whole").returncode == 0
    one_step = Pretraining._one_step

    def signalled(run):
        if run.step == step - 1:
            os.kill(os.getpid(), sent)
        return one_step(run)

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "_one_step", signalled)
        stopped = here(*command, tmp_path / "stopped")
    assert stopped.returncode == status and "the same command goes on from the last save" in stopped.stderr
    done = here(*command, tmp_path / "stopped")
    assert done.returncode == 0 and f"going on from step {step}" in done.stdout
    whole, resumed = (load_file(tmp_path / name / "training.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole | resumed)


def test_the_models_files_are_readable_by_others(trained):
    mask = os.umask(0)
    os.umask(mask)
    modes = {file.stat().st_mode & 0o777 for file in trained[0].rglob("*") if file.is_file()}
    assert modes == {0o666 & ~mask}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.txt", *MINI], "'nowhere.txt' is no file or folder"),
        (
            [RECIPES / "pretrain.py", "--decontaminate", "sst"],
            "--decontaminate takes subj, subj-mini, cola, rte, a file, or none",
        ),
        ([RECIPES / "pretrain.py"], "the data of task subj were not found"),
        ([RECIPES.parent / "CITATION.cff", "--decontaminate", "none"], "at least 100 documents are needed"),
        ([RECIPES / "generate.py", "--n-layer", "0", "--batch-size", "0"], "batch_size must be >= 1, got 0"),
        ([RECIPES / "generate.py", "--n-layer", "0"], "n_layer must be >= 1, got 0"),
        ([RECIPES / "generate.py", "--model", "embedded", "--n-embd", "8"], "n_embd: sizes are for a new model"),
        ([RECIPES / "generate.py", "--model", "nowhere"], "no language model at 'nowhere'"),
        (["a.txt=3", "b.txt"], "of several texts each must be TEXT=N, read by N >= 1 of the streams; got 'b.txt'"),
        (["a.txt=3", "b/a.txt=1"], "texts must have names of their own, got a twice"),
        (["a.txt=3", "b.txt=1", "--batch-size", "4"], "--batch-size is for one text"),
        ([RECIPES / "generate.py", "--decay", "2"], "decay must be in [0, 1], got 2"),
        ([RECIPES / "generate.py", "--model", "embedded", "--spike-levels", "3"], "got spike_levels 3"),
    ],
)
def test_wrong_input_is_one_clear_error(tmp_path, arguments, message):
    done = here("pretrain.py", *arguments, "--output-dir", tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_the_same_seed_writes_the_same_text_and_another_one_another(trained):
    folder = trained[0] / "model"
    texts = [
        here("generate.py", "--model", folder, "--prompt", "The film", "--max-new-tokens", 20, "--seed", seed)
        for seed in (0, 0, 1)
    ]
    assert [done.returncode for done in texts] == [0, 0, 0]
    assert texts[0].stdout == texts[1].stdout != texts[2].stdout and texts[0].stdout.startswith("the film")
    assert "tokens a second" not in texts[0].stdout and "a second]" in texts[0].stderr


def test_an_empty_prompt_begins_a_text(trained):
    done = here("generate.py", "--model", trained[0] / "model", "--prompt", "", "--max-new-tokens", 8)
    assert done.returncode == 0 and done.stdout.strip() and "<eos>" not in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "nowhere"], "no language model at 'nowhere'"),
        (["--max-new-tokens", "0"], "--max-new-tokens: must be >= 1, got 0"),
        (["--temperature", "-1"], "temperature"),
        (["--weights", "int8"], "this model's read integer spikes: it is not packed; run it as it is"),
    ],
)
def test_generating_from_wrong_input_is_one_clear_error(arguments, message):
    done = here("generate.py", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_classifier_is_no_language_model(tmp_path):
    SpikeGPTForSequenceClassification.from_pretrained(embedded_checkpoint()).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(embedded_checkpoint()).save_pretrained(tmp_path)
    done = here("generate.py", "--model", tmp_path)
    assert done.returncode == 2 and "is no language model: it has no head.weight" in done.stderr


@pytest.mark.parametrize("weights", ["float32", *WEIGHTS])
def test_generate_writes_what_the_model_finds_most_likely(trained, weights):
    folder, prompt = str(trained[0] / "model"), "this film is one of the"
    greedy = ["--temperature", 0, "--max-new-tokens", 12]
    done = here("generate.py", "--model", folder, "--prompt", prompt, *greedy, "--weights", weights)
    model, tokenizer = load_language_model(folder)
    model = model if weights == "float32" else pack_weights(model, weights)
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=12)
    assert done.returncode == 0 and done.stdout.strip() == tokenizer.decode(ids[0], skip_special_tokens=True).strip()


def test_the_embedded_model_knows_english_by_the_order_of_its_words():
    model, tokenizer = load_language_model("embedded")

    def nats(words):
        ids = tokenizer(" ".join(words), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return model(ids, labels=ids).loss.item()

    sentences, draw = [text.split() for text in load_task("subj-mini")["test"]["text"][:40]], random.Random(0)
    gained = [nats(draw.sample(words, len(words))) - nats(words) for words in sentences]
    assert sum(gain > 0 for gain in gained) >= 0.95 * len(sentences) and sum(gained) / len(gained) > 1.5


def test_the_embedded_model_fits_its_limits():
    folder = Path(embedded_checkpoint())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) <= 12_000_000
    assert (folder / "model.safetensors").stat().st_size <= 16 * 2**20
    assert model.config.lif_tau == 2.0 and len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size
