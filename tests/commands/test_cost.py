"""spikegpt_lora cost: what count_operations counts, of any checkpoint, as tables and as JSON."""

import json

import pytest
from running import command

from spikegpt_lora import count_operations, load_task
from spikegpt_lora.checkpoint import load_classifier
from spikegpt_lora.observe.books import as_json

SENTENCES = ["a small gem .", "he goes home ."]


def test_json_is_what_count_operations_counts(finetuned):
    done = command("cost", finetuned / "spikelora", *SENTENCES, "--json")
    assert done.returncode == 0, done.stderr
    model, tokenizer = load_classifier(finetuned / "spikelora")
    counted = count_operations(model, [tokenizer(SENTENCES, padding=True, return_tensors="pt")])
    assert json.loads(done.stdout) == json.loads(json.dumps(as_json(counted)))


def test_tables_show_spikes_matrices_adapters_and_energy_as_a_count(finetuned):
    done = command("cost", finetuned / "spikelora", *SENTENCES)
    assert done.returncode == 0, done.stderr
    for said in (
        "2 sentences given",
        "| adapter gates |",
        "| att.key | real numbers |",
        "Adapters: ",
        "never measured",
    ):
        assert said in done.stdout
    assert "Adapters" not in command("cost", finetuned / "base", *SENTENCES).stdout


def test_without_sentences_it_reads_the_built_in_sample(finetuned):
    done = command("cost", finetuned / "base")
    assert done.stdout.startswith(
        f"# {finetuned / 'base'}: {load_task('subj-mini')['test'].num_rows} sentences of subj-"
    )


def test_the_embedded_model_reads_integer_spikes(tmp_path):
    done = command("cost", "embedded", *SENTENCES)
    assert done.returncode == 0 and "| att.key | residual stream |" in done.stdout and "bit planes" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "no language model at 'nowhere'"),
        (["embedded", "--file", "none.txt"], "there is no file none.txt"),
    ],
)
def test_wrong_input_is_one_clear_error(arguments, message):
    done = command("cost", *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("error:") == 1 and not done.stdout
