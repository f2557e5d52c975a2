"""An intermediate task and a teacher: what is trained by them, what is kept of them, and what is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, BertModel

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForSequenceClassification, load_task
from spikegpt_lora.finetune.intermediate import Source, options_of_source, train_first, without_shared
from spikegpt_lora.finetune.options import FinetuneOptions
from spikegpt_lora.finetune.run import adapt, tokenize, trained
from spikegpt_lora.finetune.teacher import encoder_folder, load_answers, teach
from spikegpt_lora.finetune.trainer import ANSWERS
from spikegpt_lora.pretrain.tokenizer import train_tokenizer
from spikegpt_lora.utils.errors import DamagedFile

OPTIONS = FinetuneOptions(learning_rate=1e-2, epochs=1, batch_size=16, rank=4, keep="last")


@pytest.fixture(scope="module")
def text():
    data = load_task("subj-mini")
    return DatasetDict(train=data["train"].select(range(48)), validation=data["validation"].select(range(20)))


@pytest.fixture(scope="module")
def tokenizer(text):
    return train_tokenizer(text["train"]["text"], 300)


@pytest.fixture(scope="module")
def tokens(text, tokenizer):
    return tokenize(text, tokenizer, 64)[0]


def fresh(tokenizer, method="full"):
    torch.manual_seed(0)
    config = SpikeGPTConfig(vocab_size=len(tokenizer), n_embd=8, n_layer=1, eos_token_id=2, pad_token_id=0)
    return adapt(SpikeGPTForSequenceClassification(config), method, OPTIONS, seed=0)


def first(model, tokens, tokenizer, folder, method="full", judged=None):
    return train_first(model, method, tokens["train"], judged, tokenizer, folder, 0, OPTIONS)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", ["full", "spikelora", "head"])
def test_what_a_method_trains_is_trained_and_the_rest_stays(tokens, tokenizer, tmp_path, method):
    model = fresh(tokenizer, method)
    before, of_method = weights(model), {name for name, p in model.named_parameters() if p.requires_grad}
    first(model, tokens, tokenizer, tmp_path, method)
    moved = {name for name, p in weights(model).items() if not torch.equal(p, before[name])}
    assert moved and moved <= of_method


def test_who_calls_again_finds_what_was_trained(tokens, tokenizer, tmp_path):
    model, again = fresh(tokenizer), fresh(tokenizer)
    record = first(model, tokens, tokenizer, tmp_path, judged=tokens["validation"])
    assert first(again, tokens, tokenizer, tmp_path) == record
    assert record["sentences"] == 48 and 0 <= record["accuracy"] <= 1
    assert all(torch.equal(p, weights(again)[name]) for name, p in weights(model).items())
    assert not list(tmp_path.glob("checkpoint-*"))


def test_what_another_method_left_is_refused(tokens, tokenizer, tmp_path):
    first(fresh(tokenizer), tokens, tokenizer, tmp_path)
    with pytest.raises(DamagedFile, match="holds other weights than head trains: delete"):
        first(fresh(tokenizer, "head"), tokens, tokenizer, tmp_path, "head")


def test_sentences_that_share_eight_words_with_the_task_are_left_out(text):
    quoted = text["validation"]["text"][0]
    source = Dataset.from_dict({"text": [f"so {quoted}", "nothing of the kind is said here or there"], "label": [0, 1]})
    found = without_shared("own", source, text)
    assert (found.name, found.left_out, found.text["text"]) == ("own", 1, source["text"][1:])


def test_the_tasks_own_short_sentences_are_left_out():
    own = DatasetDict(test=Dataset.from_dict({"text": ["a small gem ."], "label": [1]}))
    source = without_shared("film", Dataset.from_dict({"text": ["a small gem .", "a gem ."], "label": [1, 1]}), own)
    assert list(source.text["text"]) == ["a gem ."] and source.left_out == 1


def test_so_many_sentences_are_drawn_and_always_the_same_ones():
    source = Source("own", Dataset.from_dict({"text": [f"sentence {n}" for n in range(50)], "label": [0, 1] * 25}), 3)
    drawn = source.drawn(20)
    assert len(set(drawn.text["text"])) == 20 and set(drawn.text["text"]) < set(source.text["text"])
    assert drawn.text["text"] == source.drawn(20).text["text"] != source.text["text"][:20] and drawn.left_out == 3
    assert sorted(source.drawn(99).text["text"]) == sorted(source.text["text"])


def test_options_of_the_first_task_are_one_pass_in_larger_batches():
    options = options_of_source(replace(OPTIONS, epochs=4, keep="best"))
    assert (options.epochs, options.batch_size, options.keep) == (1, 32, "last")


@pytest.mark.parametrize("share, T", [(0.0, 2.0), (0.25, 1.0), (0.25, 3.0), (1.0, 2.0)])
def test_the_loss_is_that_of_labels_and_of_answers_in_their_shares(tokens, tokenizer, tmp_path, share, T):
    answers = np.random.default_rng(0).dirichlet([5, 5], 48).round(3).tolist()
    data = DatasetDict(train=tokens["train"].add_column(ANSWERS, answers))
    options = replace(OPTIONS, teacher_share=share, temperature=T)
    trainer = trained(fresh(tokenizer), "full", data, tokenizer, tmp_path, 0, options)
    model = trainer.model.train()
    for module in model.modules():  # so that both calls read the same
        module.p = 0.0
    batch = trainer.data_collator([data["train"][row] for row in range(8)])
    labels, wanted = batch["labels"], batch[ANSWERS]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    softer = wanted ** (1 / T)
    taught = T**2 * F.cross_entropy(logits / T, softer / softer.sum(dim=1, keepdim=True))
    expected = (1 - share) * F.cross_entropy(logits, labels) + share * taught
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.fixture(scope="module")
def encoder(tokenizer, tmp_path_factory):
    """A tiny encoder as a package has it: in a folder inside."""
    folder = tmp_path_factory.mktemp("package") / "model"
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder.parent


def test_a_teacher_answers_to_what_it_was_trained_on_and_is_found_again(text, encoder, tmp_path, monkeypatch):
    source, folder = text["validation"].select(range(10)), tmp_path / "teacher"
    teacher = teach(str(encoder), source, text, folder, False, 2)
    assert teacher.record["sentences"] == 58 and 0 <= teacher.record["validation_accuracy"] <= 1
    answers = torch.tensor(teacher.of(text["train"]["text"]))
    assert answers.shape == (48, 2) and torch.allclose(answers.sum(dim=1), torch.ones(48), atol=1e-3)
    monkeypatch.setattr(BertForSequenceClassification, "forward", None)  # nothing is computed again
    assert teach(str(encoder), source, text, folder, False, 2).record == teacher.record
    assert teach(str(folder / "answers.npz"), None, text, tmp_path / "other", False, 2).record == teacher.record
    assert sorted(file.name for file in folder.iterdir()) == ["answers.npz", "asked.json"]
    with pytest.raises(ValueError, match="holds a teacher of other text or settings .*asked.json"):
        teach(str(encoder), None, text, folder, False, 2)


def test_a_sentence_without_an_answer_is_named(text, encoder, tmp_path):
    teacher = teach(str(encoder), None, text, tmp_path / "teacher", False, 2)
    with pytest.raises(ValueError, match="has no answer to 1 of 2 sentences, such as 'never read'"):
        teacher.of([text["train"]["text"][0], "never read"])


def test_a_teacher_is_a_folder_or_a_package(encoder, tmp_path, monkeypatch):
    assert encoder_folder(str(encoder)) == encoder / "model"
    (package := tmp_path / "some_encoder").mkdir()
    (package / "__init__.py").write_text("")
    shutil.copytree(encoder / "model", package / "model")
    monkeypatch.syspath_prepend(tmp_path)
    assert encoder_folder("some_encoder").name == "model"
    with pytest.raises(FileNotFoundError, match="found no config.json with a model.safetensors in 'nowhere'"):
        encoder_folder("nowhere")


def test_damaged_answers_are_refused(tmp_path):
    (tmp_path / "answers.npz").write_bytes(b"PK no archive")
    with pytest.raises(DamagedFile, match="holds no answers of a teacher"):
        load_answers(tmp_path / "answers.npz")
    np.savez(tmp_path / "answers.npz", keys=[1, 2], answers=[[0.5, 0.5]], record=json.dumps({}))
    with pytest.raises(DamagedFile, match="holds no answers of a teacher"):
        load_answers(tmp_path / "answers.npz")
