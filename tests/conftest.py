"""Fixtures that the tests share; what is no fixture stands in helpers.py."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network, and none may wait for it
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads of two runs side by side sleep while they wait

import signal

import pytest
import torch
from helpers import DESIGNS, SIZES, lively, need_extension
from matplotlib.figure import Figure
from peft import get_peft_model

from spikegpt_lora import (
    SpikeGPTConfig,
    SpikeGPTForCausalLM,
    SpikeGPTForSequenceClassification,
    SpikeLoraConfig,
    load_task,
)
from spikegpt_lora.ops.backend import default_backend
from spikegpt_lora.pretrain.tokenizer import train_tokenizer
from spikegpt_lora.utils import precision

# A script's background job ignores Ctrl-C, and so does all that it starts: tests that press it would wait forever.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=["reference", "extension"])
def backend(request):
    """Runs a test twice: in plain torch, and in the kernels where they can be built."""
    if request.param == "extension":
        need_extension()
    with default_backend(request.param):
        yield request.param


@pytest.fixture
def cpu(monkeypatch):
    """Called with what /proc/cpuinfo calls flags: makes the processor one that has those."""
    return lambda *flags: monkeypatch.setattr(precision, "cpu_flags", lambda: set(flags))


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved while a test runs."""
    saved, save = [], Figure.savefig

    def remember(figure, *args, **kwargs):
        saved.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return saved


@pytest.fixture
def design():
    """A file whose tests hold of every design has a fixture of this name with `DESIGNS` as its params."""
    return "published"


@pytest.fixture
def lm(design):
    return lively(SpikeGPTForCausalLM(SpikeGPTConfig(**SIZES, **DESIGNS[design])))


@pytest.fixture
def classifier(design):
    config = SpikeGPTConfig(**SIZES, **DESIGNS[design], pooling="last_mean", pad_token_id=0)
    return lively(SpikeGPTForSequenceClassification(config))


@pytest.fixture
def ids():
    return torch.randint(1, SIZES["vocab_size"], (4, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """The folder of a fine-tuning run: base/ and spikelora/."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer(load_task("subj-mini")["train"]["text"], 300)
    sizes = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 2}
    config = SpikeGPTConfig(**sizes, pooling="last_mean", pad_token_id=tokenizer.pad_token_id, num_labels=2)
    SpikeGPTForSequenceClassification(config).save_pretrained(folder / "base")
    model = SpikeGPTForSequenceClassification.from_pretrained(folder / "base")
    get_peft_model(model, SpikeLoraConfig(task_type="SEQ_CLS", r=4)).save_pretrained(folder / "spikelora")
    for part in ("base", "spikelora"):
        tokenizer.save_pretrained(folder / part)
    return folder
