"""recipes/subj_finetune.py as a user runs it: the whole comparison in small, interruption, and every wrong input."""

import csv
import json
import os
import re
import shutil
import sys
from html import escape

import numpy as np
import pytest
import running
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from spikegpt_lora import (
    SpikeGPTConfig,
    SpikeGPTForCausalLM,
    SpikeTrace,
    load_task,
    save_upstream_checkpoint,
)
from spikegpt_lora.finetune.methods import METHODS
from spikegpt_lora.finetune.teacher import key_of
from spikegpt_lora.finetune.trainer import last_whole_checkpoint
from spikegpt_lora.pretrain.tokenizer import train_tokenizer
from spikegpt_lora.report.results import SCHEMA, folder_of
from spikegpt_lora.tasks.baselines import bag_of_words_baselines
from spikegpt_lora.tasks.splits import fold

NAME = "subj_finetune.py"
DEFAULT = ["full", "lora", "spikelora", "head"]
SMALL = ["--epochs", "2", "--batch-size", "16"]
FLOAT32 = ["--precision", "float32"]  # on any processor
FIRST = [("objective", "home"), ("subjective", "fine film")]  # words of an intermediate task's sentences
RANDOM = ["--model", "random", "--n-embd", "8", "--n-layer", "1", "--vocab-size", "300"]


def options(out, *arguments):
    model = [] if "--model" in arguments else RANDOM
    precision = [] if "--precision" in arguments else FLOAT32
    return ["--output-dir", str(out), *SMALL, *model, *precision, *arguments]


