"""Runs under several settings: what is put together, what stands beside LoRA, and what is drawn of it."""

import numpy as np
import pytest

from spikegpt_lora.report.plots import draw_modules, draw_sweep
from spikegpt_lora.report.results import folder_of
from spikegpt_lora.report.sweeps import by_setting, plain_of, settings_table, summarize_settings


def run(method, seed, mcc, correct="1100", sparsity=None, **settings):
    record = {"method": method, "seed": seed, **settings, "mcc": mcc, "train_mcc": mcc + 0.2, "sparsity": sparsity}
    record |= {"loss": 1 - mcc, "dead_ranks": None if sparsity is None else 0.25, "trainable": 1234}
    return record | {"step_ms": 10.0 + seed, "correct": correct, "grad_norm": {"mean": 1.0 + seed, "sd": 0.5, "max": 9}}


RUNS = [
    run("lora", 0, 0.4, rank=8),
    run("lora", 1, 0.6, rank=8),
    run("spikelora", 0, 0.5, "1110", 0.6, rank=8, v_threshold=0.1),
    run("spikelora", 1, 0.5, "1100", 0.8, rank=8, v_threshold=0.1),
    run("spikelora", 0, 0.1, "1111", 0.9, rank=8, v_threshold=1.0),
]


def test_a_folder_is_named_by_what_its_runs_differ_in():
    assert folder_of(RUNS[2]) == "spikelora-rank8-v_threshold0.1/seed0" and folder_of(RUNS[1]) == "lora-rank8/seed1"
    assert list(by_setting(RUNS)) == ["lora-rank8", "spikelora-rank8-v_threshold0.1", "spikelora-rank8-v_threshold1.0"]


def test_a_row_is_the_mean_and_spread_of_its_seeds_beside_loras_of_the_same_seeds():
    plain, low, high = summarize_settings(RUNS, "mcc")
    assert (low["mcc"], low["mcc_spread"], low["gap"], low["sparsity"]) == pytest.approx((0.5, 0.0, 0.2, 0.7))
    assert low["sparsity_spread"] == pytest.approx(np.std([0.6, 0.8], ddof=1)) and low["loss"] == pytest.approx(0.5)
    assert low["minus_lora"] == pytest.approx([0.1, -0.1])
    half = 12.706205 * np.std([0.1, -0.1], ddof=1) / 2**0.5  # t(1)
    assert low["minus_lora_seeds"] == pytest.approx((-half, half), rel=1e-6)
    assert low["accuracy_minus_lora"]["per_seed"] == [0.25, 0.0] and low["grad_norm"]["mean"] == 1.5
    assert high["minus_lora"] == pytest.approx([-0.3]) and high["minus_lora_seeds"] is None
    assert plain["minus_lora"] == [] and plain["accuracy_minus_lora"] is None and plain["sparsity"] is None


def test_lora_stands_beside_what_shares_its_settings_and_nothing_where_several_would_do():
    ranks = [run("lora", 0, 0.4, rank=8), run("lora", 0, 0.3, rank=64)]
    assert plain_of(run("spikelora", 0, 0.5, rank=64, v_threshold=0.1), ranks) == {0: ranks[1]}
    assert plain_of(run("head", 0, 0.5), ranks) == {}
    rates = [ranks[0], run("lora", 0, 0.3, rank=8, learning_rate=0.1)]
    assert plain_of(run("spikelora", 0, 0.5, rank=8), rates) == {0: rates[0]}
    assert plain_of(run("spikelora", 0, 0.5, rank=8, learning_rate=0.1), rates) == {0: rates[1]}
    assert plain_of(run("spikelora", 0, 0.5, rank=8, learning_rate=0.2), rates) == {}
    assert plain_of(run("head", 0, 0.5, learning_rate=0.1), rates) == {0: rates[1]}


def test_records_of_before_have_dashes():
    old = {"method": "lora", "rank": 8, "seed": 0, "mcc": 0.25, "train_mcc": 0.5, "sparsity": None, "dead_ranks": None}
    old |= {"step_ms": 1.0, "trainable": 3}
    rows = summarize_settings([old, run("spikelora", 0, 0.5, rank=8)], "mcc")
    assert rows[1]["minus_lora"] == [0.25] and rows[1]["accuracy_minus_lora"] is None
    line = settings_table(rows, "mcc").splitlines()[2]
    assert line == "| lora | 8 | 3 | 25.00 | | | | 25.0 | – | – | – | 1 |"


def test_the_table_has_a_column_a_setting():
    head, _, first, second, _ = settings_table(summarize_settings(RUNS, "mcc"), "mcc").splitlines()
    assert head.startswith("| method | rank | v threshold | trained | MCC x 100 | minus LoRA, by seed | over seeds |")
    assert first.startswith("| lora | 8 | – | 1,234 | 50.00 ± 14.14 | |")
    assert "| 50.00 ± 0.00 | +10.00, -10.00 |" in second and "| 20.0 ± 0.0 | 70.0 ± 14.1 |" in second
    assert second.endswith("| 1.5 ± 0.5, at most 9 | 10 |")


def test_a_sweep_is_a_line_a_method_and_a_dashed_one_of_what_is_not_swept(figures, tmp_path):
    draw_sweep(summarize_settings(RUNS, "mcc"), "v_threshold", "mcc", tmp_path / "v.png")
    loss, mcc, gap, sparsity = figures[0].axes
    assert mcc.containers[0].lines[0].get_xydata().tolist() == [[0.1, 0.5], [1.0, 0.1]]
    assert [line.get_ydata()[0] for line in mcc.lines if line.get_linestyle() == "--"] == [0.5]
    assert loss.containers[0].lines[0].get_ydata() == pytest.approx([0.5, 0.9])
    assert not [line for line in sparsity.lines if line.get_linestyle() == "--"]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["lora, rank 8", "spikelora, rank 8"]


def test_modules_are_drawn_by_block_and_kind(figures, tmp_path):
    silent = {f"bert.layer.{n}.{kind}": 0.1 * n for n in (0, 2, 10) for kind in ("query", "out.dense")}
    del silent["bert.layer.2.query"]
    draw_modules(silent | {"pooler": 1.0}, tmp_path / "m.png", "title")
    axis = figures[0].axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "2", "10"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["query", "out.dense"]
    shown = np.ma.filled(axis.images[0].get_array(), np.nan)
    assert np.allclose(shown, [[0, np.nan, 100], [0, 20, 100]], equal_nan=True)
