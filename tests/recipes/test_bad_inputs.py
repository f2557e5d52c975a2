"""Wrong command lines and damaged files, one a row: exit status 2 and one sentence that says what is wrong where."""

import json
import os
import re
import shutil
import struct

import pytest
import running
import torch
from safetensors.torch import load_file, save_file

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM, load_task
from spikegpt_lora.pretrain.tokenizer import train_tokenizer
from spikegpt_lora.utils.files import locked

RANDOM = ["--model", "random", "--n-embd", "8", "--n-layer", "1", "--vocab-size", "300"]
QUICK = ["--task", "subj-mini", "--epochs", "1", "--max-train-samples", "32", "--methods", "head"]
QUICK += ["--precision", "float32"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A language model with its tokenizer, a finished comparison and a pre-training, to be copied and spoilt."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = train_tokenizer(load_task("subj-mini")["train"]["text"], 300)
    torch.manual_seed(0)
    config = SpikeGPTConfig(vocab_size=len(tokenizer), n_embd=8, n_layer=2, eos_token_id=2, pad_token_id=0)
    SpikeGPTForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    train_tokenizer(load_task("subj-mini")["train"]["text"], 200).save_pretrained(folder / "smaller")
    assert running.here("subj_finetune.py", *QUICK, *RANDOM, "--output-dir", folder / "out").returncode == 0
    (folder / "text.txt").write_text("\n".join(f"{i} the film is good and it is long ." for i in range(1500)))
    pretrained = running.here("pretrain.py", folder / "text.txt", "--output-dir", folder / "pretrained", *PRETRAIN)
    assert pretrained.returncode == 0, pretrained.stderr
    return folder


PRETRAIN = ["--decontaminate", "none", "--n-layer", "1", "--n-embd", "8", "--vocab-size", "60", "--batch-size", "2"]
PRETRAIN += ["--length", "8", "--steps", "3", "--precision", "float32"]


def refused(name, arguments, message, status=2):
    done = running.here(name, *arguments)
    said = " ".join(done.stderr.split())
    assert done.returncode == status, said
    assert re.search(message, said), said
    assert said.count("error:") == 1 and "Traceback" not in said
    return done


def spoilt(saved, tmp_path, part, spoil):
    shutil.copytree(saved / part, tmp_path / part)
    spoil(tmp_path / part)
    return tmp_path / part


def content(name, text):
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def gone(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def said(**changes):
    def spoil(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def tensors(change):
    def spoil(folder):
        held = change(load_file(folder / "model.safetensors"))
        save_file(held, folder / "model.safetensors", {"format": "pt"})

    return spoil


def header(text, size=None):
    return content("model.safetensors", struct.pack("<Q", len(text) if size is None else size) + text + bytes(64))


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def with_code(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"emb.weight": Trap()}, folder / "pytorch_model.bin")


COMMANDS = [
    ("S01", ["--learning-rate", "0"], "learning_rate must be > 0 and finite, got 0.0"),
    ("S06", ["--epochs", "0"], "epochs must be >= 1, got 0"),
    ("S08", ["--epochs", "1.5"], "--epochs: invalid int, or METHOD=int value: '1.5'"),
    ("S13", ["--rank", "5000", "--methods", "lora"], "rank must be <= 32, the longest side .* got 5000"),
    ("S15", ["--v-threshold", "nan"], "v_threshold must be >= 0 and finite, got nan"),
    ("S16", ["--v-threshold", "inf"], "v_threshold must be >= 0 and finite, got inf"),
    ("S19", ["--target-sparsity", "1.5"], r"target_sparsity must be in \(0, 1\), or None, got 1.5"),
    ("S28", ["--methods", "foo"], "invalid choice: 'foo'"),
    ("S31", ["--seeds", "-1"], r"--seeds: must be between 0 and 2\*\*32 - 1, got -1"),
    ("S32", ["--seeds", "4294967296"], r"--seeds: must be between 0 and 2\*\*32 - 1, got 4294967296"),
    ("S37", ["--max-train-samples", "0"], "must be >= 1, got 0"),
    ("S38", ["--max-train-samples", "1"], "--max-train-samples must leave two classes or more, got 1"),
    ("S57", ["--data-dir", "nowhere"], "data_dir must be None for the built-in task subj-mini, got 'nowhere'"),
    ("S58", ["--bf16"], "--precision and --bf16 must ask for the same, got float32 and bfloat16: give one of the two"),
    (
        "S59",
        ["--model", "embedded", "--matrix-spikes", "integer", "--spike-levels", "3"],
        "--spike-levels is for .*: a model that has integer spikes has its own",
    ),
    (
        "N1",
        ["--learning-rate", "1e38", "--methods", "full", "--batch-size", "8"],
        "full with seed 0 diverged: .* below 1e[+]38 .*full=",
    ),
]


@pytest.mark.parametrize("arguments, message", [row[1:] for row in COMMANDS], ids=[row[0] for row in COMMANDS])
def test_a_wrong_value_of_an_option_is_named(tmp_path, arguments, message):
    refused("subj_finetune.py", [*QUICK, *RANDOM, "--output-dir", tmp_path, *arguments], message)


@pytest.mark.parametrize("place", ["file", "file/below"])
@pytest.mark.parametrize("name", ["subj_finetune.py", "pretrain.py"])
def test_an_output_folder_that_is_a_file_is_named(saved, tmp_path, place, name):
    (tmp_path / "file").write_text("mine")
    arguments = [*QUICK, *RANDOM] if name == "subj_finetune.py" else [saved / "text.txt", *PRETRAIN]
    message = "/file.*; a file stands where a folder should be: name another folder"
    refused(name, [*arguments, "--output-dir", tmp_path / place], message)


@pytest.mark.parametrize("name", ["subj_finetune.py", "pretrain.py"])
def test_a_folder_in_which_another_run_works_is_named(saved, tmp_path, name):
    arguments = [*QUICK, *RANDOM] if name == "subj_finetune.py" else [saved / "text.txt", *PRETRAIN]
    with locked(tmp_path):
        message = rf"another run \(pid {os.getpid()}\) works in {tmp_path}: wait for it, stop it, or give another"
        refused(name, [*arguments, "--output-dir", tmp_path], message)


MODELS = [
    ("M01", cut("config.json", 40), "model/config.json is no whole JSON file"),
    ("M02", content("config.json", "[]"), "model/config.json must hold a JSON object, got a list"),
    ("M03", said(n_embd="8"), "model/config.json: .*n_embd must be a whole number, got '8'"),
    ("M04", said(n_layer=2.0), "n_layer must be a whole number, got 2.0"),
    ("M05", said(n_heads=2), "unknown key 'n_heads'"),
    ("M06", said(lif_v_reset="abc"), "lif_v_reset must be a finite number, or None, got 'abc'"),
    ("M07", said(lif_decay_input="no"), "lif_decay_input must be True or False, got 'no'"),
    ("M08", said(pad_token_id=-5), "pad_token_id must be a token's id below 300, got -5"),
    ("M09", said(model_type="gpt2"), "config.json must say model_type 'spikegpt', says 'gpt2'"),
    ("M10", said(n_layer=3), "config.json says n_layer 3 for 2 of the weights"),
    ("M11", said(n_layer=1), "config.json says n_layer 1 for 2 of the weights"),
    ("M12", said(n_embd=16), "config.json says n_embd 16 for 8 of the weights"),
    ("M13", said(vocab_size=10**12), "config.json says vocab_size 1000000000000 for 300 of the weights"),
    ("M14", said(n_layer=10**7), "config.json says n_layer 10000000 for 2 of the weights"),
    ("M15", said(vocab_size=100), "config.json says vocab_size 100 for 300 of the weights"),
    ("M18", gone("model.safetensors"), "at '.*model'.* no file named model.safetensors"),
    ("M19", cut("model.safetensors", 9000), "model/model.safetensors is damaged or cut short"),
    ("M20", content("model.safetensors", ""), "model/model.safetensors is damaged or cut short"),
    ("M21", header(b"{}", 2**63), "model/model.safetensors is damaged or cut short"),
    ("M22", header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36000]}}'), "model.safetensors is damaged"),
    ("M23", header(b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,64]}}'), "model.safetensors is damaged"),
    ("M24", tensors(lambda t: {f"foo.{k}": v for k, v in t.items()}), "it has no emb.weight .* but foo.head.weight"),
    (
        "M25",
        tensors(lambda t: {k: v for k, v in t.items() if "1.att.key" not in k}),
        "has no .*blocks.1.att.key.weight",
    ),
    ("M26", tensors(lambda t: t | {"spikegpt.emb.weight": t["spikegpt.emb.weight"] * torch.nan}), "emb.weight"),
    ("M27", tensors(lambda t: t | {"spikegpt.more": torch.ones(2)}), "it has spikegpt.more beside"),
    ("M28", tensors(lambda t: t | {"spikegpt.ln_out.bias": torch.ones(3)}), r"ln_out.bias must be \(8,\), got \(3,\)"),
    ("S79", content("tokenizer.json", "{}"), "no tokenizer at '.*model', or a damaged one"),
    ("V10", with_code, "pytorch_model.bin was refused: .* nothing in it was executed"),
    ("V11", said(auto_map={"AutoModel": "evil.Model"}), "auto_map must name classes of modeling_spikegpt.py"),
]