def recipe(out, *arguments):
    return running.here(NAME, *options(out, *arguments))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All four methods on two seeds, without data or network, in a process of its own: the built-in sample."""
    out = tmp_path_factory.mktemp("recipe") / "out"
    arguments = ["--seeds", "0", "1", "--max-train-samples", "64"]
    done = running.in_a_process(NAME, *options(out, *arguments))
    assert done.returncode == 0, done.stderr
    return out, done


def results_in(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_without_data_it_says_loudly_what_was_tried_and_names_the_sample_everywhere(finished):
    out, done = finished
    for way in ("--data-dir", "SPIKEGPT_LORA_DATA", "hub", "subj-mini", "!" * 40):
        assert way in done.stdout
    assert (out / "results.md").read_text(encoding="utf-8").startswith("# subj-mini: random")
    assert results_in(out)["task"] == "subj-mini" and results_in(out)["published"] == []


def test_the_printed_table_is_the_file_and_has_every_row(finished):
    out, done = finished
    table = (out / "results.md").read_text(encoding="utf-8")
    assert table in done.stdout
    for name in [*(METHODS[method].title for method in DEFAULT), "naive Bayes", "TF-IDF logistic regression"]:
        assert f"| {name}" in table
    assert "seeds 0, 1" in table and "paired difference" in table


def test_progress_is_one_bar_a_run_with_the_remaining_time(tmp_path):
    arguments = ["--task", "subj-mini", "--methods", "head", "full", "--max-train-samples", "32"]
    done = running.in_a_terminal(NAME, *options(tmp_path, *arguments))
    assert done.returncode == 0 and "1/2 head seed 0" in done.stdout and "2/2 full seed 0" in done.stdout
    assert "<00:0" in done.stdout  # tqdm's [elapsed<remaining]
    assert "Warning" not in done.stdout and "{'" not in done.stdout


def test_a_file_gets_a_line_when_a_run_begins_and_one_when_it_ends(finished):
    lines = finished[1].stderr.splitlines()
    assert len(lines) == 16 and lines[0] == "1/8 full seed 0: begins at step 0 of 8"
    assert re.match(r"8/8 head seed 1 \(all: 00:\d\d to go\): 8 steps, val. accuracy 0\.", lines[15])


def test_results_follow_the_documented_schema(finished):
    results = results_in(finished[0])
    assert results["schema"] == SCHEMA and results["complete"] is True
    assert [(run["method"], run["seed"]) for run in results["runs"]] == sorted((m, s) for m in DEFAULT for s in (0, 1))
    for run in results["runs"]:
        assert len(run["test_correct"]) == results["data"]["test"]
        assert run["test_accuracy"] == pytest.approx(run["test_correct"].count("1") / len(run["test_correct"]))
        assert (
            run["validation_by_epoch"][run["best_epoch"] - 1]
            == run["validation_accuracy"]
            == max(run["validation_by_epoch"])
        )
        assert (
            run["seconds"] > 0
            and len(run["loss_by_epoch"]) == run["settings"]["epochs"]
            and 0 <= run["train_accuracy"] <= 1
        )
        lines = (finished[0] / folder_of(run) / "predictions.tsv").read_text(encoding="utf-8").splitlines()[1:]
        right = [line.split("\t")[1] == line.split("\t")[2] for line in lines]
        assert right == [bit == "1" for bit in run["test_correct"]]
    row = {row["method"]: row for row in results["summary"]}
    accuracy = [run["test_accuracy"] for run in results["runs"] if run["method"] == "lora"]
    assert row["lora"]["test_accuracy"] == pytest.approx(np.mean(accuracy))
    assert row["lora"]["test_accuracy_spread"] == pytest.approx(np.std(accuracy, ddof=1))
    assert row["lora"]["sparsity"] is None and 0 < row["spikelora"]["sparsity"] < 1


def test_the_spreadsheet_and_the_page_hold_the_same_runs_and_what_made_them(finished):
    out, runs = finished[0], results_in(finished[0])["runs"]
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["test_accuracy"]) for row in rows] == [run["test_accuracy"] for run in runs]
    assert [row["made.processor"] for row in rows] == [run["made"]["processor"] for run in runs]
    page = (out / "report.html").read_text(encoding="utf-8")
    for text in (escape(runs[0]["made"]["command"]), "What is confused", "A sentence&#x27;s spikes", "Firing by depth"):
        assert text in page
    assert len(page) < 3e6


def test_a_saved_model_reads_a_sentence_of_ones_own_for_the_page(finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "out")
    command = [sys.executable, "-m", "spikegpt_lora.report", out]
    done = running.finished([*command, "--trace-text", "a <quiet> film ."], running.environment())
    assert done.returncode == 0 and done.stderr == "", done.stderr
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("Spikes over tokens") == 3 and re.search(r"Your sentence: (sub|ob)jective \(0\.\d\d\)", page)
    shutil.rmtree(out / "spikelora")
    done = running.finished([*command, "--trace-text", " "], running.environment())
    assert done.returncode == 2 and "holds neither a model" in done.stderr and "Traceback" not in done.stderr


def test_methods_of_a_seed_start_from_the_same_model(finished):
    out, _ = finished
    base = AutoModelForSequenceClassification.from_pretrained(out / "base" / "seed0").state_dict()
    head = AutoModelForSequenceClassification.from_pretrained(out / "head" / "seed0").state_dict()
    assert all(torch.equal(base[name], head[name]) == (name != "score.weight") for name in base)
    other = AutoModelForSequenceClassification.from_pretrained(out / "base" / "seed1").state_dict()
    assert not torch.equal(base["score.weight"], other["score.weight"])


@pytest.mark.parametrize("method", DEFAULT)
def test_the_saved_model_gives_the_recorded_test_accuracy(finished, method):
    out, _ = finished
    auto = AutoModelForSequenceClassification if method in ("full", "head") else AutoPeftModelForSequenceClassification
    model = auto.from_pretrained(out / method / "seed0").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "base" / "seed0")
    test = load_task("subj-mini")["test"]
    with torch.no_grad():
        predicted = [model(**tokenizer(text, return_tensors="pt")).logits.argmax().item() for text in test["text"]]
    correct = "".join(str(int(p == label)) for p, label in zip(predicted, test["label"]))
    recorded = next(r for r in results_in(out)["runs"] if (r["method"], r["seed"]) == (method, 0))["test_correct"]
    assert sum(a != b for a, b in zip(correct, recorded)) <= 1  # alone and in float32, a spike may flip


def test_every_runs_card_has_its_own_score_and_settings(finished):
    out, _ = finished
    for run in results_in(out)["runs"]:
        card = ModelCard.load(out / folder_of(run) / "README.md")
        assert card.data.eval_results[0].metric_value == round(run["test_accuracy"], 4)
        shown = json.loads(card.text.partition("```json\n")[2].partition("```")[0])
        assert shown["settings"] == run["settings"] and shown["task"] == "subj-mini"


def test_traces_of_test_sentences_are_saved_with_a_picture(finished):
    out, _ = finished
    trace = SpikeTrace.load(out / "traces" / "spikelora-seed1.npz")
    assert len(trace.lengths) == 32 and set(trace.labels) == {0, 1} and trace.values
    assert trace.note.startswith("subj-mini: spikelora-seed1")
    assert (out / "traces" / "spikelora-seed1.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_comparison_runs_nothing_again_and_takes_more_seeds(finished):
    out, _ = finished
    again = recipe(out, "--seeds", "0", "1", "2", "--methods", "head", "--max-train-samples", "64")
    assert again.returncode == 0 and "head seed 2" in again.stderr and "seed 0:" not in again.stderr
    assert sum(run["method"] == "head" for run in results_in(out)["runs"]) == 3


def test_methods_with_other_seeds_are_not_called_complete(finished):
    out, _ = finished
    assert recipe(out, "--seeds", "3", "--methods", "head", "--max-train-samples", "64").returncode == 0
    assert results_in(out)["complete"] is False
    assert "over seeds that differ" in (out / "results.md").read_text(encoding="utf-8")


def test_other_settings_do_not_mix_into_a_folder(finished):
    refused = recipe(finished[0], "--rank", "3", "--max-train-samples", "64")
    assert (
        refused.returncode == 2
        and "settings.lora.rank was 16, is 3" in refused.stderr
        and "--output-dir" in refused.stderr
    )


def test_a_failed_command_does_not_lock_the_folder(tmp_path):
    arguments = ["--task", "subj-mini", "--seeds", "0", "--methods", "head", "--max-train-samples", "32"]
    assert recipe(tmp_path, *arguments, "--vocab-size", "3").returncode == 2
    assert recipe(tmp_path, *arguments, "--model", "nowhere.pth").returncode == 2
    assert recipe(tmp_path, *arguments).returncode == 0


def test_tuning_runs_every_method_equally_often_and_reads_no_test_sentence(tmp_path):
    arguments = ["--task", "subj-mini", "--methods", "head", "lora", "--max-train-samples", "32", "--tune", "2"]
    done = recipe(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    trials = {path: json.loads(path.read_text()) for path in tmp_path.glob("trials/*/seed0-trial*/trial.json")}
    assert sorted(trial["method"] for trial in trials.values()) == ["head", "head", "lora", "lora"]
    assert not any("test" in key for trial in trials.values() for key in trial)
    drawn = {(t["method"], t["settings"]["epochs"], t["settings"]["dropout"]) for t in trials.values()}
    assert len(drawn) == 4 and len({row[1:] for row in drawn}) == 2
    table = (tmp_path / "trials.md").read_text(encoding="utf-8")
    assert table in done.stdout and table.count("\n") == 6
    assert recipe(tmp_path, *arguments).stderr == ""  # nothing is run again


def test_tuning_by_folds_judges_each_sentence_of_train_and_validation_once(tmp_path):
    arguments = ["--task", "subj-mini", "--methods", "head", "--epochs", "1", "--tune", "1", "--folds", "3"]
    done = recipe(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "trials" / "head" / "seed0-trial0" / "trial.json").read_text())
    assert len(record["accuracy_by_fold"]) == 3
    assert record["validation_accuracy"] == pytest.approx(np.mean(record["accuracy_by_fold"]))
    assert f"{100 * record['validation_accuracy']:.2f}" in done.stdout
    data = load_task("subj-mini")
    assert len(record["test_correct"]) == (len(data["train"]) + len(data["validation"])) // 3
    assert not list(tmp_path.rglob("training*"))


def test_the_authors_library_settings_split_by_seed_and_keep_the_last_epoch(tmp_path):
    arguments = ["--task", "subj-mini", "--methods", "spikelora", "scratch", "--seeds", "0", "1"]
    done = recipe(tmp_path, *arguments, "--parity", "library")
    assert done.returncode == 0, done.stderr
    runs = results_in(tmp_path)["runs"]
    assert {run["best_epoch"] for run in runs} == {2}  # --epochs 2 stands on the command line
    assert {len(run["test_correct"]) for run in runs} == {60} and {run["validation_accuracy"] for run in runs} == {None}
    assert {run["settings"]["v_threshold"] for run in runs if run["method"] == "spikelora"} == {0.25}
    config = json.loads((tmp_path / "base" / "seed0" / "config.json").read_text())
    assert config["pooling"] == "last"
    assert "540 train / 60 test" in done.stdout


def test_folds_test_each_sentence_once_and_pair_them_all(tmp_path):
    arguments = ["--task", "subj-mini", "--methods", "head", "lora", "--folds", "3", "--epochs", "1"]
    done = recipe(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    results = results_in(tmp_path)
    assert [run["seed"] for run in results["runs"] if run["method"] == "head"] == [0, 1, 2]
    assert sum(len(run["test_correct"]) for run in results["runs"]) == 2 * 600
    (pair,) = results["comparisons"]
    accuracy = {row["method"]: row["test_accuracy"] for row in results["summary"]}
    assert len(pair["per_seed"]) == 3 and pair["difference"] == pytest.approx(accuracy["lora"] - accuracy["head"])
    assert "The last epoch counts" in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_bags_of_words_of_folds_are_the_mean_of_each_folds_own(tmp_path):
    arguments = ["--task", "subj-mini", "--methods", "head", "--folds", "3", "--epochs", "1"]
    assert recipe(tmp_path, *arguments).returncode == 0
    data, row = load_task("subj-mini", pooled=True), results_in(tmp_path)["baselines"][0]
    each = [bag_of_words_baselines(fold(data, number, 3, list(data)))[0]["accuracy_test"] for number in range(3)]
    assert row["accuracy_test"] == pytest.approx(np.mean(each)) and row["accuracy_validation"] is None
    assert row["accuracy_test_spread"] == pytest.approx(np.std(each, ddof=1))


def test_every_method_is_trained_on_the_intermediate_task_first_and_the_table_says_so(tmp_path):
    rows = [f"{label}\tit is number {n} , a {word} .\n" for n in range(30) for label, word in FIRST]
    (tmp_path / "own.tsv").write_text("".join(rows), encoding="utf-8")
    arguments = ["--task", "subj-mini", "--max-train-samples", "32", "--intermediate", tmp_path / "own.tsv"]
    done = recipe(tmp_path / "out", *arguments)
    assert done.returncode == 0, done.stderr
    results = results_in(tmp_path / "out")
    assert {run["intermediate"]["sentences"] for run in results["runs"]} == {60} and len(results["runs"]) == 4
    assert results["first"]["intermediate"] == {"task": "own", "sentences": 60, "left_out": 0}
    assert "trained on the intermediate task own first** (60 sentences" in done.stdout
    assert "| naive Bayes, bigrams, own too |" in done.stdout
    assert not list((tmp_path / "out").rglob("training"))


def test_the_answers_of_a_teacher_are_learned_from_and_the_table_says_so(tmp_path):
    sentences = load_task("subj-mini")["train"]["text"][:32]
    keys, answers = [key_of(text) for text in sentences], np.full((32, 2), 0.5)
    record = {"name": "nobody", "sentences": 32, "validation_accuracy": 0.5, "seconds": 1.0}
    np.savez(tmp_path / "answers.npz", keys=np.array(keys, np.uint64), answers=answers, record=json.dumps(record))
    arguments = ["--task", "subj-mini", "--methods", "full", "--max-train-samples", "32"]
    done = recipe(tmp_path / "taught", *arguments, "--teacher", tmp_path / "answers.npz")
    assert done.returncode == 0, done.stderr
    assert "answers of a teacher**, nobody" in done.stdout
    assert recipe(tmp_path / "alone", *arguments).returncode == 0
    weights = [out / "full" / "seed0" / "model.safetensors" for out in (tmp_path / "taught", tmp_path / "alone")]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    done = recipe(tmp_path / "other", *arguments[:-1], "64", "--teacher", tmp_path / "answers.npz")
    assert done.returncode == 2 and "the teacher nobody has no answer to 32 of 64 sentences" in done.stderr


def test_one_setting_of_one_method_is_changed_alone(tmp_path):
    arguments = ["--task", "subj-mini", "--methods", "head", "lora", "--max-train-samples", "32"]
    assert recipe(tmp_path, *arguments, "--dropout", "0.3", "lora=0.4").returncode == 0
    assert {run["method"]: run["settings"]["dropout"] for run in results_in(tmp_path)["runs"]} == {
        "head": 0.3,
        "lora": 0.4,
    }


def test_a_saved_adapter_finds_its_base_from_any_working_directory(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = AutoPeftModelForSequenceClassification.from_pretrained(finished[0] / "spikelora" / "seed0")
    base = AutoModelForSequenceClassification.from_pretrained(finished[0] / "base" / "seed0")
    model.unload()
    assert torch.equal(model.base_model.model.spikegpt.emb.weight, base.spikegpt.emb.weight)


def test_two_processes_share_one_run(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"]
    arguments = ["--seeds", "0", "--methods", "spikelora", "--max-train-samples", "64"]
    command = [*launch, running.RECIPES / NAME, *options(tmp_path, *arguments)]
    done = running.finished(command, running.environment(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    (run,) = results_in(tmp_path)["runs"]
    assert len(run["test_correct"]) == results_in(tmp_path)["data"]["test"] and run["adapters"]["sparsity"] > 0
    assert done.stdout.count("# subj-mini: random") == 1


def test_shards_that_are_merged_are_the_single_run(finished, tmp_path):
    arguments = ["--task", "subj-mini", "--seeds", "0", "1", "--max-train-samples", "64"]
    for part in (1, 2):
        assert recipe(tmp_path / f"{part}", *arguments, "--shard", f"{part}/2").returncode == 0
        assert len(results_in(tmp_path / f"{part}")["runs"]) == 4
    parts = [str(tmp_path / "1"), str(tmp_path / "2")]
    done = recipe(tmp_path / "all", *arguments, "--merge", *parts)
    assert done.returncode == 0 and "4 runs taken" in done.stdout and "begins at step" not in done.stderr
    merged, single = results_in(tmp_path / "all"), {folder_of(run): run for run in results_in(finished[0])["runs"]}
    assert len(merged["runs"]) == 8 and len(merged["comparisons"]) == 6 and merged["complete"] is True
    assert all(without_time(run) == without_time(single[folder_of(run)]) for run in merged["runs"])
    shutil.rmtree(tmp_path / "1"), shutil.rmtree(tmp_path / "2")
    adapted = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "all" / "lora" / "seed1")
    assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path / "all" / "base" / "seed1")
    again = recipe(tmp_path / "all", *arguments, "--merge", tmp_path / "1")
    assert again.returncode == 2 and "holds no finished run" in again.stderr


def test_two_jobs_leave_the_runs_of_one(finished, tmp_path):
    arguments = ["--max-train-samples", "64", "--methods", "full", "spikelora", "--jobs", "2"]
    done = running.in_a_process(NAME, *options(tmp_path, *arguments))
    assert done.returncode == 0, done.stderr
    alone = {folder_of(run): run for run in results_in(finished[0])["runs"]}
    together = results_in(tmp_path)
    assert together["complete"] is True and len(together["runs"]) == 2
    for run in together["runs"]:  # on fewer threads sums are rounded otherwise
        assert run["loss_by_epoch"] == pytest.approx(alone[folder_of(run)]["loss_by_epoch"], abs=1e-5)
        assert run["test_correct"] == alone[folder_of(run)]["test_correct"]


def test_jobs_that_are_stopped_save_their_step(tmp_path):
    """Ctrl-C for the first process alone, which hands it on."""
    arguments = ["--max-train-samples", "256", "--methods", "full", "spikelora", "--epochs", "99", "--jobs", "2"]
    folders = [tmp_path / method / "seed0" / "training" for method in ("full", "spikelora")]

    def both_train():
        return all(any(folder.glob("checkpoint-*")) for folder in folders)

    stopped = running.interrupted(NAME, *options(tmp_path, *arguments), once=both_train)
    assert stopped.returncode == 130 and "the same command goes on from here" in stopped.stderr
    assert "Traceback" not in stopped.stderr and all(map(last_whole_checkpoint, folders))


def without_time(run):
    """The record of a run without what differs from one call to the next."""
    return {key: value for key, value in run.items() if key not in ("seconds", "made")}


def test_runs_of_other_settings_or_other_results_are_not_merged(finished, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(finished[0], other)
    arguments = ["--task", "subj-mini", "--seeds", "0", "1", "--max-train-samples", "64"]
    done = recipe(tmp_path / "out", *arguments, "--rank", "3", "--merge", other)
    assert done.returncode == 2 and "holds results of other settings (settings." in done.stderr
    record = json.loads((other / "lora/seed0/run.json").read_text())
    flipped = record["test_correct"].translate(str.maketrans("01", "10"))
    (other / "lora/seed0/run.json").write_text(json.dumps(record | {"test_correct": flipped}))
    mine = tmp_path / "mine"
    shutil.copytree(finished[0], mine)
    done = recipe(mine, *arguments, "--merge", other)
    assert done.returncode == 2 and "hold different runs of lora/seed0" in done.stderr


def test_the_same_command_gives_the_same_numbers(finished, tmp_path):
    assert recipe(tmp_path, "--seeds", "1", "--methods", "spikelora", "--max-train-samples", "64").returncode == 0
    (again,) = results_in(tmp_path)["runs"]
    before = next(r for r in results_in(finished[0])["runs"] if (r["method"], r["seed"]) == ("spikelora", 1))
    assert again["validation_by_epoch"] == before["validation_by_epoch"]
    assert again["test_correct"] == before["test_correct"]


def test_a_folder_goes_on_in_its_own_precision_on_any_processor(tmp_path, cpu):
    arguments = ["--task", "subj-mini", "--methods", "head", "--max-train-samples", "32", "--seeds", "0"]
    cpu("amx_bf16")
    assert "precision: bfloat16 (" in recipe(tmp_path, *arguments, "--precision", "auto").stdout
    cpu("avx2")
    done = recipe(tmp_path, *arguments, "1", "--precision", "auto")
    assert done.returncode == 0 and "precision: bfloat16 (as the folder was begun; " in done.stdout
    results = results_in(tmp_path)
    assert results["precision"] == "bfloat16" and [run["settings"]["bf16"] for run in results["runs"]] == [True, True]
    assert "Trained and tested in bfloat16." in (tmp_path / "results.md").read_text(encoding="utf-8")
    refused = recipe(tmp_path, *arguments, "--precision", "float32")
    assert refused.returncode == 2 and "settings.head.bf16 was True, is False" in refused.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dropout", "0.3", "lora=0.4", "--max-length", "20", "--pooling", "mean", "--matrix-spikes", "integer"],
        ["--folds", "2"],
        ["--parity", "library"],
        ["--protocol", "authors"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_comparison_is_repeated_from_its_options(tmp_path, arguments):
    sizes = [] if arguments[0] in ("--parity", "--protocol") else ["--max-train-samples", "32"]
    quick = ["--task", "subj-mini", "--methods", "head", "--epochs", "1", *sizes]
    done = recipe(tmp_path / "first", *quick, *arguments)
    assert done.returncode == 0, done.stderr
    config = tmp_path / "first" / "options.json"
    done = running.here(NAME, "--config", config, "--methods", "head", "--output-dir", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "options.json").read_bytes() == config.read_bytes()
    before, now = (results_in(tmp_path / name)["runs"] for name in ("first", "again"))
    assert [run["test_correct"] for run in now] == [run["test_correct"] for run in before]


def test_a_task_of_ones_own_is_named_again(tmp_path):
    rows = [f"{word} number {n},{word}" for n in range(40) for word in ("home", "film")]
    (tmp_path / "own.csv").write_text("\n".join(["text,label", *rows]), encoding="utf-8")
    own = ["--task", tmp_path / "own.csv", "--methods", "head"]
    done = recipe(tmp_path / "first", *own)
    assert done.returncode == 0, done.stderr
    config = tmp_path / "first" / "options.json"
    assert running.here(NAME, "--config", config, *own, "--output-dir", tmp_path / "again").returncode == 0
    assert (tmp_path / "again" / "options.json").read_bytes() == config.read_bytes()
    other = running.here(NAME, "--config", config, "--task", "subj-mini", "--output-dir", tmp_path / "other")
    assert other.returncode == 2 and "(task was 'own', is 'subj-mini'; text_sha256 was" in other.stderr


@pytest.mark.parametrize(
    "change, arguments, message",
    [
        ({}, ["--rank", "3", "--max-length", "9"], "leave out --max-length, --rank, or --config"),
        ({"text_sha256": "0"}, [], "is of other runs than these would be (text_sha256 was '0', is "),
        ({"max_length": "long"}, [], "argument --max-length: invalid positive value: 'long'"),
        ({"settings": {"full": {"speed": 1}}}, [], "options.json must hold settings of each method as this version"),
        ({"settings": {}}, [], "options.json must hold settings of every method, has none of full"),
        ({"task": None}, ["--config", "nowhere.json"], "there is no file nowhere.json"),
    ],
)
def test_options_that_cannot_be_repeated_are_one_clear_error(finished, tmp_path, change, arguments, message):
    content = json.loads((finished[0] / "options.json").read_text(encoding="utf-8"))
    (tmp_path / "options.json").write_text(json.dumps(content | change), encoding="utf-8")
    done = running.here(NAME, "--config", tmp_path / "options.json", "--output-dir", tmp_path / "out", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_learning_curves_stay_beside_the_results(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = ["--task", "subj-mini", "--methods", "head", "full", "--max-train-samples", "32"]
    done = recipe(tmp_path, *arguments, "--report-to", "tensorboard")
    assert done.returncode == 0, done.stderr
    for run in results_in(tmp_path)["runs"]:
        curves = events.EventAccumulator(str(tmp_path / "curves" / f"{run['method']}-seed0")).Reload()
        drawn = [event.value for event in curves.Scalars("eval/accuracy")]
        assert drawn == pytest.approx(run["validation_by_epoch"])


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(tmp_path):
    arguments = ["--seeds", "0", "--methods", "head", "full", "--max-train-samples", "64", "--epochs", "12"]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    training = stopped / "full" / "seed0" / "training"
    done = running.interrupted(
        NAME, *options(stopped, *arguments), once=lambda: list(training.glob("checkpoint-*/trainer_state.json"))
    )
    assert done.returncode == 130 and "the same command goes on" in done.stderr and "Traceback" not in done.stderr
    assert [run["method"] for run in results_in(stopped)["runs"]] == ["head"]
    assert "(incomplete" in (stopped / "results.md").read_text(encoding="utf-8")
    assert recipe(stopped, *arguments).returncode == recipe(whole, *arguments).returncode == 0
    resumed, straight = (next(r for r in results_in(out)["runs"] if r["method"] == "full") for out in (stopped, whole))
    assert resumed["validation_by_epoch"] == straight["validation_by_epoch"]
    assert resumed["test_correct"] == straight["test_correct"]


def test_a_half_written_checkpoint_is_ignored(tmp_path, caplog):
    broken = tmp_path / "head" / "seed0" / "training" / "checkpoint-4"
    broken.mkdir(parents=True)
    (broken / "trainer_state.json").write_text('{"epoch"')
    done = recipe(tmp_path, "--seeds", "0", "--methods", "head", "--max-train-samples", "32")
    assert done.returncode == 0 and "not a whole checkpoint" in caplog.text


def test_what_diverges_is_no_result_and_takes_another_rate(tmp_path):
    arguments = ["--task", "subj-mini", "--methods", "head", "full", "--max-train-samples", "64"]
    done = recipe(tmp_path, *arguments, "--learning-rate", "full=1e38")
    assert done.returncode == 2 and "full with seed 0 diverged" in done.stderr
    assert [run["method"] for run in results_in(tmp_path)["runs"]] == ["head"]
    assert results_in(tmp_path)["complete"] is False and list((tmp_path / "full" / "seed0").iterdir()) == []
    refused = recipe(tmp_path, *arguments, "--learning-rate", "head=1e-2", "full=1e-3")
    assert refused.returncode == 2 and "settings.head.learning_rate was 0.003, is 0.01" in refused.stderr
    before = (tmp_path / "head" / "seed0" / "run.json").read_bytes()
    assert recipe(tmp_path, *arguments, "--learning-rate", "full=1e-3").returncode == 0
    assert results_in(tmp_path)["complete"] is True
    assert (tmp_path / "head" / "seed0" / "run.json").read_bytes() == before


def test_the_folder_is_readable_by_others_and_holds_nothing_half_made(finished, tmp_path):
    out, mask = finished[0], os.umask(0)
    os.umask(mask)
    files = [file for file in out.rglob("*") if file.is_file() and not file.name.startswith(".lock")]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~mask}
    assert not [file for file in out.rglob("*") if file.name.startswith(".unfinished") or file.name == "training"]


def test_what_is_left_of_a_finished_runs_training_is_removed(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "out")
    (tmp_path / "out" / "head" / "seed0" / "training" / "checkpoint-8").mkdir(parents=True)
    assert recipe(tmp_path / "out", "--methods", "head", "--max-train-samples", "64").returncode == 0
    assert not (tmp_path / "out" / "head" / "seed0" / "training").exists()


def test_an_upstream_checkpoint_is_fine_tuned(finished, tmp_path):
    tokenizer = finished[0] / "tokenizer"
    vocab_size = len(AutoTokenizer.from_pretrained(tokenizer))
    torch.manual_seed(0)
    model = SpikeGPTForCausalLM(SpikeGPTConfig(vocab_size=vocab_size, n_embd=8, n_layer=1))
    save_upstream_checkpoint(model, tmp_path / "upstream.pth")
    done = recipe(
        tmp_path / "out", "--model", str(tmp_path / "upstream.pth"), "--tokenizer", str(tokenizer),
        "--methods", "spikelora", "--seeds", "0", "--max-train-samples", "32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    start = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "base" / "seed0")
    assert torch.equal(start.spikegpt.emb.weight, model.spikegpt.emb.weight)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task", "subj"], "SPIKEGPT_LORA_DATA"),
        (["--data-dir", "nowhere"], "nowhere"),
        (["--task", "subj-mini", "--model", "nowhere.pth", "--tokenizer", "nowhere"], "no tokenizer at 'nowhere'"),
        (["--learning-rate", "quick"], "--learning-rate: invalid float, or METHOD=float value: 'quick'"),
        (["--learning-rate", "lore=1e-3"], "no method lore; there are full"),
        (["--learning-rate", "nan"], "learning_rate must be > 0 and finite, got nan"),
        (["--task", "subj-mini", "--epochs", "0"], "epochs must be >= 1, got 0"),
        (["--task", "subj-mini", "--n-layer", "0"], "must be >= 1, got 0"),
        (["--model", "embedded", "--n-layer", "2"], "--n-layer is for --model random; embedded has its own"),
        (["--time", "spikelora=later"], "spikelora_time must be 'pointwise' or 'token', got 'later'"),
        (["--tune", "2", "--parity", "paper"], "give one of the two"),
        (["--folds", "1"], "--folds must be 2 or more, and not with --parity"),
        (["--task", "subj-mini", "--folds", "2", "--seeds", "2"], "each seed is the number of one, 0 ... 1, got 2"),
        (["--teacher", "a", "--folds", "3"], "--teacher reads the training sentences of the fixed split"),
        (["--tune", "2", "--intermediate", "film"], "--tune searches for settings without --intermediate"),
        (["--task", "subj-mini", "--intermediate", "nowhere.tsv"], "must be film or a file of label, tab and sentence"),
        (["--task", "subj-mini", "--teacher", "nowhere"], "found no config.json with a model.safetensors in 'nowhere'"),
        (["--parity", "library", "--pooling", "mean"], "--parity library fixes --pooling"),
        (["--report-to", "paper"], "--report-to must name what is installed ("),
    ],
)
def test_wrong_input_is_one_clear_error(tmp_path, arguments, message):
    done = recipe(tmp_path / "out", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_broken_checkpoint_is_one_clear_error(tmp_path, finished):
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 not really")
    done = recipe(
        tmp_path / "out",
        "--task",
        "subj-mini",
        "--model",
        str(tmp_path / "broken.pth"),
        "--tokenizer",
        str(finished[0] / "tokenizer"),
    )
    assert done.returncode == 2 and "broken.pth" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("wrong", ["adapter", "tokenizer"])
def test_models_that_do_not_fit_are_refused(finished, tmp_path, wrong):
    model = finished[0] / ("lora/seed0" if wrong == "adapter" else "full/seed0")
    tokenizer = finished[0] / "tokenizer"
    if wrong == "tokenizer":
        tokenizer = tmp_path / "larger"
        train_tokenizer(load_task("subj-mini")["train"]["text"], 3000).save_pretrained(tokenizer)
    done = recipe(tmp_path / "out", "--model", str(model), "--tokenizer", str(tokenizer), "--task", "subj-mini")
    message = "an adapter is none" if wrong == "adapter" else "do not belong together"
    assert done.returncode == 2 and message in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


def test_help_lists_what_it_leaves_behind():
    done = recipe("unused", "--help")
    assert done.returncode == 0 and "results.json" in done.stdout and "(default: embedded)" in done.stdout
