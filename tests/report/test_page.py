"""report.html: one file that answers in words, in any browser, from results.json alone."""

import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from running import environment, finished

from spikegpt_lora import SpikeTrace
from spikegpt_lora.report.page import page, verdict
from spikegpt_lora.report.predictions import write_predictions
from spikegpt_lora.report.results import compare, folder_of, summarize

VOID = {"meta", "br"}


def run(method, seed, wrong, **more):
    correct = "0" * wrong + "1" * (200 - wrong)
    return {
        "task": "subj", "method": method, "seed": seed, "settings": {"epochs": 2}, "trainable_parameters": 9,
        "total_parameters": 99, "seconds": 60.0, "best_epoch": 1, "validation_accuracy": 0.9,
        "validation_by_epoch": [0.8, 0.9], "test_accuracy": correct.count("1") / 200, "test_correct": correct,
        "adapters": None, **more,
    }  # fmt: skip


GATES = {"sparsity": 0.7, "dead_ranks": 0.1, "contribution": 0.5, "accuracy_without": 0.8}
GATES |= {"modules": {f"blocks.{block}.att.key": {"sparsity": 0.6 + 0.2 * block} for block in (0, 1)}}
CURVES = {"loss_by_epoch": [0.5, 0.2], "validation_loss_by_epoch": [0.4, 0.3], "train_accuracy": 0.99}


def results(seeds=3, **more):
    runs = [run("full", seed, 10 + seed, **CURVES) for seed in range(seeds)]
    gated = CURVES | {"adapters": GATES, "trainable_parameters": 3}
    runs += [run("spikelora", seed, 12 - seed, **gated) for seed in range(seeds)]
    runs += [run("head", seed, 60 + seed, trainable_parameters=1) for seed in range(seeds)]
    bag = {"method": "naive Bayes", "accuracy_test": 0.9, "accuracy_validation": 0.9, "seconds": 1.0, "parameters": 5}
    return {
        "task": "subj", "model": "<mine>", "complete": True, "runs": runs, "summary": summarize(runs),
        "comparisons": compare(runs), "baselines": [bag], "published": [], "data": {"train": 700, "test": 200},
        "options": {"seed": 0}, "versions": {"torch": "2"}, "precision": "float32",
    } | more  # fmt: skip