@pytest.mark.parametrize("name", ["subj_finetune.py", "generate.py"])
@pytest.mark.parametrize("spoil, message", [row[1:] for row in MODELS], ids=[row[0] for row in MODELS])
def test_a_damaged_model_is_refused_by_name(saved, tmp_path, monkeypatch, name, spoil, message):
    monkeypatch.chdir(tmp_path)
    model = spoilt(saved, tmp_path, "model", spoil)
    more = [*QUICK, "--output-dir", tmp_path / "out"] if name == "subj_finetune.py" else []
    done = refused(name, ["--model", model, *more], message)
    assert name == "subj_finetune.py" or done.stdout == ""
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out" / "base").exists()


def test_the_tokenizer_of_another_model_is_refused(saved, tmp_path):
    model = ["--model", saved / "model", "--tokenizer", saved / "smaller", "--output-dir", tmp_path]
    refused("subj_finetune.py", [*QUICK, *model], "the tokenizer has other tokens than the model's own in .*model")


def test_a_file_that_says_it_holds_more_than_it_does_is_refused(saved, tmp_path):
    torch.save({"emb.weight": torch.ones(1).expand(10**12, 8)}, tmp_path / "x.pth")
    model = ["--model", tmp_path / "x.pth", "--tokenizer", saved / "model", "--output-dir", tmp_path / "out"]
    refused("subj_finetune.py", [*QUICK, *model], "x.pth must hold its tensors' 32,000,000,000,000 bytes, has 1,")


