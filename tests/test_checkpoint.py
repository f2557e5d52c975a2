"""Upstream .pth files: read, written back, and refused with a message a person can act on."""

import pickle

import pytest
import torch
from helpers import lively
from peft import LoraConfig, get_peft_model

from spikegpt_lora import (
    SpikeGPTConfig,
    SpikeGPTForCausalLM,
    SpikeGPTForSequenceClassification,
    load_upstream_checkpoint,
    save_upstream_checkpoint,
)


def upstream_tensors(vocab_size=77, C=8, L=2, seed=0):
    """A state dict in upstream's naming, listed here from upstream's `src/model.py` and not from our model."""
    shapes = {"emb.weight": (vocab_size, C), "head.weight": (vocab_size, C)}
    for norm in ["ln_out", "blocks.0.ln0"] + [f"blocks.{i}.{name}" for i in range(L) for name in ("ln1", "ln2")]:
        shapes |= {f"{norm}.weight": (C,), f"{norm}.bias": (C,)}
    for i in range(L):
        att, ffn = f"blocks.{i}.att", f"blocks.{i}.ffn"
        shapes |= {f"{att}.time_decay": (C,), f"{att}.time_first": (C,)}
        shapes |= {f"{att}.time_mix_{name}": (1, 1, C) for name in "kvr"}
        shapes |= {f"{att}.{name}.weight": (C, C) for name in ("key", "value", "receptance", "output")}
        shapes |= {f"{ffn}.time_mix_{name}": (1, 1, C) for name in "kr"}
        shapes |= {
            f"{ffn}.key.weight": (4 * C, C),
            f"{ffn}.receptance.weight": (C, C),
            f"{ffn}.value.weight": (C, 4 * C),
        }
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def file(tmp_path):
    torch.save(upstream_tensors(), tmp_path / "model.pth")
    return tmp_path / "model.pth"


@pytest.mark.parametrize("how", ["path", "text", "state dict"])
def test_every_tensor_arrives_under_its_name(file, how):
    source = {"path": file, "text": str(file), "state dict": upstream_tensors()}[how]
    model = load_upstream_checkpoint(source)
    ours = {name.removeprefix("spikegpt."): tensor for name, tensor in model.state_dict().items()}
    expected = upstream_tensors()
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
    assert not model.training


@pytest.mark.parametrize("vocab_size, C, L", [(77, 8, 2), (50277, 4, 3)])
def test_sizes_are_read_from_the_tensors(vocab_size, C, L):
    config = load_upstream_checkpoint(upstream_tensors(vocab_size, C, L)).config
    assert (config.vocab_size, config.n_embd, config.n_layer, config.n_ffn) == (vocab_size, C, L, 4 * C)
    assert (config.eos_token_id, config.pad_token_id) == ((0, 1) if vocab_size == 50277 else (None, None))


def test_the_published_sizes_make_a_216M_model():
    with torch.device("meta"):
        model = SpikeGPTForCausalLM(SpikeGPTConfig())
    assert model.spikegpt.emb.weight.shape == (50277, 768) and len(model.spikegpt.blocks) == 18
    assert sum(p.numel() for p in model.parameters()) == 215_399_424


def test_half_precision_files_become_float32():
    model = load_upstream_checkpoint({name: t.half() for name, t in upstream_tensors().items()})
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_file_written_back_is_the_same_file(file, tmp_path):
    save_upstream_checkpoint(load_upstream_checkpoint(file), tmp_path / "again.pth")
    again, before = torch.load(tmp_path / "again.pth", weights_only=True), torch.load(file, weights_only=True)
    assert again.keys() == before.keys() and all(torch.equal(again[name], before[name]) for name in before)


def test_the_documented_line_makes_a_classifier(file):
    classifier = SpikeGPTForSequenceClassification.from_language_model(load_upstream_checkpoint(file), num_labels=2)
    assert classifier(torch.ones(2, 3).long()).logits.shape == (2, 2)


def test_all_wrong_keys_and_shapes_are_named_at_once(tmp_path):
    tensors = upstream_tensors()
    del tensors["blocks.1.att.key.weight"]
    tensors["blocks.0.ffnPre.key.weight"] = torch.ones(2)
    tensors["ln_out.bias"] = torch.ones(9)
    tensors["head.weight"][3, 3] = float("nan")
    with pytest.raises(ValueError) as error:
        load_upstream_checkpoint(tensors)
    for finding in (
        "4 problems",
        "missing blocks.1.att.key.weight (8, 8)",
        "unexpected blocks.0.ffnPre.key.weight (2,)",
        "ln_out.bias must be (8,), got (9,)",
        "head.weight holds values that are not finite",
    ):
        assert finding in str(error.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share, zipped):
    file = tmp_path / "model.pth"
    torch.save(upstream_tensors(), file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match="model.pth.*(broken download|damaged)"):
        load_upstream_checkpoint(file)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"emb.weight": torch.ones(77, 8).to_sparse()}, "emb.weight must be a dense tensor of float16.*sparse"),
        ({"ln_out.bias": torch.ones(8, dtype=torch.int8)}, "ln_out.bias must be a dense tensor.*int8"),
        ({3: torch.ones(1)}, "3 is no name"),
        ({"blocks.3000.ln1.weight": torch.ones(8)}, r"1 problems\):\n  unexpected blocks.3000.ln1.weight \(8,\)"),
    ],
)
def test_tensors_of_another_kind_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        load_upstream_checkpoint(upstream_tensors() | change)


