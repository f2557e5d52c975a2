"""The cached trunk: loss and gradients from counted spikes are those from the text."""

import pytest
import torch
from datasets import Dataset
from efficient_models import adapted_model, difference, nothing_left, step_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from spikegpt_lora.finetune.efficient import CachedTrunk, CountsCollator, cached_trunk
from spikegpt_lora.forward import run

ABOVE = {k: rf".*blocks\.[{k}-2]\.(att|ffn)\.(receptance|key|value)" for k in (1, 2)}
KINDS = ["spikegpt-lora", "spikegpt-rows", "spikegpt-integer", "integer-spikelora", "spikegpt-token"]


def tokenizer(side="right"):
    words = {"<pad>": 0} | {f"w{i}": i for i in range(1, 37)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), pad_token="<pad>", padding_side=side
    )


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(1, 37, (length,), generator=generator).tolist() for length in (5, 9, 1, 7)]
    return Dataset.from_dict({"input_ids": ids, "labels": [0, 1, 1, 0]})


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradients_are_those_from_the_text(name, blocks, side, texts):
    model = adapted_model(name, ABOVE[blocks])
    cached = cached_trunk(model, texts, blocks)
    batch = CountsCollator(tokenizer(side))([cached[i] for i in range(4)])
    text = {key: x for key, x in batch.items() if key != "inputs_embeds"}
    trunk = CachedTrunk(blocks)
    trunk.begin(model)
    with trunk:
        assert difference(step_of(model, batch), step_of(model, text)) < 1e-12
    assert nothing_left(model) or name == "spikegpt-token"


def test_a_spike_is_counted_in_one_byte(texts):
    model = adapted_model("spikegpt-lora", ABOVE[2])
    cached = cached_trunk(model, texts, 2)
    assert [len(row["counts"]) for row in cached] == [12 * len(row["input_ids"]) for row in cached]
    assert {count for row in cached for count in row["counts"]} == {0, 1, 2, 3, 4}


def test_lower_blocks_are_not_run(texts, trainer_of):
    model = adapted_model("spikegpt-lora", ABOVE[2])
    cached, calls = cached_trunk(model, texts, 2), []
    inner = model.base_model.model.spikegpt
    for number, block in enumerate(inner.blocks):
        block.register_forward_hook(lambda m, args, output, number=number: calls.append(number))
    trainer = trainer_of(model, CachedTrunk(2), data=cached, remove_unused_columns=False, max_steps=2)
    trainer.data_collator = CountsCollator(tokenizer())
    trainer.train()
    assert calls == [2, 2]


def test_training_on_counts_is_training_on_the_text(texts, trainer_of):
    losses = []
    for cached in (False, True):
        torch.manual_seed(0)
        model = adapted_model("spikegpt-lora", ABOVE[1])
        data = cached_trunk(model, texts, 1)
        trainer = trainer_of(model, CachedTrunk(1), data=data, remove_unused_columns=False)
        collator = CountsCollator(tokenizer())

        def collate(rows, collator=collator, cached=cached):
            batch = collator(rows)
            return batch if cached else {key: x for key, x in batch.items() if key != "inputs_embeds"}

        trainer.data_collator = collate
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-9) and losses[0][0] != losses[0][-1]


def test_text_without_counts_is_read_as_ever(texts):
    model = adapted_model("spikegpt-lora", ABOVE[1])
    batch = {"input_ids": torch.tensor([texts[1]["input_ids"]])}
    expected, trunk = run(model, batch).logits, CachedTrunk(1)
    trunk.begin(model)
    with trunk:
        assert torch.equal(run(model, batch).logits, expected)


def test_what_is_trained_below_is_named(texts):
    model = adapted_model("spikegpt-lora")
    with pytest.raises(ValueError, match=r"blocks\.0\..*lora_A.* is trained"):
        cached_trunk(model, texts, 1)


@pytest.mark.parametrize("blocks", [0, 3])
def test_a_number_of_blocks_that_there_is_not(blocks, texts):
    with pytest.raises(ValueError, match=rf"must be in 1 \.\.\. 2, got {blocks}"):
        cached_trunk(adapted_model("spikegpt-lora", ABOVE[2]), texts, blocks)


def test_other_models_are_refused_by_name(texts):
    with pytest.raises(ValueError, match="of a SpikeGPT, got a PeftModel"):
        cached_trunk(adapted_model("llama"), texts, 1)


def test_training_data_without_counts_are_told_why(texts, trainer_of):
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        trainer_of(adapted_model("spikegpt-lora", ABOVE[1]), CachedTrunk(1), data=texts).train()
