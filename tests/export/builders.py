"""Small models, sentences and bundles for the tests of the export, and what spoils a bundle."""

import json

import numpy as np
import torch
from helpers import fresh_classifier, padded_batch
from peft import LoraConfig, get_peft_model

from spikegpt_lora import SpikeLoraConfig
from spikegpt_lora.adapters import SpikeGate
from spikegpt_lora.export.manifest import write_manifest
from spikegpt_lora.neurons.multilevel import IntegerSpikes
from spikegpt_lora.neurons.residual import IntegerNorm

ADAPTERS = {
    "none": None,
    "lora": LoraConfig(task_type="SEQ_CLS", r=4),
    "graded": SpikeLoraConfig(task_type="SEQ_CLS", r=4),
    "binary": SpikeLoraConfig(task_type="SEQ_CLS", r=4, spikelora_gate="binary", target_modules="all-linear"),
    "token": SpikeLoraConfig(task_type="SEQ_CLS", r=4, spikelora_time="token", spikelora_tau=3.0),
    "learned": SpikeLoraConfig(
        task_type="SEQ_CLS", r=4, spikelora_time="token", spikelora_learn="both", spikelora_per_rank=True,
        spikelora_v_reset=None,
    ),
}  # fmt: skip


# of models whose matrices read integer spikes: the residual stream itself, or neurons behind the token shift
DESIGNS = {"M": {"token_shift": "rows"}, "H": {"token_shift": "channels"}}


def model_with(adapter, **config):
    model = fresh_classifier(pad_token_id=0, **config)
    if ADAPTERS[adapter] is not None:
        model = get_peft_model(model, ADAPTERS[adapter])
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    return model.float().double().eval()  # rounded to float32 once, as a bundle's weights are


def sentences():
    """Four sentences: their ids, their lengths, and both as a batch."""
    batch = padded_batch([11, 1, 7, 4])
    return batch["input_ids"], batch["attention_mask"].sum(1), batch


def batch_of():
    return sentences()[-1] | {"labels": torch.tensor([0, 1, 1, 0])}


def small(adapter="graded", **config):
    model = model_with(adapter, **config).float()
    for module in model.modules():
        if isinstance(module, SpikeGate) and module.tau == 3.0:
            module.tau = 4.0  # a power of two, for the simulators
    return model


def spiking(design, adapter="none", **config):
    """float32; centres, gains and scales that are none of the initial ones."""
    config = {"matrix_spikes": "integer", "spike_levels": 7, "pad_token_id": 0, **DESIGNS[design], **config}
    model, generator = fresh_classifier(**config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, IntegerNorm):
                module.centre.copy_(torch.randint(0, 4, module.centre.shape, generator=generator))
            if isinstance(module, IntegerSpikes):
                module.log_scale.sub_(1)
    if ADAPTERS[adapter] is not None:
        model = get_peft_model(model, ADAPTERS[adapter])
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
    return model.float().eval()


def reseal(folder):
    """The hashes of what lies there now: a forger's."""
    write_manifest(folder, json.loads((folder / "manifest.json").read_text()))


def rewrite(path, **changes):
    """An .npz file with other arrays under some names."""
    with np.load(path) as file:
        arrays = dict(file)
    np.savez_compressed(path, **arrays | {name: change(arrays[name]) for name, change in changes.items()})


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def put(array, at, value):
    array[at] = value
    return array