def test_names_as_saved_under_data_parallel_load():
    tensors = {f"module.{name}": tensor for name, tensor in upstream_tensors().items()}
    assert load_upstream_checkpoint(tensors).config.n_layer == 2


class Trap:
    def __reduce__(self):
        return (open, ("trap-was-executed", "w"))


@pytest.mark.parametrize("writer", ["torch.save", "pickle"])
def test_code_in_a_file_is_refused_and_never_run(tmp_path, monkeypatch, writer):
    monkeypatch.chdir(tmp_path)
    if writer == "pickle":
        (tmp_path / "trap.pth").write_bytes(pickle.dumps({"emb.weight": Trap()}))
    else:
        torch.save({"emb.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="refused.*nothing in it was executed"):
        load_upstream_checkpoint(tmp_path / "trap.pth")
    assert not (tmp_path / "trap-was-executed").exists()


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"], ids=["empty", "web page"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match="x.pth"):
        load_upstream_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"model": {}, "step": 3}, r"dict of named tensors, got keys \['model', 'step'\]"),
        (torch.ones(3), "dict of named tensors, got a Tensor"),
        ({"weight": torch.ones(3)}, "no SpikeGPT checkpoint: it needs emb.weight"),
    ],
)
def test_a_pytorch_file_of_something_else_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        load_upstream_checkpoint(tmp_path / "x.pth")


def test_missing_paths_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint file at .*nowhere.pth"):
        load_upstream_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="is a folder"):
        load_upstream_checkpoint(tmp_path)


def test_a_hub_id_out_of_reach_says_what_to_do():
    with pytest.raises(FileNotFoundError, match="ridger/SpikeGPT-OpenWebText-216M.*download the .pth file"):
        load_upstream_checkpoint("ridger/SpikeGPT-OpenWebText-216M")


@pytest.mark.parametrize("repo, filename", [("ridger/SpikeGPT-OpenWebText-216M", "SpikeGPT-216M.pth")])
def test_a_hub_id_in_the_local_cache_loads_without_network(repo, filename, tmp_path, monkeypatch):
    snapshot = tmp_path / f"models--{repo.replace('/', '--')}"
    (snapshot / "snapshots" / "abc").mkdir(parents=True)
    (snapshot / "refs").mkdir()
    (snapshot / "refs" / "main").write_text("abc")
    torch.save(upstream_tensors(), snapshot / "snapshots" / "abc" / filename)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load_upstream_checkpoint(repo).config.vocab_size == 77


def test_what_upstream_cannot_run_is_not_written(tmp_path):
    model = lively(SpikeGPTForCausalLM(SpikeGPTConfig(vocab_size=9, n_embd=4, n_layer=1, lif_tau=4.0)))
    with pytest.raises(ValueError, match=r"lif_tau = 4.0 \(upstream: 2.0\)"):
        save_upstream_checkpoint(model, tmp_path / "x.pth")
    spiking = SpikeGPTForCausalLM(SpikeGPTConfig(vocab_size=9, n_embd=4, n_layer=1, matrix_spikes="integer"))
    with pytest.raises(ValueError, match=r"matrix_spikes = 'integer' \(upstream: 'none'\)"):
        save_upstream_checkpoint(spiking, tmp_path / "x.pth")
    with pytest.raises(TypeError, match="got SpikeGPTModel"):
        save_upstream_checkpoint(model.spikegpt, tmp_path / "x.pth")
    adapted = SpikeGPTForCausalLM(SpikeGPTConfig(vocab_size=9, n_embd=4, n_layer=1))
    get_peft_model(adapted, LoraConfig(r=2))
    with pytest.raises(ValueError, match="no spikegpt.blocks.0.att.key.base_layer.weight.*merge adapters first"):
        save_upstream_checkpoint(adapted, tmp_path / "x.pth")
    assert not list(tmp_path.iterdir())


def test_a_path_without_suffix_is_written_too(tmp_path):
    save_upstream_checkpoint(load_upstream_checkpoint(upstream_tensors()), tmp_path / "noext")
    assert load_upstream_checkpoint(tmp_path / "noext").config.n_embd == 8
