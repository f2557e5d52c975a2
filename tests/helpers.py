"""What the tests share: small models with lively weights (upstream's initial values are mostly 0: nothing fires)."""

import pytest
import torch
from peft import get_peft_model

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForSequenceClassification, SpikeLoraConfig
from spikegpt_lora.ops.backend import ExtensionError, load

SIZES = {"vocab_size": 37, "n_embd": 12, "n_layer": 3}
DESIGNS = {  # of what the matrices read
    "published": {},
    "rows": {"token_shift": "rows"},
    "integer-rows": {"matrix_spikes": "integer", "token_shift": "rows"},
    "integer-channels": {"matrix_spikes": "integer", "spike_levels": 7},
    "integer-powers": {"matrix_spikes": "integer", "token_shift": "rows", "wkv_powers_of_two": True},
}
INTEGER = [name for name in DESIGNS if name.startswith("integer")]
GATE = {"spikelora_v_threshold": 0.3, "spikelora_tau": 3.0, "spikelora_surrogate_alpha": 1.5}


def lively(model, seed=0):
    """`model` in float64 and evaluation mode, every parameter moved so far that all populations fire."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def fresh_classifier(**config):
    """A lively classifier, the same on every call."""
    torch.manual_seed(0)
    return lively(SpikeGPTForSequenceClassification(SpikeGPTConfig(**SIZES, **config)))


def adapted(model, config, drawn="lora_B", seed=0, dtype=torch.float64):
    """`model` in evaluation mode with an adapter that has been trained, so to speak: B is not 0.

    Weights with `drawn` in their names come from a standard normal distribution, the others are as peft starts them.
    """
    torch.manual_seed(seed)
    model = get_peft_model(model, config).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if drawn in name:
                parameter.normal_(generator=generator)
    return model


def trained_classifier(config=None):
    """A fresh classifier with a trained adapter: SpikeLoRA with the settings of GATE unless `config` says another."""
    return adapted(fresh_classifier(), config or SpikeLoraConfig(task_type="SEQ_CLS", r=4, **GATE), "lora_")


def padded_batch(lengths, left=False, seed=0):
    """Sentences of these lengths, padded to the longest; the padding's ids are random too: nothing may read them."""
    ids = torch.randint(
        1, SIZES["vocab_size"], (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed)
    )
    places = torch.arange(max(lengths)).flip(0) if left else torch.arange(max(lengths))
    return {"input_ids": ids, "attention_mask": (places < torch.tensor(lengths)[:, None]).long()}


def need_extension(device="cpu"):
    try:
        load(device)
    except ExtensionError as error:
        pytest.skip(f"no kernels here: {error}")


def largest_difference(a, b):
    """The largest difference between two tensors or two tuples of tensors."""
    if isinstance(a, torch.Tensor):
        return (a - b).abs().max().item()
    return max(largest_difference(x, y) for x, y in zip(a, b, strict=True))


NEURONS = [
    {},
    {"tau": 3.0, "v_threshold": 0.7, "detach_reset": True},
    {"v_reset": None},
    {"v_reset": -0.2, "decay_input": False, "surrogate_alpha": 4.0},
]


def current(*shape, dtype=torch.float64, scale=2.0):
    return scale * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def wkv_inputs(B=2, T=7, C=3, dtype=torch.float64, k_scale=1.0):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, dtype=dtype, generator=generator)

    return draw(C), draw(C), k_scale * draw(B, T, C), draw(B, T, C)


def everything(folder):
    """Of every file and folder its mode, its time of change and its bytes."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return [(p, p.stat().st_mode, p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in paths]
