"""recipes/bench.py: its table, and that it prints no time where results disagree."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from helpers import need_extension


@pytest.fixture
def bench():
    path = Path(__file__).parents[2] / "recipes" / "bench.py"
    spec = importlib.util.spec_from_file_location("bench", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(bench, monkeypatch, tmp_path):
    need_extension()
    arguments = ["bench.py", "--parts", "kernels", "--repeats", "2", "--output-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    return bench.main()


def test_it_writes_a_table_and_a_csv(bench, monkeypatch, tmp_path, capsys):
    assert run(bench, monkeypatch, tmp_path) == 0
    with open(tmp_path / "bench.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["what"] for row in rows} >= {"8 exp", "extension", "spikingjelly"}
    assert all(float(row["median_ms"]) > 0 for row in rows)
    assert (tmp_path / "bench.md").read_text().strip() == capsys.readouterr().out.strip()


def test_it_refuses_to_print_a_time_when_results_disagree(bench, monkeypatch, tmp_path, capsys):
    wkv = bench.wkv
    monkeypatch.setattr(bench, "wkv", lambda *x, backend: wkv(*x[:3], x[3] * (1.5 - (backend == "reference") / 2)))
    assert run(bench, monkeypatch, tmp_path) == 1
    captured = capsys.readouterr()
    assert "differ by" in captured.err and "ms" not in captured.out
    assert not list(tmp_path.iterdir())


def test_the_floor_makes_the_products_that_were_made(bench):
    linear, x = torch.nn.Linear(3, 4, bias=False), torch.randn(5, 3)
    with bench.Recorder() as recorder:
        linear(x).sum().backward()
    shapes = [[shape for shape, *_ in inputs] for _, inputs in recorder.calls]
    assert [(5, 3), (3, 4)] in shapes and len(shapes) == 2  # forward, and the gradient of the weight
    recorder.replay()()


def test_every_way_to_run_a_model_gives_the_same_gradients(bench):
    need_extension()
    training = bench.Training(bench.SpikeLoraConfig, bench.spikegpt, n_layer=2, n_embd=12, batch=3, tokens=9)
    training.check_gradients(bench.WAYS)
    with pytest.raises(bench.Disagreement):
        gradients = training._gradients()
        bench.agree("a step", {"one": lambda: gradients, "other": lambda: [2 * x for x in gradients]}, 1e-6)


@pytest.mark.parametrize("model", ["spikegpt", "bert"])
def test_a_training_step_of_every_gate_has_gradients_throughout_and_leaves_the_weights(bench, model):
    for gate, adapter in bench.GATES.items():
        training = bench.Training(adapter, getattr(bench, model), n_layer=1, n_embd=32, batch=4, tokens=20)
        training.backward()
        gradients = {name: p.grad for name, p in training.model.named_parameters() if p.requires_grad}
        assert [name for name, grad in gradients.items() if not (grad.isfinite().all() and grad.any())] == [], gate
        before = [p.clone() for p in training.parameters]
        training.step()
        assert all(map(torch.equal, before, training.parameters)), gate
