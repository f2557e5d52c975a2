"""What the tests share: small models with lively weights (upstream's initial values are mostly 0: nothing fires)."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network, and none may wait for it

import pytest
import torch

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM, SpikeGPTForSequenceClassification
from spikegpt_lora.ops.backend import ExtensionError, default_backend, load


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


SIZES = {"vocab_size": 37, "n_embd": 12, "n_layer": 3}


def lively(model, seed=0):
    """`model` in float64 and evaluation mode, every parameter moved so far that all populations fire."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.fixture(params=["reference", "extension"])
def backend(request):
    """Runs a test twice: in plain torch, and in the kernels where they can be built."""
    if request.param == "extension":
        need_extension()
    with default_backend(request.param):
        yield request.param


def need_extension(device="cpu"):
    try:
        load(device)
    except ExtensionError as error:
        pytest.skip(f"no kernels here: {error}")


@pytest.fixture
def lm():
    return lively(SpikeGPTForCausalLM(SpikeGPTConfig(**SIZES)))


@pytest.fixture
def classifier():
    return lively(SpikeGPTForSequenceClassification(SpikeGPTConfig(**SIZES, pooling="last_mean", pad_token_id=0)))


@pytest.fixture
def ids():
    return torch.randint(1, SIZES["vocab_size"], (4, 9), generator=torch.Generator().manual_seed(1))


def largest_difference(a, b):
    """The largest difference between two tensors or two tuples of tensors."""
    if isinstance(a, torch.Tensor):
        return (a - b).abs().max().item()
    return max(largest_difference(x, y) for x, y in zip(a, b, strict=True))