def foreign(folder):
    shutil.copytree(folder / "head", folder / "copy")


def other_place(folder):
    shutil.copytree(folder / "head" / "seed0", folder / "head" / "seed7")


def of_nobody(folder):
    (folder / "x" / "seed7").mkdir(parents=True)
    (folder / "x" / "seed7" / "run.json").write_text("{}")


FOLDERS = [
    ("S69", cut("options.json", 17), [], "out/options.json is no whole JSON file"),
    ("S70", content("options.json", "[]"), [], "out/options.json must hold a JSON object, got a list"),
    ("S71", gone("options.json"), ["--rank", "head=3"], "results of other settings .settings.head.rank was 16, is 3"),
    ("S71b", gone("options.json", "results.json"), [], "holds results, but no options.json says of which settings"),
    ("S71c", gone("options.json"), ["--max-length", "64"], "max_length was 128, is 64"),
    ("S72", cut("head/seed0/run.json", 17), [], "head/seed0/run.json is no whole JSON file"),
    ("S73", content("head/seed0/run.json", "{}"), [], "head/seed0/run.json must hold method, .* has no method, seed"),
    (
        "S75",
        gone("base/seed0/model.safetensors"),
        ["--methods", "full"],
        "base/seed0'.* no file named model.safetensors",
    ),
    (
        "S76",
        cut("base/seed0/model.safetensors", 3000),
        ["--methods", "full"],
        "base/seed0/model.safetensors is damaged",
    ),
    ("S77", of_nobody, [], "x/seed7/run.json must hold method"),
    ("S78", foreign, [], "copy/seed0/run.json must be the record of copy/seed0, is that of 'head' with seed 0"),
    ("S78b", other_place, [], "head/seed7/run.json must be the record of head/seed7, is that of 'head' with seed 0"),
    ("S79", content("tokenizer/tokenizer.json", "{}"), [], "no tokenizer at '.*out/tokenizer', or a damaged one"),
]


