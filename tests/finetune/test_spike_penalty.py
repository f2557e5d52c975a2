"""The price of what matrices read: what is counted, and that training pays it and evaluation does not."""

import pytest
import torch
from helpers import DESIGNS, INTEGER, SIZES, lively, padded_batch
from torch import nn
from transformers import TrainingArguments

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForSequenceClassification
from spikegpt_lora.finetune.spike_penalty import seeing_reads
from spikegpt_lora.finetune.trainer import PairedTrainer
from spikegpt_lora.ops.spike_linear import SpikeLinear


def classifier(design, **config):
    return lively(SpikeGPTForSequenceClassification(SpikeGPTConfig(**SIZES, **DESIGNS[design], **config)))


def test_reads_are_sizes_of_spikes_at_real_tokens_weighted_by_rows():
    model = nn.ModuleList([SpikeLinear(2, 3), SpikeLinear(2, 1)])
    mask = torch.tensor([[True, True, False]])
    with seeing_reads(model, mask) as reads:
        model[0](torch.tensor([[[1.0, -2.0], [0.0, 1.0], [9.0, 9.0]]]))  # 4 over two tokens
        model[1](torch.tensor([[[1.0, 0.0], [0.0, 0.0], [9.0, 9.0]]]))  # 1
    assert reads.share().item() == pytest.approx((3 * 2 + 1 * 0.5) / (3 * 2 + 1 * 2))


def test_nothing_is_seen_afterwards():
    model = nn.ModuleList([SpikeLinear(2, 3)])
    with seeing_reads(model, None) as reads:
        model[0](torch.ones(1, 2))
    before = reads.share().item()
    model[0](torch.zeros(5, 2))
    assert reads.share().item() == before == 1.0


@pytest.mark.parametrize("design", INTEGER)
def test_the_price_reaches_what_fires(design):
    model = classifier(design)
    batch = padded_batch([9, 4, 6])
    with seeing_reads(model, batch["attention_mask"]) as reads:
        model(**batch)
    reads.share().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    neurons = {name for name, _ in model.named_parameters() if "log_scale" in name}
    assert neurons <= reached and "spikegpt.emb.weight" in reached and "score.weight" not in reached


def test_training_pays_and_evaluation_does_not(tmp_path):
    batch = padded_batch([9, 4, 6]) | {"labels": torch.tensor([0, 1, 0])}
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = PairedTrainer(model=classifier("integer-rows", dropout=0.0), args=arguments)
    losses = {}
    for price in (0.0, 2.0):
        for training in (True, False):
            trainer.spike_penalty = price
            trainer.model.train(training)
            losses[price, training] = trainer.compute_loss(trainer.model, dict(batch)).item()
    with seeing_reads(trainer.model, batch["attention_mask"]) as reads:
        trainer.model.train()(**batch)
    assert losses[2.0, False] == losses[0.0, False]
    assert losses[2.0, True] - losses[0.0, True] == pytest.approx(2 * reads.share().item())


def test_a_published_model_reads_no_spikes():
    with seeing_reads(classifier("published"), None) as reads:
        pass
    assert reads.share() == 0
