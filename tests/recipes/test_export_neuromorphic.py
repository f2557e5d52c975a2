"""recipes/export_neuromorphic.py as a user runs it, on a tiny adapter."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import running
from helpers import lively
from safetensors.torch import load_file, save_file

import spikegpt_lora.export
from spikegpt_lora import SpikeGPTConfig, SpikeGPTForSequenceClassification, load_task
from spikegpt_lora.commands import export
from spikegpt_lora.export import Bundle, check_bundle
from spikegpt_lora.pretrain.tokenizer import train_tokenizer
from spikegpt_lora.utils.files import locked

NAME = "export_neuromorphic.py"
SUBJ_MINI = ["--task", "subj-mini", "--sentences", "6"]


def test_one_command_leaves_a_right_bundle_pictures_and_a_summary(finetuned, tmp_path):
    arguments = [*SUBJ_MINI, "--weights", "int8", "--event-driven", "--accuracy", "--output-dir", tmp_path]
    done = running.here(NAME, finetuned / "spikelora", *arguments)
    assert done.returncode == 0, done.stderr + done.stdout
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert text in done.stdout and "the bundle is right" in text and "event-driven form" in text
    assert "Accuracy on all" in text
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 4
    bundle = Bundle(tmp_path / "bundle")
    assert bundle.manifest["sentences"] == 6 and bundle.manifest["weights"] == "int8"
    assert bundle.manifest["checks"].keys() == {"exported"}  # what the check and the accuracy gave lies beside it
    assert json.loads((tmp_path / "check.json").read_text()) == check_bundle(tmp_path / "bundle")
    assert (tmp_path / "check.txt").read_text(encoding="utf-8").strip() in text
    assert json.loads((tmp_path / "accuracy.json").read_text())["same"] > 90


def test_the_command_uses_what_the_export_says_is_public():
    tree = ast.parse(Path(export.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    used = {alias.name for node in imports if node.module == "export" for alias in node.names}
    assert used and used <= set(spikegpt_lora.export.__all__)
    assert [node.module for node in imports if node.module.startswith("export.")] == ["export.__main__"]  # a program


def test_a_whole_model_and_a_text_file_are_read_too(finetuned, tmp_path):
    (tmp_path / "lines.txt").write_text("a small gem .\n\nthe plot is about a dog .\n", encoding="utf-8")
    done = running.here(NAME, finetuned / "base", "--text", tmp_path / "lines.txt", "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr + done.stdout
    bundle = Bundle(tmp_path / "out" / "bundle")
    assert bundle.sentences["labels"].tolist() == [-1, -1] and "gem" in bundle.sentences["words"][0]


def test_test_sentences_of_a_task_of_ones_own_are_read(finetuned, tmp_path):
    lines = [f"{label}\tsay {number} {label} films" for number in range(60) for label in ("good", "bad")]
    (tmp_path / "own.tsv").write_text("\n".join(["label\ttext", *lines]), encoding="utf-8")
    arguments = ["--task", tmp_path / "own.tsv", "--sentences", "6", "--output-dir", tmp_path / "out"]
    done = running.here(NAME, finetuned / "spikelora", *arguments)
    assert done.returncode == 0, done.stderr + done.stdout
    bundle = Bundle(tmp_path / "out" / "bundle")
    assert "films" in bundle.sentences["words"][0] and set(bundle.sentences["labels"].tolist()) <= {0, 1}


def test_a_task_of_more_classes_than_the_model_has_is_refused(finetuned, tmp_path):
    lines = [f"{label}\tsay {number} {label} films" for number in range(60) for label in ("good", "bad", "odd")]
    (tmp_path / "own.tsv").write_text("\n".join(["label\ttext", *lines]), encoding="utf-8")
    done = running.here(NAME, finetuned / "spikelora", "--task", tmp_path / "own.tsv", "--output-dir", tmp_path / "out")
    assert done.returncode == 2 and "has 3 classes" in done.stderr and not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_said_in_one_line(finetuned, tmp_path):
    lost = tmp_path / "lost"
    lost.mkdir()
    settings = json.loads((finetuned / "spikelora" / "adapter_config.json").read_text())
    (lost / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(tmp_path / "gone")})
    )
    for folder, message in [(tmp_path / "nowhere", "holds neither a model"), (lost, "the base model that")]:
        done = running.here(NAME, folder, *SUBJ_MINI)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "bundle").mkdir()
    done = running.here(NAME, finetuned / "base", *SUBJ_MINI, "--output-dir", tmp_path)
    assert done.returncode == 2 and "give another --output-dir" in done.stderr
    (tmp_path / "lines.txt").write_bytes(b"a caf\xe9 .\n")
    done = running.here(NAME, finetuned / "base", "--text", tmp_path / "lines.txt", "--output-dir", tmp_path / "new")
    assert done.returncode == 2 and "lines.txt line 1 must be UTF-8 text" in done.stderr
    done = running.here(NAME, finetuned / "base", "--text", tmp_path / "none.txt", "--accuracy")
    assert done.returncode == 2 and "--accuracy needs labels" in done.stderr


def cut(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:100])


def rename_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({f"foo.{name}": one for name, one in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def edit(folder, name, **changes):
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


DAMAGED = {
    "weights cut": ("base", lambda f: cut(f, "model.safetensors"), "model.safetensors is damaged or cut short"),
    "weights of another model": ("base", rename_weights, "is no SpikeGPT: it has no emb.weight"),
    "a block more than there are weights of": (
        "base",
        lambda f: edit(f, "config.json", n_layer=3),
        "says n_layer 3 for 2 of the weights",
    ),
    "other sizes": ("base", lambda f: edit(f, "config.json", n_embd=8), "says n_embd 8 for 16 of the weights"),
    "config.json cut": ("base", lambda f: cut(f, "config.json"), "config.json is no whole JSON file"),
    "another architecture": ("base", lambda f: edit(f, "config.json", model_type="gpt2"), "must say model_type"),
    "no tokenizer": ("base", lambda f: (f / "tokenizer.json").write_text("{}"), "no tokenizer at"),
    "an adapter of another rank": ("spikelora", lambda f: edit(f, "adapter_config.json", r=2), "holds no adapter for"),
    "an adapter of another kind": (
        "spikelora",
        lambda f: edit(f, "adapter_config.json", peft_type="FOO"),
        "holds no ad",
    ),
    "no adapter weights": ("spikelora", lambda f: (f / "adapter_model.safetensors").unlink(), "holds no adapter for"),
    "adapter_config.json cut": ("spikelora", lambda f: cut(f, "adapter_config.json"), "is no whole JSON file"),
    "no base": ("spikelora", lambda f: edit(f, "adapter_config.json", base_model_name_or_path=7), "must name its base"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_model_is_refused_in_one_line(kind, finetuned, tmp_path):
    source, damage, words = DAMAGED[kind]
    folder = shutil.copytree(finetuned / source, tmp_path / "model")
    damage(folder)
    done = running.here(NAME, folder, *SUBJ_MINI)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and words in last, done.stderr
    assert not (folder / "export-float32").exists()


def test_a_stopped_export_goes_on_and_another_one_is_refused(finetuned, tmp_path):
    arguments = [finetuned / "spikelora", *SUBJ_MINI, "--output-dir", tmp_path]
    assert running.here(NAME, *arguments).returncode == 0
    wanted, manifest = (tmp_path / "summary.md").read_bytes(), tmp_path / "bundle" / "manifest.json"
    written = manifest.stat().st_mtime_ns
    for name in ("summary.md", "check.json"):
        (tmp_path / name).unlink()
    done = running.here(NAME, *arguments)
    assert done.returncode == 0 and "is there already; going on with its check" in done.stdout
    assert (tmp_path / "summary.md").read_bytes() == wanted and manifest.stat().st_mtime_ns == written
    for other, words in [
        (["--weights", "int8"], "other weights"),
        (["--sentences", "5"], "other sentences"),
        (["--event-driven"], "other event-driven form"),
    ]:
        done = running.here(NAME, *arguments, *other)
        assert done.returncode == 2 and words in done.stderr and "give another --output-dir" in done.stderr, words
    done = running.here(NAME, finetuned / "base", *SUBJ_MINI, "--output-dir", tmp_path)
    assert done.returncode == 2 and "holds other weights" in done.stderr


def test_two_exports_into_one_folder_are_refused(finetuned, tmp_path):
    with locked(tmp_path):
        done = running.in_a_process(NAME, finetuned / "base", *SUBJ_MINI, "--output-dir", tmp_path)
    assert done.returncode == 2 and "another run (pid" in done.stderr and not (tmp_path / "bundle").exists()


@pytest.fixture
def spiking(tmp_path):
    """A classifier whose matrices read integer spikes."""
    tokenizer = train_tokenizer(load_task("subj-mini")["train"]["text"], 300)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 2, "pad_token_id": tokenizer.pad_token_id}
    config = SpikeGPTConfig(**sizes, matrix_spikes="integer", token_shift="rows", spike_levels=7, pooling="mean")
    lively(SpikeGPTForSequenceClassification(config)).float().save_pretrained(tmp_path / "spiking")
    tokenizer.save_pretrained(tmp_path / "spiking")
    return tmp_path / "spiking"


def test_what_integer_spikes_cost_stands_in_the_summary(spiking, tmp_path):
    done = running.here(NAME, spiking, *SUBJ_MINI, "--weights", "int8", "--output-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr + done.stdout
    text = (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert "weight reads 0." in text and "| dram | 8 |" in text and "| ffn.spike_value | 128 |" in text
    assert Bundle(tmp_path / "out" / "bundle").manifest["checks"]["integers"]["different_spikes"] == 0
    done = running.here(NAME, spiking, *SUBJ_MINI, "--event-driven", "--output-dir", tmp_path / "other")
    assert done.returncode == 2 and "reads integer spikes already" in done.stderr
