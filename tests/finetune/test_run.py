"""Fine-tuning: what each method trains, that methods are paired, and that the best epoch is the one that is kept."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, TrainerCallback

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForSequenceClassification, load_task
from spikegpt_lora.finetune import trainer
from spikegpt_lora.finetune.methods import METHODS
from spikegpt_lora.finetune.options import FinetuneOptions
from spikegpt_lora.finetune.run import adapt, adapters_off, finetune, tokenize
from spikegpt_lora.finetune.trainer import PaddingAsText, SeededLengthSampler, SeededSampler
from spikegpt_lora.forward import run
from spikegpt_lora.observe.adapters import observe_adapters
from spikegpt_lora.observe.books import totals
from spikegpt_lora.observe.operations import count_operations
from spikegpt_lora.pretrain.tokenizer import train_tokenizer
from spikegpt_lora.utils import errors

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
    [
        ("full", {""}),
        ("head", {"score"}),
        ("lora", {"lora_", "score"}),
        ("spikelora", {"lora_", "score"}),
        ("scratch", {""}),
    ],
)
def test_each_method_trains_what_it_says(method, trained, mini):
    model = adapt(fresh(mini[1]), method, OPTIONS, seed=0)
    for name, parameter in model.named_parameters():
        expected = any(part in name for part in trained) and "original_module" not in name
        assert parameter.requires_grad == expected, name


def test_an_unknown_method_is_told_the_names(mini):
    with pytest.raises(ValueError, match=f"{', '.join(METHODS)}, got 'dora'"):
        adapt(fresh(mini[1]), "dora", OPTIONS, seed=0)


class SeenBatches:
    """Notes the tokens of every batch that the model reads while training, and how many of its steps exist."""

    def __init__(self, model):
        self.batches, self.steps = [], []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        if module.training:
            self.batches.append(kwargs["input_ids"].tolist())
            self.steps.append(kwargs["attention_mask"].sum(dim=1))


@pytest.mark.parametrize("bf16, dtype", [(False, torch.float32), (True, torch.bfloat16)])
def test_validation_and_test_are_in_the_precision_of_the_training(mini, tmp_path, bf16, dtype):
    data, tokenizer = mini
    options, seen = replace(OPTIONS, epochs=1, bf16=bf16), set()
    model = adapt(fresh(tokenizer), "full", options, seed=0)
    receptance = model.spikegpt.blocks[0].att.receptance
    receptance.register_forward_hook(lambda module, inputs, output: seen.add((module.training, output.dtype)))
    finetune(model, "full", data, tokenizer, tmp_path, 0, options)
    assert seen == {(True, dtype), (False, dtype)}


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


def test_the_plain_order_depends_on_seed_and_epoch_alone():
    sampler = SeededSampler(41, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(41)) == list(range(len(sampler))) and list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first and list(SeededSampler(41, seed=4)) != first


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


def test_a_record_holds_the_curves_and_what_the_model_gives_to_each_class(mini, tmp_path):
    data, tokenizer = mini
    model, record = finetune(adapt(fresh(tokenizer), "full", OPTIONS, 0), "full", data, tokenizer, tmp_path, 0, OPTIONS)
    assert (
        len(record["loss_by_epoch"]) == 3
        and record["loss_by_epoch"][0] > 0
        and len(record["validation_loss_by_epoch"]) == 3
    )
    ids, label = data["test"][0]["input_ids"], data["test"][0]["labels"]
    with torch.no_grad():
        given = model(torch.tensor([ids])).logits[0].softmax(dim=-1)
    assert record["test_probabilities"][0] == pytest.approx(given.tolist(), abs=1e-3)
    assert record["test_correct"][0] == str(int(given.argmax() == label))
    right = []
    with torch.no_grad():
        for row in data["train"]:
            right.append(model(torch.tensor([row["input_ids"]])).logits.argmax().item() == row["labels"])
    assert abs(np.mean(right) - record["train_accuracy"]) < 1.5 / len(right)


def test_without_a_test_split_nothing_is_tested(mini, tmp_path):
    data, tokenizer = mini
    data = DatasetDict({split: data[split] for split in ("train", "validation")})
    _, record = finetune(adapt(fresh(tokenizer), "head", OPTIONS, 0), "head", data, tokenizer, tmp_path, 0, OPTIONS)
    assert "test_accuracy" not in record and len(record["validation_by_epoch"]) == 3


@pytest.mark.parametrize("method", ["full", "spikelora"])
def test_weight_reads_are_those_of_the_blocks_on_validation_sentences(method, mini, tmp_path):
    data, tokenizer = mini
    data = DatasetDict({"train": data["train"], "validation": data["validation"].select(range(9))})
    torch.manual_seed(0)
    config = SpikeGPTConfig(vocab_size=len(tokenizer), n_embd=8, n_layer=1, matrix_spikes="integer", pad_token_id=0)
    options = replace(OPTIONS, epochs=1, gate="integer")
    model = adapt(SpikeGPTForSequenceClassification(config), method, options, 0)
    model, record = finetune(model, method, data, tokenizer, tmp_path, 0, options)
    batches = [{"input_ids": torch.tensor([ids])} for ids in data["validation"]["input_ids"]]
    counted = totals(count_operations(model, batches), blocks=True)["weight_reads_share"]
    assert record["weight_reads"] == pytest.approx(counted, rel=0.02) and 0 < counted < 1  # a spike may flip


def test_of_real_numbers_no_weight_reads_are_counted(mini, tmp_path):
    data, tokenizer = mini
    data = DatasetDict({split: data[split] for split in ("train", "validation")})
    options = replace(OPTIONS, epochs=1)
    _, record = finetune(adapt(fresh(tokenizer), "head", options, 0), "head", data, tokenizer, tmp_path, 0, options)
    assert record["weight_reads"] is None


def test_word_dropout_takes_a_share_of_the_tokens_and_never_all(mini, tmp_path):
    data, tokenizer = mini
    short = Dataset.from_dict({"input_ids": [[3 + i % 9] * (1 + i % 30) for i in range(300)], "labels": [0, 1] * 150})
    data = DatasetDict(train=short, validation=data["validation"])
    options = replace(OPTIONS, epochs=1, word_dropout=0.3)
    model = adapt(fresh(tokenizer), "head", options, 0)
    seen = SeenBatches(model)
    finetune(model, "head", data, tokenizer, tmp_path, 0, options)
    steps = torch.cat(seen.steps)
    assert steps.sum() / sum(map(len, short["input_ids"])) == pytest.approx(0.7, abs=0.03) and steps.min() >= 1


def test_the_last_epoch_is_kept_without_a_validation_split(mini, tmp_path):
    data, tokenizer = mini
    data, options = DatasetDict(train=data["train"], test=data["test"]), replace(OPTIONS, keep="last")
    _, record = finetune(adapt(fresh(tokenizer), "full", options, 0), "full", data, tokenizer, tmp_path, 0, options)
    assert record["best_epoch"] == 3 and record["validation_accuracy"] is None and record["test_accuracy"] > 0


def test_from_scratch_nothing_of_the_base_is_left_but_score(mini):
    base = fresh(mini[1])
    base.spikegpt.emb.weight.data.fill_(7.0)
    new = adapt(base, "scratch", OPTIONS, seed=0)
    assert torch.equal(new.score.weight, base.score.weight) and not (new.spikegpt.emb.weight == 7).any()


def test_the_dropout_is_the_options(mini):
    for method in METHODS:
        model = adapt(fresh(mini[1]), method, replace(OPTIONS, dropout=0.37), seed=0)
        assert {m.p for name, m in model.named_modules() if name.endswith("blocks.0.dropout")} == {0.37}


def test_with_adapters_off_only_score_is_trained(mini):
    base = fresh(mini[1]).eval()
    ids = torch.tensor([[3, 4, 5]])
    before = base.spikegpt(ids).last_hidden_state
    model = adapt(base, "spikelora", OPTIONS, 0).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    score = model.base_model.model.score.modules_to_save["default"]
    with adapters_off(model):
        assert torch.equal(model.base_model.model.spikegpt(ids).last_hidden_state, before)
        assert torch.equal(model(ids).logits, score(before[:, -1]))
    assert not torch.equal(model.base_model.model.spikegpt(ids).last_hidden_state, before)


def test_adapters_that_were_off_stay_off(mini):
    model = adapt(fresh(mini[1]), "lora", OPTIONS, 0)
    model.disable_adapter_layers()
    with adapters_off(model):
        pass
    assert all(layer.disable_adapters for layer in model.modules() if isinstance(layer, BaseTunerLayer))


def test_padding_as_text_has_no_mask_left(mini):
    batch = PaddingAsText(mini[1])([{"input_ids": [3, 4]}, {"input_ids": [3, 4, 5, 6]}])
    assert batch["input_ids"].tolist() == [[3, 4, 0, 0], [3, 4, 5, 6]] and bool(batch["attention_mask"].all())


@pytest.mark.parametrize("method, times", [("full", 1), ("lora", 2), ("spikelora", 2)])
def test_an_adapters_test_split_is_read_twice_with_and_without_it(method, times, mini, tmp_path):
    data, tokenizer = mini
    model, read = adapt(fresh(tokenizer), method, OPTIONS, 0), []
    model.register_forward_pre_hook(lambda module, _, given: read.append(given["input_ids"]), with_kwargs=True)
    finetune(model, method, data, tokenizer, tmp_path, 0, OPTIONS)
    trained, validated = OPTIONS.epochs * len(data["train"]), OPTIONS.epochs * len(data["validation"])
    remembered = len(data["train"])
    assert sum(map(len, read)) == trained + validated + remembered + times * len(data["test"])


@pytest.mark.parametrize("padding", [False, True])
def test_what_adapters_do_is_counted_over_the_test_split(padding, mini, tmp_path):
    data, tokenizer = mini
    options = replace(OPTIONS, epochs=1, read_padding=padding)
    model = adapt(fresh(tokenizer), "spikelora", options, 0)
    model, record = finetune(model, "spikelora", data, tokenizer, tmp_path, 0, options)
    collate = PaddingAsText(tokenizer) if padding else DataCollatorWithPadding(tokenizer)
    with observe_adapters(model) as seen:
        for rows in DataLoader(data["test"], 2 * options.batch_size, collate_fn=collate):
            run(model, rows)
    expected = vars(seen.activity())
    assert record["adapters"].pop("contribution") == pytest.approx(expected.pop("contribution"), rel=1e-12)
    assert record["adapters"].keys() - expected.keys() == {"accuracy_without"}
    for name, module in expected["modules"].items():
        assert record["adapters"]["modules"][name]["firing"] == module["firing"]
    assert record["adapters"]["sparsity"] == expected["sparsity"]


def test_options_out_of_range_are_listed_together():
    with pytest.raises(ValueError, match=r"learning_rate must be > 0 and finite, got 0; epochs must be >= 1, got 0"):
        FinetuneOptions(learning_rate=0, epochs=0)


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


class SignalAt(TrainerCallback):
    """Sends this process a signal where the `number`-th event of a name comes."""

    def __init__(self, event, number, sent):
        self.left = number
        setattr(self, event, lambda *args, **kwargs: self.tick(sent))

    def tick(self, sent):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), sent)


def trained_with(mini, method, directory, options, callback=None):
    data, tokenizer = mini
    with pytest.MonkeyPatch.context() as patch:
        if callback:
            patch.setattr(trainer.PairedTrainer, "__init__", with_callback(trainer.PairedTrainer.__init__, callback))
        return finetune(adapt(fresh(tokenizer), method, options, 0), method, data, tokenizer, directory, 0, options)


def with_callback(init, callback):
    def changed(self, *args, callbacks, **kwargs):
        init(self, *args, callbacks=[*callbacks, callback], **kwargs)

    return changed


STOPS = [
    ("full", "on_step_begin", 2, signal.SIGINT),
    ("full", "on_step_begin", 4, signal.SIGTERM),  # the last one of an epoch
    ("full", "on_step_begin", 7, signal.SIGTERM),
    ("spikelora", "on_step_begin", 6, signal.SIGINT),
    ("spikelora", "on_evaluate", 1, signal.SIGTERM),
    ("lora", "on_step_begin", 12, signal.SIGTERM),  # the last one of all
    ("full", "on_save", 2, signal.SIGINT),  # too late for that step
]


@pytest.mark.parametrize("method, event, number, sent", STOPS)
def test_a_stopped_run_has_saved_its_step_and_goes_on_to_the_same_numbers(method, event, number, sent, mini, tmp_path):
    options = replace(OPTIONS, word_dropout=0.1, target_sparsity=0.8 if method == "spikelora" else None)
    whole, record = trained_with(mini, method, tmp_path / "whole", options)
    with pytest.raises(errors.Stopped if sent == signal.SIGTERM else KeyboardInterrupt):
        trained_with(mini, method, tmp_path / "stopped", options, SignalAt(event, number, sent))
    saved = max(int(path.name.split("-")[1]) for path in (tmp_path / "stopped").glob("checkpoint-*"))
    assert saved == {"on_evaluate": 4, "on_save": 9}.get(event, number)
    again, resumed = trained_with(mini, method, tmp_path / "stopped", options)
    assert {**resumed, "seconds": 0} == {**record, "seconds": 0}
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_run_that_is_killed_while_it_is_tested_repeats_no_step(mini, tmp_path, monkeypatch):
    monkeypatch.setattr("spikegpt_lora.finetune.run._test", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained_with(mini, "full", tmp_path, OPTIONS)
    monkeypatch.undo()
    steps = SignalAt("on_step_begin", 1, signal.SIGTERM)
    trained_with(mini, "full", tmp_path, OPTIONS, steps)
    assert steps.left == 1


def test_a_run_goes_on_where_its_folder_was_moved(mini, tmp_path):
    _, record = trained_with(mini, "full", tmp_path / "here", OPTIONS)
    model, _ = trained_with(mini, "full", (tmp_path / "here").rename(tmp_path / "there"), OPTIONS)
    best = json.loads((tmp_path / "there" / f"checkpoint-{12}" / "trainer_state.json").read_text())["best_global_step"]
    assert best == 4 * record["best_epoch"]
    again, _ = trained_with(mini, "full", tmp_path / "anew", OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("rate, epochs", [(1e38, 3), (1e38, 1), (1e30, 3)])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_that_diverges_is_a_sentence_and_leaves_nothing(method, rate, epochs, mini, tmp_path):
    with pytest.raises(FloatingPointError, match=f"{method} with seed 0 diverged: .*learning rate below"):
        trained_with(mini, method, tmp_path / "training", replace(OPTIONS, learning_rate=rate, epochs=epochs))
    assert not (tmp_path / "training").exists()


def test_a_rank_beyond_every_matrix_is_refused(mini):
    with pytest.raises(ValueError, match="rank must be <= 32, the longest side of the model's matrices, got 33"):
        adapt(fresh(mini[1]), "lora", replace(OPTIONS, rank=33), seed=0)
