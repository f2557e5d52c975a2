"""Cards: their heads are what the hub reads, their text is of the run they lie beside."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import spikegpt_lora
from spikegpt_lora.report.cards import language_model_card, language_model_head, model_card

ASSETS = Path(spikegpt_lora.__file__).parent / "assets"
SPIKING = {"sparsity": 0.75, "dead_ranks": 0.125, "contribution": 0.5, "modules": {}, "accuracy_without": 0.25}
STOCK = SPIKING | {"sparsity": None, "dead_ranks": None}


def record(method, adapters=None, **changes):
    return {
        "method": method, "seed": 1, "settings": {"epochs": 5, "rank": 3}, "trainable_parameters": 1234,
        "total_parameters": 5678, "best_epoch": 2, "validation_accuracy": 0.5, "test_accuracy": 0.93304,
        "adapters": adapters, **changes,
    }  # fmt: skip


def results(model="embedded", task="subj"):
    settings = {"full": {"rank": 77}, "lora": {"rank": 78}, "spikelora": {"rank": 79}}
    return {
        "task": task, "model": model, "data": {"test": 2048}, "precision": "float32", "versions": {"torch": "2"},
        "options": {"pooling": "last_mean", "settings": settings},
    }  # fmt: skip


def test_what_the_hub_reads_of_an_adapter():
    data = ModelCard(model_card(results(), record("spikelora", SPIKING))).data
    assert (data.language, data.license, data.library_name) == ("en", "bsd-2-clause", "peft")
    assert (data.pipeline_tag, data.datasets) == ("text-classification", ["SetFit/subj"])
    assert data.tags == ["spikegpt", "spiking", "spikelora"] and data.model_name == "spikegpt-subj-spikelora-seed1"
    (found,) = data.eval_results
    assert (found.task_type, found.dataset_type, found.metric_type) == (
        "text-classification",
        "SetFit/subj",
        "accuracy",
    )
    assert found.metric_value == 0.933 and "2,048 sentences" in found.dataset_name


@pytest.mark.parametrize("model", ["ridger/SpikeGPT-216M", "embedded", "tests/report", "runs/model.pth", "random"])
def test_a_base_model_is_named_by_its_id_on_the_hub_alone(model, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    base = model if model.startswith("ridger") else None
    assert ModelCard(model_card(results(model), record("full"))).data.base_model == base
    assert ModelCard(language_model_head(model)).data.base_model == base


def test_a_task_that_is_not_on_the_hub_names_no_data_there():
    data = ModelCard(model_card(results(task="subj-mini"), record("full"))).data
    assert data.datasets is None and data.eval_results[0].dataset_type == "subj-mini"
    assert data.library_name == "transformers"


def test_only_the_settings_of_its_own_method_are_shown():
    card = model_card(results(), record("lora", STOCK))
    shown = json.loads(card.partition("```json\n")[2].partition("```")[0])
    assert shown == {"pooling": "last_mean", "settings": {"epochs": 5, "rank": 3}}


def test_it_says_what_it_is_and_what_it_scored():
    card = model_card(results(), record("spikelora", SPIKING))
    for text in ("# SpikeGPT on subj: SpikeLoRA, seed 1", "93.30 % on 2,048", "sparsity: 0.7500", "1,234 of 5,678",
                 "trained and tested in float32", "validation accuracy 50.00 % (epoch 2 of 5"):  # fmt: skip
        assert text in card
    assert "epoch 2 of 5: nothing was picked" in model_card(results(), record("full", validation_accuracy=None))


def test_it_says_how_it_is_loaded():
    whole, stock, spiking = (
        model_card(results(), one) for one in (record("full"), record("lora", STOCK), record("spikelora", SPIKING))
    )
    assert "AutoModelForSequenceClassification" in whole and "trust_remote_code=True" in whole
    assert "AutoPeftModel" not in whole and "load_adapted" not in whole
    assert "AutoPeftModel" in stock and "`trust_remote_code=True` will do" in stock and "load_adapted" in stock
    assert "AutoPeftModel" in spiking and "SPIKELORA only after `import spikegpt_lora`" in spiking


@pytest.mark.parametrize("folder", sorted(ASSETS.glob("spikegpt-*")), ids=lambda folder: folder.name)
def test_the_cards_of_the_package_have_the_head_that_recipes_write(folder):
    head = language_model_head(datasets=["stanfordnlp/imdb"])
    assert (folder / "README.md").read_text(encoding="utf-8").startswith(f"{head}\n\n# ")


def test_a_language_model_names_what_it_read_and_shows_how_it_writes():
    made = json.loads((ASSETS / "spikegpt-film" / "stage3.json").read_text(encoding="utf-8"))
    card = ModelCard(language_model_card(made | {"started_from": "some/model", "datasets": ["some/text"]}))
    assert (card.data.base_model, card.data.datasets) == ("some/model", ["some/text"])
    assert 'pipeline("text-generation", model="FOLDER", trust_remote_code=True)' in card.text