class Checked(HTMLParser):
    """Fails on a tag that closes another one; keeps the text and every address."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.addresses = [], [], []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in VOID | {"th", "td", "tr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())


def command(folder):
    return finished([sys.executable, "-m", "spikegpt_lora.report", folder], environment())


def read(html):
    parser = Checked()
    parser.feed(html)
    assert not parser.open
    return parser


def test_the_answer_says_which_is_best_what_is_not_told_apart_and_what_it_costs():
    said = " ".join(verdict(results()))
    assert "full fine-tuning has the highest test accuracy, 94.50 ± 0.50 % (3 seeds)." in said
    assert "It is better than head only (frozen model)." in said
    assert "It is not told apart from SpikeLoRA (+0.00 points, no measurable difference at 3 seeds;" in said
    assert "Of these SpikeLoRA (in 60 seconds) trains the fewest parameters, 3." in said
    assert "A bag of words reaches 90.00 % (naive Bayes)." in said


def of_runs(runs):
    return results(runs=runs, summary=summarize(runs), comparisons=compare(runs))


def test_a_method_that_is_better_than_all_others_is_not_said_to_train_the_fewest_parameters():
    runs = [run(method, seed, wrong + seed) for method, wrong in (("full", 10), ("head", 60)) for seed in range(3)]
    said = " ".join(verdict(of_runs(runs)))
    assert "It trains 9 parameters in 60 seconds." in said and "fewest" not in said


def test_the_highest_mean_is_not_called_better_than_what_is_ahead_on_the_seeds_of_both():
    runs = [run("full", seed, wrong) for seed, wrong in enumerate([25, 27, 26])]
    runs += [run("lora", seed, wrong) for seed, wrong in enumerate([40, 41, 42, 0, 0, 0])]
    said = " ".join(verdict(of_runs(runs)))
    assert "LoRA has the highest test accuracy" in said and "better than" not in said
    assert "On the seeds that both have, full fine-tuning is better." in said


def test_of_one_seed_nothing_is_called_better():
    said = " ".join(verdict(results(seeds=1)))
    assert "With one seed no difference can be called found" in said and "better than" not in said


def test_the_page_is_one_well_formed_file_that_asks_no_network():
    found = read(page(results()))
    assert all(address.startswith(("#", "data:image/png")) for address in found.addresses)
    assert not re.search(r"url\((?!#)", page(results())) and "@import" not in page(results())
    for heading in ("Methods", "Paired differences", "Accuracy against what it costs", "Learning curves", "Settings"):
        assert heading in found.text
    assert "Sparsity by module" in found.text and "80" in found.text  # block 1


def test_what_methods_were_taught_before_stands_above_the_answer():
    task = {"task": "film", "sentences": 9, "left_out": 1}
    found = read(page(results(first={"intermediate": task, "teacher": None}))).text
    before = found.index("Every method was trained on the intermediate task film first")
    assert before < next(n for n, text in enumerate(found) if "has the highest test accuracy" in text)


def test_names_are_text_not_html():
    assert "subj: <mine>" in read(page(results())).text


def test_an_older_results_json_is_read_too():
    old = results(comparisons=[{"a": "full", "b": "head", "difference": 0.1, "low": 0, "high": 1, "is_noise": False}])
    for record in old["runs"]:
        for key in CURVES:
            record.pop(key, None)
    found = read(page(old))
    assert "Learning curves" in found.text and "full fine-tuning is better" in found.text
    published = old | {"runs": [], "comparisons": []}
    assert "Paired differences" not in read(page(published)).text


@pytest.fixture
def folder(tmp_path):
    """Predictions of one sentence that all get wrong and one that none does, and traces, of every run."""
    shares = [[0.875, 0.125], [0.75, 0.25]]
    for run in results()["runs"]:
        (tmp_path / folder_of(run)).mkdir(parents=True)
        file = tmp_path / folder_of(run) / "predictions.tsv"
        write_predictions(file, ["*<script>*", "plain"], [1, 0], shares, ["objective", "subjective"])
    words, spikes = np.array([["a", "<film>"]] * 2), np.array([[[1, 0], [1, 0]], [[0, 0], [1, 0]]], dtype=np.int8)
    names = ["emb", "blocks.0.lif1", "blocks.0.att.key.lora_gate.default"]
    (tmp_path / "traces").mkdir()
    trace = SpikeTrace(dict.fromkeys(names, spikes), {}, np.array([2, 2]), words, words, np.array([1, 0]))
    trace.save(tmp_path / "traces" / "spikelora-seed1.npz")
    return tmp_path


def test_what_is_confused_is_counted_over_seeds_and_its_sentences_are_text_not_html(folder):
    html = page(results(), folder)
    found = read(html).text
    at = found.index("What is confused")
    assert [text for text in found[at : at + 14] if text][3:11] == [
        "class", "taken for objective", "taken for subjective", "objective", "3", "0", "subjective", "3"
    ]  # fmt: skip
    assert "The 1 sentences that full fine-tuning is most confidently wrong about" in " ".join(found)
    row = found[found.index("*<script>*") :]
    assert row[:6] == ["*<script>*", "subjective", "objective", "0.875", "3 of 3", "6 of 6"]
    assert "<script" not in html


def test_a_raster_names_tokens_gates_and_the_dead_in_a_picture_of_the_page(folder):
    html = page(results(), folder)
    found = read(html)
    assert {"Test sentence 1, subjective", "Test sentence 2, objective"} <= set(found.text)
    assert "block 0 att.key gate, 1 dead" not in found.text  # it stands after lif1, in the same block
    assert {"emb, 1 dead", "block 0 lif1, 1 dead", "att.key gate, 1 dead", "<film>"} <= set(found.text)
    pictures = [address for address in found.addresses if address.startswith("data:image/png")]
    assert len(pictures) == 2 * 3 + 1 and len(html) < 3e6  # and the gates' map
    assert not re.search(r"url\((?!#)", html) and all(
        one.startswith(("#", "data:image/png")) for one in found.addresses
    )
    assert "SpikeLoRA, seed 1." in " ".join(found.text)


def test_firing_by_depth_is_a_chart_a_kind_of_neuron(folder):
    found = read(page(results(), folder)).text
    at = found.index("Firing by depth")
    assert {"after SRWKV", "adapters' gates"} <= set(found[at:]) and "after SRFFN" not in found


def test_a_folder_without_predictions_and_traces_lacks_their_sections(tmp_path):
    assert page(results(), tmp_path) == page(results())
    assert not {"What is confused", "A sentence's spikes", "Firing by depth"} & set(read(page(results())).text)


def test_the_settings_say_where_by_what_and_of_what_the_runs_were_made():
    made = {"processor": "Some <CPU>", "threads": 2, "system": "Linux", "python": "3.11", "commit": "abc"}
    made |= {"command": "python a.py --model '<mine>'"}
    runs = results()["runs"]
    runs = [runs[0] | {"made": made}, runs[1] | {"made": made | {"threads": 4, "commit": None}}, *runs[2:]]
    found = read(page(results(runs=runs, options={"text_sha256": "0123"}))).text
    facts = dict(zip(found[found.index("processor") :: 2], found[found.index("processor") + 1 :: 2]))
    assert facts["processor"] == "Some <CPU>" and facts["threads"] == "2; 4" and facts["commit"] == "abc"
    assert facts["sha256 of the sentences"] == "0123" and "python a.py --model '<mine>'" in found


def test_the_command_writes_it_beside_the_results(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(results()), encoding="utf-8")
    done = command(tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page(results())
    assert len((tmp_path / "results.csv").read_text(encoding="utf-8").splitlines()) == 1 + len(results()["runs"])


def test_a_sentence_of_ones_own_needs_traces_and_says_so(tmp_path):
    with pytest.raises(ValueError, match="must hold the traces of a run for --trace-text"):
        page(results(), tmp_path, "a film")


@pytest.mark.parametrize("text, message", [(None, "must hold the results.json"), ("{}", "results.json")])
def test_a_folder_without_results_is_one_sentence(tmp_path, text, message):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    done = command(tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
