"""The report: numbers in the tables are those of the runs, and what is missing or noise is said."""

import numpy as np
import pytest

from spikegpt_lora import SpikeTrace
from spikegpt_lora.report.markdown import markdown, trials_table
from spikegpt_lora.report.plots import draw_accuracy, draw_raster
from spikegpt_lora.report.results import accuracy_and_reads, compare, of_today, summarize
from spikegpt_lora.tasks.registry import TASKS

GATE = {"sparsity": 0.75, "dead_ranks": 0.125, "contribution": 0.5, "modules": {}, "accuracy_without": 0.25}


SETTINGS = {
    "learning_rate": 1e-3,
    "epochs": 5,
    "dropout": 0.1,
    "word_dropout": 0,
    "warmup": 0.06,
    "rank": 16,
    "v_threshold": 0.1,
}


def run(method, seed, correct, adapters=None):
    accuracy = correct.count("1") / len(correct)
    return {
        "method": method, "seed": seed, "settings": SETTINGS, "trainable_parameters": 1234, "total_parameters": 5678,
        "seconds": 10.0 + seed, "best_epoch": 1, "validation_accuracy": 0.5, "validation_by_epoch": [0.5],
        "test_accuracy": accuracy, "test_correct": correct, "adapters": adapters,
    }  # fmt: skip


RUNS = [
    run("spikelora", 0, "1110", GATE),
    run("spikelora", 1, "1100", GATE),
    run("full", 0, "1111"),
    run("full", 1, "1110"),
]


BASELINE = {
    "method": "naive Bayes",
    "accuracy_test": 0.92,
    "accuracy_validation": 0.93,
    "seconds": 1.0,
    "parameters": 99,
}


def results(runs=RUNS, complete=True, published="subj"):
    return {
        "task": "subj", "model": "random", "complete": complete, "runs": runs, "published": TASKS[published].published,
        "data": {"train": 7000, "validation": 1000, "test": 4},
        "baselines": [BASELINE], "precision": "float32",
        "summary": summarize(runs), "comparisons": compare(runs),
    }  # fmt: skip


def test_the_summary_is_mean_and_sample_deviation_in_a_fixed_order():
    full, spikelora = summarize(RUNS)
    assert (full["method"], spikelora["method"]) == ("full", "spikelora")
    assert full["test_accuracy"] == pytest.approx(0.875)
    assert full["test_accuracy_spread"] == pytest.approx(np.std([1.0, 0.75], ddof=1))
    assert spikelora["seconds"] == pytest.approx(10.5) and spikelora["sparsity"] == 0.75
    assert full["sparsity"] is None


def test_a_method_of_ones_own_stands_last_under_its_title():
    mine = run("adaptive", 0, "1111") | {"title": "mine"}
    table = markdown(results([mine, *RUNS]))
    assert [row["title"] for row in summarize([mine, *RUNS])] == ["full fine-tuning", "SpikeLoRA", "mine"]
    assert "| mine | 1,234 | 100.00 |" in table and "| SpikeLoRA − mine | -25.00 |" in table


def test_seconds_are_those_of_the_intermediate_task_too():
    taught = run("full", 0, "11") | {"intermediate": {"sentences": 9, "seconds": 30.0, "accuracy": None}}
    assert summarize([taught])[0]["seconds"] == 40.0


def test_one_seed_has_no_spread():
    (row,) = summarize(RUNS[:1])
    assert row["test_accuracy_spread"] is None
    assert "| 75.00 |" in markdown(results(RUNS[:1]))


def test_comparisons_pair_the_seeds_that_both_methods_have():
    (row,) = compare(RUNS + [run("full", 2, "0000")])
    assert (row["a"], row["b"]) == ("full", "spikelora")
    assert row["difference"] == pytest.approx(0.25) and len(row["per_seed"]) == 2


def test_a_comparison_says_in_words_what_it_found():
    better, worse = "1" * 100, "0" * 20 + "1" * 80
    alike = [run(method, seed, better[seed:] + "0" * seed) for method in ("full", "lora") for seed in range(3)]
    apart = [run("head", seed, worse[seed:] + "0" * seed) for seed in range(3)]
    found = {(row["a"], row["b"]): row["words"] for row in compare(alike + apart)}
    assert found["full", "head"] == "full fine-tuning is better"
    assert found["full", "lora"] == "no measurable difference at 3 seeds; 0.0 points would have been seen"
    (row,) = compare([run("full", 0, better), run("head", 0, worse)])
    assert row["words"] == "one seed: over sentences only" and not row["found"]


