"""Two processes on one run: what they train is what one process trains at the same global batch."""

import os
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, DatasetDict

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForSequenceClassification
from spikegpt_lora.finetune.options import FinetuneOptions
from spikegpt_lora.finetune.run import adapt, finetune
from spikegpt_lora.pretrain.tokenizer import train_tokenizer

OPTIONS = FinetuneOptions(learning_rate=1e-2, epochs=3, batch_size=8, rank=4, dropout=0.0)
SENTENCES = 80  # whole batches, since a last one that is not is filled up where several processes share it


def sentences():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, 200, (int(n),), generator=generator).tolist() for n in torch.arange(SENTENCES) % 9 + 3]
    return Dataset.from_dict({"input_ids": rows, "labels": [0, 1] * (SENTENCES // 2)}).map(
        lambda row: {"attention_mask": [1] * len(row["input_ids"])}
    )


def train(folder, options):
    """Record and weights of a tiny classifier with SpikeLoRA in float64."""
    tokenizer = train_tokenizer(["a film of few words"] * 9, 200)
    torch.manual_seed(0)
    config = SpikeGPTConfig(vocab_size=200, n_embd=8, n_layer=2, eos_token_id=2, pad_token_id=0)
    model = adapt(SpikeGPTForSequenceClassification(config), "spikelora", options, seed=0).double()
    data = DatasetDict(train=sentences(), validation=sentences().select(range(32)), test=sentences().select(range(16)))
    model, record = finetune(model, "spikelora", data, tokenizer, folder, 0, options)
    return record, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def one_of_two(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29519", "OMP_NUM_THREADS": "1"}
    half = replace(OPTIONS, batch_size=OPTIONS.batch_size // 2)
    found = train(folder / "training", half)
    torch.save(found, folder / f"{rank}.pt")


def test_two_processes_have_the_losses_and_weights_of_one(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    record, weights = train(tmp_path / "alone", OPTIONS)
    for rank in (0, 1):
        shared, found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for name in ("loss_by_epoch", "validation_loss_by_epoch"):
            assert shared[name] == pytest.approx(record[name], abs=1e-8)
        assert shared["test_correct"] == record["test_correct"] and found.keys() == weights.keys()
        assert all(torch.allclose(found[name], weights[name], rtol=0, atol=1e-8) for name in weights)
