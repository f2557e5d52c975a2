"""Files that earlier versions wrote are still read, and mean what they meant: see files/README.md."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from running import here

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM, SpikeGPTForSequenceClassification
from spikegpt_lora.export.check import check_bundle
from spikegpt_lora.pretrain.loop import Pretraining, PretrainOptions
from spikegpt_lora.report.markdown import markdown
from spikegpt_lora.report.page import read_results, write_page
from spikegpt_lora.report.spreadsheet import write_spreadsheet

FILES = Path(__file__).parent / "files" / "0.1.0"
RECORDED = json.loads((FILES / "recorded.json").read_text(encoding="utf-8"))
BATCH = {name: torch.tensor(RECORDED[name]) for name in ("input_ids", "attention_mask")}


@pytest.fixture
def unpacked(tmp_path, request):
    shutil.unpack_archive(FILES / f"{request.param}.zip", tmp_path / request.param)
    return tmp_path / request.param


@pytest.mark.parametrize("adapter", [None, "spikelora", "spikelora-token", "lora"])
def test_a_model_and_its_adapters_give_the_recorded_logits(adapter):
    model = SpikeGPTForSequenceClassification.from_pretrained(FILES / "base")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, FILES / adapter)
    logits = model.double()(**BATCH).logits
    assert torch.allclose(logits, torch.tensor(RECORDED[adapter or "base"], dtype=torch.float64), rtol=0, atol=1e-12)


def test_pretraining_goes_on_with_the_recorded_losses(tmp_path):
    shutil.copytree(FILES / "pretraining", tmp_path / "run")
    tokens = np.random.default_rng(0).integers(0, 30, 3000).astype(np.uint16)
    model = SpikeGPTForCausalLM(SpikeGPTConfig(vocab_size=30, n_embd=8, n_layer=1, dropout=0.0))
    run = Pretraining(model, tokens, PretrainOptions(steps=20, batch_size=2, length=16, warmup=2))
    assert run.resume(tmp_path / "run") and run.step == 10
    losses = list(itertools.islice(run.train(tmp_path / "run"), 5))
    assert losses == pytest.approx(RECORDED["pretraining_losses"], abs=1e-5)


@pytest.mark.parametrize("unpacked", ["bundle"], indirect=True)
def test_a_bundle_is_still_right(unpacked):
    assert check_bundle(unpacked)["problems"] == []


@pytest.mark.parametrize("unpacked", ["comparison"], indirect=True)
def test_a_comparisons_table_is_made_from_its_results(unpacked):
    results = json.loads((unpacked / "results.json").read_text(encoding="utf-8"))
    assert "SpikeLoRA − head only" in markdown(results)


@pytest.mark.parametrize("unpacked", ["comparison"], indirect=True)
def test_a_comparisons_page_and_spreadsheet_are_made_from_its_folder(unpacked):
    results = read_results(unpacked)
    assert "SpikeLoRA − head only" in write_page(results, unpacked).read_text(encoding="utf-8")
    write_spreadsheet(results["runs"], unpacked / "results.csv")
    assert (unpacked / "results.csv").read_text(encoding="utf-8").count("\n") == 1 + 2


@pytest.mark.parametrize("unpacked", ["comparison"], indirect=True)
def test_a_finished_comparison_is_taken_up_again_and_trains_nothing(unpacked):
    before = json.loads((unpacked / "results.json").read_text(encoding="utf-8"))
    sizes = "--task subj-mini --model random --n-embd 8 --n-layer 1 --vocab-size 300 --epochs 1 --max-train-samples 32"
    done = here("subj_finetune.py", *sizes.split(), *"--methods head spikelora --rank 4 --output-dir".split(), unpacked)
    assert done.returncode == 0, done.stderr
    after = json.loads((unpacked / "results.json").read_text(encoding="utf-8"))
    assert after["runs"] == before["runs"] and after["complete"]
