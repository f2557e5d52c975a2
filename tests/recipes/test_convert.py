"""recipes/convert.py as a user runs it: a model and a text in, a model whose matrices read integer spikes out."""

import json
import random

import pytest
import torch
from running import here, in_a_process, interrupted
from safetensors.torch import load_file
from torch import nn

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM, load_task
from spikegpt_lora.checkpoint import load_language_model, save_upstream_checkpoint
from spikegpt_lora.pretrain.loop import Pretraining
from spikegpt_lora.pretrain.tokenizer import train_tokenizer
from spikegpt_lora.report.cards import language_model_head

SMALL = ["--decontaminate", "none", "--precision", "float32", "--tokens", "4096", "--measure-tokens", "256"]
TRAINED = ["--batch-size", "2", "--length", "8", "--steps", "6"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a small model of lively weights, its .pth file, and a text."""
    folder = tmp_path_factory.mktemp("made")
    words, shuffle = " ".join(load_task("subj-mini")["train"]["text"]).split(), random.Random(0)
    documents = [" ".join(shuffle.sample(words, 80)) for _ in range(200)]
    (folder / "text.txt").write_text("\n".join(documents), encoding="utf-8")
    tokenizer = train_tokenizer(documents, 300)
    torch.manual_seed(0)
    config = SpikeGPTConfig(vocab_size=len(tokenizer), n_embd=16, n_layer=2, eos_token_id=tokenizer.eos_token_id)
    model = SpikeGPTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    save_upstream_checkpoint(model, folder / "model.pth")
    return folder


@pytest.fixture(scope="module")
def converted(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted")
    done = in_a_process("convert.py", made / "model", made / "text.txt", "--output-dir", out, *SMALL)
    assert done.returncode == 0, done.stderr
    return out, done


def read_by_matrices(model, ids):
    found = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(ids)
    return found


def test_every_matrix_of_the_model_it_leaves_reads_integers(converted):
    model, tokenizer = load_language_model(str(converted[0] / "model"))
    read = read_by_matrices(model, torch.arange(40).view(2, 20))
    assert len(read) == 7 * 2 + 1 and all(torch.equal(x, x.round()) and x.any() for x in read)
    assert len(tokenizer) == model.config.vocab_size


def test_its_report_says_what_each_part_costs_and_the_card_says_the_same(converted):
    record = json.loads((converted[0] / "model" / "convert.json").read_text())
    parts = [one["part"] for one in record["costs"]]
    assert parts == ["ln0's deviation fixed", "integer amplitude", "and readers", "and att.output", "and ffn.value",
                     "everything", "everything, WKV with powers of two"]  # fmt: skip
    card = (converted[0] / "model" / "README.md").read_text(encoding="utf-8")
    for one in record["costs"]:
        assert f"| {one['part']} | {one['nats']:+.4f} | {one['error']:.4f} |" in card
    assert 0 < record["reads"] < 1 and record["nonzero"].keys() >= {"head", "blocks.0.att.key", "blocks.1.ffn.value"}
    assert card.startswith(language_model_head()) and "trust_remote_code=True" in card
    assert card in converted[1].stdout and "Warning" not in converted[1].stderr


def test_the_same_command_finds_what_is_there_and_another_makes_it_anew(converted, made):
    command = ["convert.py", made / "model", made / "text.txt", "--output-dir", converted[0], *SMALL]
    before = (converted[0] / "model" / "model.safetensors").stat().st_mtime_ns
    again = here(*command)
    assert again.returncode == 0 and "converted already" in again.stdout
    assert (converted[0] / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_an_upstream_file_gives_the_same_as_the_folder(converted, made, tmp_path):
    arguments = [made / "text.txt", "--output-dir", tmp_path, "--tokenizer", made / "model", *SMALL]
    done = here("convert.py", made / "model.pth", *arguments)
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(out / "model" / "model.safetensors") for out in (tmp_path, converted[0]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_other_recipes_take_the_model(converted, made, tmp_path):
    model = converted[0] / "model"
    written = here("generate.py", "--model", model, "--max-new-tokens", 5, "--prompt", "the film")
    assert written.returncode == 0 and written.stdout.startswith("the film"), written.stderr
    further = [
        "--batch-size",
        "2",
        "--length",
        "8",
        "--steps",
        "2",
        "--precision",
        "float32",
        "--decontaminate",
        "none",
    ]
    done = here("pretrain.py", made / "text.txt", "--model", model, "--output-dir", tmp_path, *further)
    assert done.returncode == 0, done.stderr
    sizes = ["--task", "subj-mini", "--epochs", "1", "--max-train-samples", "16", "--methods", "full"]
    tuned = here(
        "subj_finetune.py", "--model", model, "--output-dir", tmp_path / "subj", "--precision", "float32", *sizes
    )
    assert tuned.returncode == 0, tuned.stderr
    trained = load_language_model(str(tmp_path / "model"))[0]
    assert all(torch.equal(x, x.round()) for x in read_by_matrices(trained, torch.arange(20).view(1, 20)))


def test_salient_channels_get_more_levels(made, tmp_path):
    arguments = ["--output-dir", tmp_path, "--saliency", "output", "--share", "0.25", "--factor", "3", *SMALL]
    done = here("convert.py", made / "model", made / "text.txt", *arguments, "--spike-levels", 1, "--ffn-levels", 2)
    assert done.returncode == 0, done.stderr
    weights = load_file(tmp_path / "model" / "model.safetensors")
    for name in (name for name in weights if name.endswith(".most")):
        low = 2 if "ffn.spike_value" in name else 1
        assert sorted(weights[name].unique().tolist()) == [low, 3 * low]
        assert (weights[name] == 3 * low).sum() == len(weights[name]) // 4
    assert "25% of the channels have 3 times as many, by output" in done.stdout


@pytest.mark.parametrize("more", [[], ["--teacher"]], ids=["on the text", "towards the float model"])
def test_a_stopped_training_ends_with_the_same_weights(made, tmp_path, monkeypatch, more):
    command = ["convert.py", made / "model", made / "text.txt", *SMALL, *TRAINED, *more, "--output-dir"]
    assert here(*command, tmp_path / "whole").returncode == 0
    one_step = Pretraining._one_step

    def stopped_at_the_third(run):
        if run.step == 3:
            raise KeyboardInterrupt
        return one_step(run)

    with monkeypatch.context() as patch:
        patch.setattr(Pretraining, "_one_step", stopped_at_the_third)
        stopped = here(*command, tmp_path / "stopped", "--save-minutes", "0")
    assert stopped.returncode == 130 and "the same command goes on from the last save" in stopped.stderr
    done = here(*command, tmp_path / "stopped")
    assert done.returncode == 0 and "converted already" in done.stdout and "going on from step 3" in done.stdout
    whole, resumed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "stopped"))
    untrained = load_file(tmp_path / "whole" / "converted" / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole | resumed)
    assert not torch.equal(whole["head.weight"], untrained["head.weight"])
    record = json.loads((tmp_path / "whole" / "model" / "convert.json").read_text())
    assert record["training"]["teacher"] is bool(more) and "| after training |" in done.stdout


def test_a_run_with_a_teacher_is_none_without(made, tmp_path):
    command = ["convert.py", made / "model", made / "text.txt", *SMALL, *TRAINED, "--output-dir", tmp_path]
    assert here(*command).returncode == 0
    refused = here(*command, "--teacher")
    assert refused.returncode == 2 and "other settings (teacher was None, is " in refused.stderr


def test_ctrl_c_while_it_measures_leaves_no_half_model(made, tmp_path):
    arguments = [made / "model", made / "text.txt", "--output-dir", tmp_path, *SMALL[:-1], "0"]
    done = interrupted("convert.py", *arguments, once=(tmp_path / "corpus" / "corpus.json").is_file)
    assert done.returncode == 130 and "the same command goes on" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "model" / "convert.json").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere", "text.txt"], "no language model at 'nowhere'"),
        (["nowhere.pth", "text.txt"], "nowhere.pth has no tokenizer: name its folder or hub id with --tokenizer"),
        (["nowhere.pth", "text.txt", "--tokenizer", "embedded"], "no checkpoint file at nowhere.pth"),
        (["embedded", "text.txt"], "read integer spikes already: give one that reads real numbers"),
        (["embedded", "nowhere.txt", "--tokenizer", "x"], "--tokenizer is for a .pth file: embedded has its own"),
        (["embedded", "nowhere.txt", "--teacher"], "--teacher needs --steps"),
        (["embedded", "nowhere.txt", "--steps", "-1"], "steps must be >= 1, got -1"),
        (["embedded", "nowhere.txt", "--measure-tokens", "-1"], "--measure-tokens must be >= 0, got -1"),
        (["embedded", "nowhere.txt", "--spike-levels", "0"], "--spike-levels: must be >= 1, got 0"),
        (["embedded", "nowhere.txt", "--saliency", "hessian"], "--saliency: invalid choice: 'hessian'"),
    ],
)
def test_wrong_input_is_one_clear_error(tmp_path, arguments, message):
    done = here("convert.py", *arguments, "--decontaminate", "none", "--output-dir", tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_text_that_is_not_there_is_one_clear_error(made, tmp_path):
    done = here("convert.py", made / "model", "nowhere.txt", "--decontaminate", "none", "--output-dir", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: 'nowhere.txt' is no file or folder")


def test_too_many_levels_too_little_text_and_spikes_already_are_sentences(converted, made, tmp_path):
    command = ["convert.py", made / "model", made / "text.txt", "--output-dir", tmp_path, *SMALL]
    for more, message in [
        (["--spike-levels", "128"], "spike_levels must be in 1 ... 127, got 128"),
        (["--saliency", "random", "--factor", "50"], "50 x 3 levels are more than 127"),
        (["--tokens", "512"], "scales are fitted on 4,096 tokens or more, got 512"),
        (["--measure-tokens", "100"], "losses are measured on 128 tokens or more, got 100"),
    ]:
        done = here(*command, *more)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    again = here("convert.py", converted[0] / "model", made / "text.txt", "--output-dir", tmp_path, *SMALL)
    assert again.returncode == 2 and "read integer spikes already" in again.stderr