@pytest.mark.parametrize("spoil, more, message", [row[1:] for row in FOLDERS], ids=[row[0] for row in FOLDERS])
def test_a_damaged_comparison_is_named(saved, tmp_path, spoil, more, message):
    out = spoilt(saved, tmp_path, "out", spoil)
    refused("subj_finetune.py", [*QUICK, *RANDOM, "--output-dir", out, *more], message)


SAID = [
    ("G01", ["--temperature", "nan"], "--temperature: must be >= 0 and finite, got nan"),
    ("G02", ["--temperature", "inf"], "--temperature: must be >= 0 and finite, got inf"),
    ("G04", ["--temperature", "-1"], "--temperature: must be >= 0 and finite, got -1"),
    ("G05", ["--top-p", "0"], r"--top-p: must be in \(0, 1\], got 0"),
    ("G06", ["--top-p", "-1"], r"--top-p: must be in \(0, 1\], got -1"),
    ("G07", ["--top-p", "2"], r"--top-p: must be in \(0, 1\], got 2"),
    ("G08", ["--top-p", "nan"], r"--top-p: must be in \(0, 1\], got nan"),
    ("G09", ["--seed", "-1"], r"--seed: must be between 0 and 2\*\*32 - 1, got -1"),
    ("G10", ["--seed", str(2**70)], "--seed: must be between"),
    ("G13", ["--prompt", os.fsdecode(b"ab\xff")], "--prompt: must be UTF-8 text, found byte 0xff at 3"),
    ("G16", ["--model", "nowhere"], "no language model at 'nowhere'"),
]


@pytest.mark.parametrize("arguments, message", [row[1:] for row in SAID], ids=[row[0] for row in SAID])
def test_generating_refuses_before_it_writes(arguments, message):
    assert refused("generate.py", arguments, message).stdout == ""


TEXTS = [
    ("P02", b"", "at least 100 documents are needed"),
    ("P03", bytes(range(256)) * 9, "text.txt must be UTF-8 text"),
    ("P04", "film\n".encode("utf-16") * 200, "text.txt must be UTF-8 text"),
    ("P05", b"one line", "at least 100 documents are needed"),
]


@pytest.mark.parametrize("text, message", [row[1:] for row in TEXTS], ids=[row[0] for row in TEXTS])
def test_a_text_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "text.txt").write_bytes(text)
    refused("pretrain.py", [tmp_path / "text.txt", "--output-dir", tmp_path / "out", *PRETRAIN], message)


PRETRAINING = [
    ("P16", lambda folder: None, ["--steps", "0"], "steps must be >= 1, got 0"),
    ("P19", lambda folder: None, ["--dropout", "2"], r"--dropout: must be in \[0, 1\), got 2"),
    ("P20", lambda folder: None, ["--save-minutes", "nan"], "--save-minutes: must be >= 0, got nan"),
    ("P21", cut("training.safetensors", 900), [], "training.safetensors is no whole file of a training run"),
    ("P22", lambda f: save_file({}, f / "training.safetensors", {"run": "{}"}), [], "training.safetensors is no whole"),
    (
        "P23",
        cut("corpus/text/train.npy", 300),
        [],
        "text/train.npy is damaged .* delete .*corpus/text, and it is made again",
    ),
    ("P24", content("corpus/text/tokenizer/tokenizer.json", "{}"), [], "no tokenizer at '.*text/tokenizer'"),
    ("P25", lambda folder: None, ["--length", "4"], "holds a run of other settings .length was 8, is 4"),
]


@pytest.mark.parametrize("spoil, more, message", [row[1:] for row in PRETRAINING], ids=[row[0] for row in PRETRAINING])
def test_a_damaged_pretraining_is_named(saved, tmp_path, spoil, more, message):
    out = spoilt(saved, tmp_path, "pretrained", spoil)
    refused("pretrain.py", [saved / "text.txt", "--output-dir", out, *PRETRAIN, *more], message)


@pytest.mark.parametrize("facts", ["[]", "{}", '{"key"'])
def test_a_corpus_whose_facts_are_damaged_is_made_again(saved, tmp_path, facts):
    out = spoilt(saved, tmp_path, "pretrained", content("corpus/text/corpus.json", facts))
    assert running.here("pretrain.py", saved / "text.txt", "--output-dir", out, *PRETRAIN).returncode == 0
    assert json.loads((out / "corpus" / "text" / "corpus.json").read_text())["documents"] == 1500