def test_the_table_shows_methods_baselines_and_published_figures():
    table = markdown(results())
    assert "| SpikeLoRA | 1,234 | 62.50 ± 17.68 | 50.00 ± 0.00 | 10 | 75.00 | 12.50 | 0.500 | 25.00 |" in table
    assert "| naive Bayes | 99 | 92.00 | 93.00 |" in table
    assert "published, 216M model: SpikeLoRA* | | *91.10*" in table
    assert "full fine-tuning − SpikeLoRA | +25.00" in table


def test_weight_reads_are_a_column_where_integer_spikes_were_read():
    reads = [record | {"weight_reads": share} for record, share in zip(RUNS, (0.25, 0.75, None, None))]
    assert summarize(reads)[1]["weight_reads"] == 0.5
    table = markdown(results(reads))
    assert "| weight reads % |" in table and "| 25.00 | 50.0 |" in table and "Weight reads: share" in table
    assert "eight reads" not in markdown(results())


def test_accuracy_and_reads_pair_the_seeds_of_the_first_folder():
    spiking = [run("full", 1, "1100") | {"weight_reads": 0.5}, run("full", 2, "1111") | {"weight_reads": 0.3}]
    points = accuracy_and_reads({"float": RUNS, "k3": spiking})
    assert [(p["folder"], p["method"], p["weight_reads"]) for p in points] == [
        ("float", "full", None), ("float", "spikelora", None), ("k3", "full", 0.4)
    ]  # fmt: skip
    assert points[0]["test_difference"] is None and points[2]["seeds"] == 2
    assert points[2]["test_difference"].per_seed == [-0.25] and points[2]["validation_difference"] == 0


def test_methods_with_other_seeds_are_said():
    table = markdown(results(RUNS[1:]))
    assert "over seeds that differ: full fine-tuning 0, 1; SpikeLoRA 1." in table
    assert "over seeds 0, 1." in markdown(results())


def test_the_precision_stands_in_the_table_of_results_that_have_it():
    old = {key: value for key, value in results().items() if key != "precision"}
    assert "Trained and tested in float32." in markdown(results())
    assert "rained" not in markdown(old).split("\n\n")[1]


def test_where_no_epoch_was_picked_the_table_says_so():
    record = RUNS[0] | {"validation_accuracy": None, "validation_by_epoch": []}
    split = results([record]) | {"data": {"train": 9000, "test": 4}}
    assert "9,000 train / 4 test. The last epoch counts" in markdown(split)


def test_trials_are_listed_best_first():
    better = RUNS[2] | {"validation_accuracy": 0.75, "settings": SETTINGS | {"epochs": 8}}
    rows = trials_table([RUNS[0], RUNS[2], better]).splitlines()[2:]
    assert rows == [
        "| full fine-tuning | 0.001 | 8 | 0.1 | 0 | 0.06 | 16 | 0.1 | 1 | 75.00 | – |",
        "| full fine-tuning | 0.001 | 5 | 0.1 | 0 | 0.06 | 16 | 0.1 | 1 | 50.00 | – |",
        "| SpikeLoRA | 0.001 | 5 | 0.1 | 0 | 0.06 | 16 | 0.1 | 1 | 50.00 | 75.0 |",
    ]


def test_an_incomplete_comparison_says_so():
    assert "incomplete" in markdown(results(complete=False)).splitlines()[0]
    assert "incomplete" not in markdown(results())
    assert markdown(results(runs=[], complete=False))


