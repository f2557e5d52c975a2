"""A small classifier of every kind, adapted, in float64 and training mode; and what a step of it gives."""

import torch
from helpers import GATE, SIZES, adapted, lively
from peft import LoraConfig
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForSequenceClassification, SpikeLoraConfig
from spikegpt_lora.adapters import fused
from spikegpt_lora.adapters.config import PRESETS

STOCK = {
    "llama": (
        LlamaForSequenceClassification,
        LlamaConfig(
            vocab_size=37,
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "all-linear",
    ),
    "bert": (
        BertForSequenceClassification,
        BertConfig(
            vocab_size=37,
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=3,
            num_attention_heads=2,
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
        ),
        "all-linear",
    ),
    "gpt2": (
        GPT2ForSequenceClassification,
        GPT2Config(
            vocab_size=37,
            n_embd=12,
            n_layer=3,
            n_head=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        ),
        ["c_attn", "c_fc", "c_proj"],
    ),
}
SPIKES = {"matrix_spikes": "integer", "token_shift": "rows"}
OURS = {  # the model's configuration, the adapter's kind and what it changes
    "spikegpt-lora": ({}, LoraConfig, {}),
    "spikegpt-rows": ({"token_shift": "rows"}, LoraConfig, {}),
    "spikegpt-integer": (SPIKES, LoraConfig, {}),
    "spikegpt-spikelora": ({}, SpikeLoraConfig, GATE),
    "spikegpt-binary": ({}, SpikeLoraConfig, GATE | {"spikelora_gate": "binary"}),
    "spikegpt-token": ({}, SpikeLoraConfig, GATE | {"spikelora_time": "token"}),
    "integer-spikelora": (SPIKES, SpikeLoraConfig, GATE | {"spikelora_gate": "integer"}),
}
KINDS = [*OURS, *STOCK]


def adapted_model(kind, targets=None):
    torch.manual_seed(0)
    if kind in STOCK:
        build, config, usual = STOCK[kind]
        model, adapter = build(config), LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets or usual)
    else:
        config, adapter, changes = OURS[kind]
        model = lively(SpikeGPTForSequenceClassification(SpikeGPTConfig(**SIZES, dropout=0.0, **config)))
        adapter = adapter(task_type="SEQ_CLS", r=4, target_modules=targets or PRESETS["rkv+srffn"], **changes)
        adapter = adapter if isinstance(adapter, SpikeLoraConfig) else fused(adapter)
    return adapted(model, adapter).train()


def step_of(model, batch):
    """Loss and every gradient of one training step."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def difference(a, b):
    """The largest, over loss and gradients of two steps that have the same ones; relative where these exceed 1."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) / max(1.0, float(a[name].abs().max())) for name in a)


def nothing_left(model):
    return not any("forward" in module.__dict__ for module in model.modules()) and not any(
        hooks
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )
