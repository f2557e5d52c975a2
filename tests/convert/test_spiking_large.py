"""The shape of the published 216M model, made here with random weights: it converts within a machine's memory. What it
takes is the peak of the whole process, so it runs by itself: `python -m pytest -m large`."""

import resource

import pytest
import torch

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM
from spikegpt_lora.convert.calibrate import calibrate
from spikegpt_lora.convert.spiking import prepare


@pytest.mark.large
def test_the_216m_shape_converts():
    config = SpikeGPTConfig()
    with torch.device("meta"):
        model = SpikeGPTForCausalLM(config)
    model, generator = model.to_empty(device="cpu").eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    size = sum(p.numel() for p in model.parameters())
    ids = torch.randint(config.vocab_size, (16, 256), generator=generator)
    spiking, found = calibrate(prepare(model, tokens=ids), ids), []
    spiking.head.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    spiking.spikegpt.blocks[17].ffn.value.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        logits = spiking(ids[:1, :8]).logits
    assert size > 2e8 and logits.isfinite().all() and all(torch.equal(x, x.round()) for x in found) and len(found) == 2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert peak < 2 * 4 * size + 2 * 2**30  # two models in float32, and 2 GiB
