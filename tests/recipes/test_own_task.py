"""recipes/subj_finetune.py on other tasks than Subj: five classes of one's own, CoLA, every protocol."""

import csv
import json

import numpy as np
import pytest
import running
from transformers import AutoModelForSequenceClassification

from spikegpt_lora import load_task
from spikegpt_lora.finetune.teacher import key_of
from spikegpt_lora.tasks.labelled import load_labelled

NAME = "subj_finetune.py"
CLASSES = ["anger", "fear", "joy", "sadness", "surprise"]
TINY = ["--model", "random", "--n-embd", "8", "--n-layer", "1", "--vocab-size", "100", "--precision", "float32"]
TINY += ["--epochs", "1", "--batch-size", "16"]


def recipe(out, *arguments):
    return running.here(NAME, "--output-dir", out, *TINY, *arguments)


def results_in(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def moods(tmp_path_factory):
    """A file of five classes."""
    path = tmp_path_factory.mktemp("own") / "moods.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = [{"said": f"it is {name} , number {n} .", "mood": name} for n in range(30) for name in CLASSES]
        writer = csv.DictWriter(file, ["said", "mood"])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def finished(moods, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    done = recipe(out, "--task", moods, "--methods", "full", "spikelora", "--seeds", "0", "1")
    assert done.returncode == 0, done.stderr
    return out, done


def test_five_classes_are_compared_under_their_own_name_without_figures_of_papers(finished):
    out, done = finished
    results = results_in(out)
    assert (results["task"], results["published"], results["metric"]) == ("moods", [], "accuracy")
    assert done.stdout.count("# moods: random") == 1 and "MCC" not in done.stdout
    for file in ("results.md", "report.html", "results.json"):
        text = (out / file).read_text(encoding="utf-8").lower().replace("subj_finetune.py", "")  # the command
        assert "subj" not in text
    assert len(results["runs"]) == 4 and len(results["baselines"]) == 2 and len(results["comparisons"]) == 1


def test_the_saved_models_know_the_five_classes(finished):
    model = AutoModelForSequenceClassification.from_pretrained(finished[0] / "full" / "seed0")
    assert model.config.id2label == dict(enumerate(CLASSES)) and model.score.weight.shape[0] == 5
    card = (finished[0] / "spikelora" / "seed0" / "README.md").read_text(encoding="utf-8")
    assert "# SpikeGPT on moods: SpikeLoRA, seed 0" in card and "sentences of moods alone" in card


def test_predictions_name_classes_and_give_the_likeliest_ones_probability(finished):
    file = finished[0] / "full" / "seed1" / "predictions.tsv"
    lines = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    run = next(one for one in results_in(finished[0])["runs"] if (one["method"], one["seed"]) == ("full", 1))
    assert "".join(str(int(label == answer)) for _, label, answer, _ in lines) == run["test_correct"]
    assert {label for _, label, *_ in lines} <= set(CLASSES) and min(float(line[3]) for line in lines) >= 0.2


def test_the_same_texts_with_other_labels_do_not_mix_into_the_folder(finished, moods, tmp_path):
    text = moods.read_text(encoding="utf-8")
    (tmp_path / "moods.csv").write_text(text.replace(",joy\n", ",fear\n"), encoding="utf-8")
    done = recipe(finished[0], "--task", tmp_path / "moods.csv", "--methods", "full")
    assert done.returncode == 2 and "labels_sha256 was" in done.stderr and "text_sha256" not in done.stderr


def test_five_classes_are_taught_by_another_task_and_by_answers_of_five(moods, tmp_path):
    rows = [f"{name}\ta {name} of other words {n} .\n" for n in range(4) for name in CLASSES]
    (other := tmp_path / "other.tsv").write_text("".join(rows), encoding="utf-8")
    keys = [
        key_of(text) for text in [*load_task(str(moods))["train"]["text"], *load_labelled(str(other), CLASSES)["text"]]
    ]
    record = json.dumps({"name": "nobody", "sentences": len(keys), "validation_accuracy": 0.5, "seconds": 1.0})
    np.savez(tmp_path / "five.npz", keys=np.array(keys, np.uint64), answers=np.eye(len(keys), 5) + 0.1, record=record)
    taught = ["--intermediate", other, "--teacher", tmp_path / "five.npz"]
    done = recipe(tmp_path / "out", "--task", moods, "--methods", "full", *taught)
    assert done.returncode == 0, done.stderr
    first = results_in(tmp_path / "out")["first"]
    assert first["intermediate"]["sentences"] == 20 and first["teacher"]["name"] == "nobody"


def test_film_is_no_intermediate_task_of_other_classes(moods, tmp_path):
    done = recipe(tmp_path / "film", "--task", moods, "--intermediate", "film")
    assert done.returncode == 2 and "this task's classes are anger, fear, joy, sadness, surprise" in done.stderr


def test_cola_has_a_column_of_its_own_metric(tmp_path):
    lines = [f"src\t{n % 2}\t\tit is {'fine' if n % 2 else 'not'} , number {n} .\n" for n in range(80)]
    (tmp_path / "train.tsv").write_text("".join(lines[:60]), encoding="utf-8")
    (tmp_path / "dev.tsv").write_text("".join(lines[60:]), encoding="utf-8")
    done = recipe(tmp_path / "out", "--task", "cola", "--data-dir", tmp_path, "--methods", "head", "--seeds", "0", "1")
    assert done.returncode == 0, done.stderr
    assert "/ 20 test. Test is what the data call validation" in done.stdout
    assert "Test is what the data call validation" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    results = results_in(tmp_path / "out")
    mcc = [run["test_mcc"] for run in results["runs"]]
    shown = f"{100 * np.mean(mcc):.2f} ± {100 * np.std(mcc, ddof=1):.2f}"
    assert results["metric"] == "MCC" and "| MCC x 100 |" in done.stdout and f"| {shown} |" in done.stdout


def test_cv10_is_another_word_for_ten_folds(moods, tmp_path):
    done = recipe(tmp_path, "--task", moods, "--methods", "head", "--protocol", "cv10", "--seeds", "0")
    assert done.returncode == 0, done.stderr
    (run,) = results_in(tmp_path)["runs"]
    assert len(run["test_correct"]) == 15 and "1/1 head" in done.stderr
    again = recipe(tmp_path, "--task", moods, "--methods", "head", "--folds", "10", "--seeds", "0")
    assert again.returncode == 0 and again.stderr == ""  # it is the same comparison


def test_the_authors_protocol_splits_by_seed_with_the_methods_own_settings(moods, tmp_path):
    done = recipe(tmp_path, "--task", moods, "--methods", "head", "--protocol", "authors", "--seeds", "0", "1")
    assert done.returncode == 0, done.stderr
    results = results_in(tmp_path)
    assert {len(run["test_correct"]) for run in results["runs"]} == {15} and "135 train / 15 test" in done.stdout
    assert {run["settings"]["keep"] for run in results["runs"]} == {"last"}
    assert {run["settings"]["read_padding"] for run in results["runs"]} == {False}
    refused = recipe(tmp_path, "--task", moods, "--methods", "head")
    assert refused.returncode == 2 and "by_seed was True, is None" in refused.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "nowhere.csv"], "'nowhere.csv' is none of these"),
        (["--task", "owner/name"], "owner/name is no file or folder here"),
        (["--task", "MOODS", "--label-column", "feeling"], "has the columns said, mood, and no feeling"),
        (["--task", "subj-mini", "--text-column", "said"], "those of subj-mini are known"),
        (["--task", "MOODS", "--max-train-samples", "1"], "must leave two classes or more, got 1"),
        (["--protocol", "cv10", "--folds", "5"], "not allowed with argument"),
        (["--protocol", "holdout", "--parity", "library"], "leave --protocol holdout out"),
        (["--protocol", "authors", "--tune", "2"], "--tune judges on validation"),
        (["--protocol", "authors", "--max-train-samples", "9"], "splits all sentences: no --max-train-samples"),
    ],
)
def test_wrong_input_is_one_clear_error(moods, tmp_path, arguments, message):
    done = recipe(tmp_path, *[moods if argument == "MOODS" else argument for argument in arguments])
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