def test_a_raster_has_a_panel_a_population_one_for_all_gates_and_each_word_once(figures, tmp_path):
    words, draw = np.array([["a", "long", "long", "word", ".", "padding"]]), np.random.default_rng(0)
    names = ("emb", "blocks.0.lif1", "blocks.0.att.key.lora_gate.default", "blocks.0.att.value.lora_gate.default")
    spikes = {name: draw.integers(0, 2, (1, 6, 7)).astype(np.int8) for name in names}
    trace = SpikeTrace(spikes, {}, np.array([5]), words, words, np.array([1]))
    draw_raster(trace, tmp_path / "raster.png", title="title")
    panels = figures[0].axes
    shown = [axis.images[0].get_array().data for axis in panels]
    real = {name: seen[0, :5].T for name, seen in spikes.items()}
    gates = np.concatenate([real[name] for name in names[2:]])
    assert all(map(np.array_equal, shown, [real["emb"], real["blocks.0.lif1"], gates])) and len(panels) == 3
    assert panels[0].get_title(loc="left") == f"emb: {100 * real['emb'].mean():.1f} % firing"
    assert panels[2].get_title(loc="left").startswith("adapter gates: ")
    assert [label.get_text() for label in panels[2].get_xticklabels()] == ["a", "long", "word", "."]
    assert panels[2].get_xticks().tolist() == [0, 1, 3, 4] and figures[0].get_suptitle() == "title"
    assert (tmp_path / "raster.png").read_bytes().startswith(b"\x89PNG")


def test_the_raster_shows_spikes_of_either_sign(figures, tmp_path):
    words, spikes = np.array([["a", "b"]]), np.array([[[-3, 0], [2, -1]]], dtype=np.int8)
    trace = SpikeTrace({"att.spike_key": spikes}, {}, np.array([2]), words, words, np.array([1]))
    draw_raster(trace, tmp_path / "raster.png")
    assert figures[0].axes[0].images[0].get_array().data.tolist() == [[3, 2], [0, 1]]


def test_accuracy_is_a_dot_a_run_a_line_at_the_mean_and_one_for_the_baseline(figures, tmp_path):
    draw_accuracy(results(), tmp_path / "accuracy.png")
    (axis,) = figures[0].axes
    dots, means = axis.collections[::2], axis.collections[1::2]
    order = [row["method"] for row in results()["summary"]]
    accuracy = {"spikelora": [75, 50], "full": [100, 75]}
    assert [group.get_offsets().data[:, 1].tolist() for group in dots] == [accuracy[method] for method in order]
    heights = [line.get_segments()[0][:, 1].tolist() for line in means]
    assert heights == [[np.mean(accuracy[method])] * 2 for method in order]
    assert axis.lines[0].get_ydata() == pytest.approx([92, 92]) and axis.lines[0].get_label() == "naive Bayes"
    assert [label.get_text() for label in axis.get_xticklabels()] == [row["title"] for row in summarize(RUNS)]
    assert axis.get_ylabel() == "test accuracy, %"
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_of_folds_each_sentence_counts_once():
    folds = [run("full", 0, "1110"), run("full", 1, "11"), run("lora", 0, "1010"), run("lora", 1, "01")]
    (found,) = compare(folds, disjoint=True)
    assert (found["a"], found["b"], len(found["per_seed"])) == ("full", "lora", 2)
    assert found["difference"] == pytest.approx(2 / 6)


def test_an_older_files_folds_are_compared_as_folds():
    folds = [run("full", 0, "1110"), run("full", 1, "11"), run("lora", 0, "1010"), run("lora", 1, "01")]
    old = {"a": "full", "b": "lora", "difference": 0.3, "low": 0.0, "high": 0.6, "per_seed": [0.3], "is_noise": True}
    found = of_today({"runs": folds, "comparisons": [old], "options": {"folds": 2}})
    assert found["comparisons"] == compare(folds, disjoint=True)


def test_what_methods_were_taught_before_stands_above_the_table():
    first = {"intermediate": {"task": "film", "sentences": 119227, "left_out": 3}, "teacher": None}
    page = markdown(results() | {"first": first})
    above, _, _ = page.partition("| method |")
    assert "intermediate task film first** (119,227 sentences, without 3 that share" in above
    assert "what Subj's own labels are made of" in above and "teacher" not in above
    teacher = {"name": "some_encoder", "sentences": 9, "validation_accuracy": 0.957, "seconds": 1.0}
    page = markdown(results() | {"first": {"intermediate": None, "teacher": teacher}})
    assert "some_encoder, fine-tuned on the same training sentences (validation 95.70 %)." in page
    page = markdown(results() | {"first": {"intermediate": None, "teacher": teacher | {"validation_accuracy": None}}})
    assert "some_encoder, fine-tuned on the same training sentences." in page
