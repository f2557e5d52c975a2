"""Fine-tuning: what each method trains, that methods are paired, and that the best epoch is the one that is kept."""

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForSequenceClassification, load_task
from spikegpt_lora.tokenizer import train_tokenizer
from spikegpt_lora.training import METHODS, FinetuneOptions, SeededLengthSampler, adapt, finetune, tokenize

OPTIONS = FinetuneOptions(learning_rate=1e-2, epochs=3, batch_size=16, rank=4)


@pytest.fixture(scope="module")
def mini():
    data = load_task("subj-mini")
    data["train"] = data["train"].select(range(60))
    tokenizer = train_tokenizer(data["train"]["text"], 300)
    return tokenize(data, tokenizer, 64)[0], tokenizer


def fresh(tokenizer):
    torch.manual_seed(0)
    config = SpikeGPTConfig(vocab_size=len(tokenizer), n_embd=8, n_layer=1, eos_token_id=2, pad_token_id=0)
    return SpikeGPTForSequenceClassification(config)


@pytest.mark.parametrize(
    "method, trained",
    [("full", {""}), ("head", {"score"}), ("lora", {"lora_", "score"}), ("spikelora", {"lora_", "score"})],
)
def test_each_method_trains_what_it_says(method, trained, mini):
    model = adapt(fresh(mini[1]), method, OPTIONS, seed=0)
    for name, parameter in model.named_parameters():
        expected = any(part in name for part in trained) and "original_module" not in name
        assert parameter.requires_grad == expected, name


def test_an_unknown_method_is_told_the_names(mini):
    with pytest.raises(ValueError, match="full, lora, spikelora, head, got 'dora'"):
        adapt(fresh(mini[1]), "dora", OPTIONS, seed=0)


class SeenBatches:
    """Notes the tokens of every batch that the model reads while training."""

    def __init__(self, model):
        self.batches = []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        if module.training:
            self.batches.append(kwargs["input_ids"].tolist())


def batches_read(method, mini, directory, seed=0):
    data, tokenizer = mini
    model = adapt(fresh(tokenizer), method, OPTIONS, seed)
    seen = SeenBatches(model)
    finetune(model, method, data, tokenizer, directory, seed, OPTIONS)
    return seen.batches


def test_methods_of_a_seed_read_the_same_batches_in_an_order_that_changes_with_epoch_and_seed(mini, tmp_path):
    a, b = (batches_read(method, mini, tmp_path / method) for method in ("full", "spikelora"))
    assert a == b and len(a) == 3 * 4
    assert a[:4] != a[4:8]
    assert batches_read("full", mini, tmp_path / "other", seed=1)[:4] != a[:4]


def test_an_epoch_reads_every_sentence_once():
    sampler = SeededLengthSampler(4, lengths=list(np.random.default_rng(0).integers(1, 30, 41)), seed=3)
    sampler.set_epoch(2)
    first = list(sampler)
    assert sorted(first) == list(range(41)) and list(sampler) == first


@pytest.mark.parametrize("method", METHODS)
def test_the_returned_model_is_the_best_epochs(method, mini, tmp_path):
    data, tokenizer = mini
    model, record = finetune(adapt(fresh(tokenizer), method, OPTIONS, 0), method, data, tokenizer, tmp_path, 0, OPTIONS)
    right = []
    with torch.no_grad():
        for row in data["validation"]:
            right.append(model(torch.tensor([row["input_ids"]])).logits.argmax().item() == row["labels"])
    assert abs(np.mean(right) - record["validation_accuracy"]) < 1.5 / len(right)  # in float32 a spike may flip
    assert (
        record["validation_accuracy"] == max(record["validation_by_epoch"]) and len(record["validation_by_epoch"]) == 3
    )
    assert not model.training


def test_full_fine_tuning_learns_the_training_sentences(mini, tmp_path):
    data, tokenizer = mini
    same = DatasetDict({split: data["train"] for split in ("train", "validation", "test")})
    options = FinetuneOptions(learning_rate=1e-2, epochs=12, batch_size=8)
    _, record = finetune(adapt(fresh(tokenizer), "full", options, 0), "full", same, tokenizer, tmp_path, 0, options)
    assert record["test_accuracy"] > 0.9


def test_sentences_are_cut_and_counted(mini):
    data, tokenizer = load_task("subj-mini"), mini[1]
    tokens, cut = tokenize(data, tokenizer, 12)
    lengths = [len(ids) for split in data.values() for ids in tokenizer(list(split["text"]))["input_ids"]]
    assert cut == sum(n > 12 for n in lengths) > 0
    assert max(len(ids) for split in tokens.values() for ids in split["input_ids"]) == 12


def test_a_sentence_without_tokens_is_named(mini):
    data = DatasetDict(test=Dataset.from_dict({"text": ["fine .", " "], "label": [0, 1]}))
    with pytest.raises(ValueError, match="test holds a sentence without tokens: ' '"):
        tokenize(data, mini[1], 64)
