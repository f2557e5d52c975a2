"""recipes/bench.py: its table, what it times, and that it prints no time where results disagree."""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from helpers import need_extension
from torch.profiler import ProfilerActivity, profile

from spikegpt_lora.ops.backend import use_extension
from spikegpt_lora.utils import command_line

TINY = {"n_layer": 2, "n_embd": 12, "batch": 3, "tokens": 9}


@pytest.fixture
def bench():
    path = Path(__file__).parents[2] / "recipes" / "bench.py"
    spec = importlib.util.spec_from_file_location("bench", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(bench, monkeypatch, tmp_path):
    """Runs the program, of whose parts there is only the first, to its exit status."""
    need_extension()
    monkeypatch.setattr(bench, "PARTS", {"kernels": bench.kernels})

    def run(*options):
        arguments = ["bench.py", "--repeats", "2", "--output-dir", str(tmp_path / "out"), *options]
        monkeypatch.setattr(sys, "argv", arguments)
        return command_line.run(bench.main)

    return run


# ---- what it leaves


def test_it_writes_a_table_and_a_json(run, tmp_path, capsys):
    assert run() == 0
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert found["kind"] and found["processor"] and found["threads"] == torch.get_num_threads()
    assert found["versions"]["peft"] == peft.__version__
    assert {row["what"] for row in found["rows"]} >= {"8 exp", "kernel", "spikingjelly"}
    assert all(row["part"] == "kernels" and row["median_ms"] > 0 for row in found["rows"])
    assert (tmp_path / "out" / "bench.md").read_text().strip() == capsys.readouterr().out.strip()


def test_a_recorded_run_takes_the_place_of_the_one_of_its_kind(run, bench, tmp_path):
    others = [{"kind": kind, "rows": []} for kind in ("another", bench.processor(bench.CPU).name)]
    path = tmp_path / "runs.json"
    path.write_text(json.dumps({"source": "here", "runs": others}))
    assert run("--record", str(path)) == 0
    assert json.loads(path.read_text()) == {
        "source": "here",
        "runs": [json.loads((tmp_path / "out" / "bench.json").read_text()), others[0]],
    }


def test_a_run_of_some_parts_is_not_recorded(run, bench, tmp_path, capsys):
    bench.PARTS["more"] = None
    assert run("--parts", "kernels", "--record", str(tmp_path / "runs.json")) == 2
    assert "this one has no more: leave --parts or --record out" in capsys.readouterr().err


def test_it_refuses_to_print_a_time_when_results_disagree(run, bench, monkeypatch, tmp_path, capsys):
    wkv = bench.wkv
    monkeypatch.setattr(bench, "wkv", lambda *x, backend: wkv(*x[:3], x[3] * (1.5 - (backend == "reference") / 2)))
    assert run() == 1
    captured = capsys.readouterr()
    assert "differ by" in captured.err and "ms" not in captured.out
    assert not list(tmp_path.iterdir())


def test_a_part_that_there_is_not_is_refused_with_those_that_there_are(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--parts", "kernel")
    assert "invalid choice: 'kernel' (choose from" in capsys.readouterr().err


def test_ctrl_c_ends_it_and_leaves_nothing(run, bench, tmp_path, capsys):
    def stopped(repeats):
        raise KeyboardInterrupt

    bench.PARTS["kernels"] = stopped
    assert run() == 130
    assert capsys.readouterr().err.strip() == "stopped" and not list(tmp_path.iterdir())


# ---- what it times


@pytest.mark.parametrize("part", ["encoder", "large_step", "gates", "efficient", "streaming", "spikes", "rwkv"])
def test_a_part_gives_groups_whose_first_row_has_ratio_1(bench, monkeypatch, part):
    need_extension()
    sizes = {"SMALL": TINY, "LARGE": TINY, "MINILM": TINY | {"n_embd": 32}, "VOCABULARY": 50}
    for name, size in sizes.items():
        monkeypatch.setattr(bench, name, size)
    first = {}
    for row in bench.PARTS[part](1):
        assert row["median_ms"] > 0
        first.setdefault(row["group"], row["ratio"])
    assert set(first.values()) == {1.0}


@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_is_timed_where_the_processor_has_it(bench, monkeypatch, native):
    need_extension()
    monkeypatch.setattr(bench, "bf16_pays", lambda: native)
    monkeypatch.setattr(bench, "SMALL", TINY)
    monkeypatch.setattr(bench, "VOCABULARY", 50)
    of_steps = [row["what"] for row in bench.training_steps("tiny", bench.spikegpt, TINY, bench.LOOPS, 1)]
    of_pretraining = [row["what"] for row in bench.pretrain(1)]
    rows = ["matrix products", *bench.ADAPTERS]
    in_bf16 = [f"{row}, bfloat16" for row in rows] if native else []
    assert of_steps == [*rows, *(f"LoRA, {way}" for way in bench.LOOPS), *in_bf16]
    rows = ["matrix products", "pre-training"]
    assert of_pretraining == [*rows, *(f"{row}, bfloat16" for row in rows if native)]


def test_lora_steps_with_other_gradients_are_not_timed(bench, monkeypatch):
    _, other, *_ = bench.ADAPTERS
    monkeypatch.setitem(bench.ADAPTERS, other, partial(bench.ADAPTERS[other], use_rslora=True))
    with pytest.raises(bench.Disagreement, match=f"gradients of LoRA: .* '{other}' differ"):
        bench.training_steps("tiny", bench.spikegpt, TINY, {}, 1)


def test_spikelora_steps_whose_kernels_have_other_gradients_are_not_timed(bench, monkeypatch):
    need_extension()
    right = bench.Training.gradients

    def wrong_by_kernels(self):
        return [(1 + use_extension("auto", torch.device("cpu"))) * gradient for gradient in right(self)]

    monkeypatch.setattr(bench.Training, "gradients", wrong_by_kernels)
    with pytest.raises(bench.Disagreement, match="gradients of SpikeLoRA: tensor 0 of 'kernels' and 'plain torch'"):
        bench.training_steps("tiny", bench.spikegpt, TINY, {}, 1)


@pytest.mark.parametrize("model", ["spikegpt", "bert"])
def test_the_floor_has_every_product_of_a_step_and_is_the_same_for_every_adapter(bench, model):
    need_extension()
    found = []
    for adapter in bench.ADAPTERS.values():
        training = bench.Training(adapter, getattr(bench, model), n_layer=1, n_embd=32, batch=4, tokens=20)
        with bench.Recorder() as recorder:
            training.step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            training.step()
        names = [event.name.removeprefix("aten::").rstrip("_") for event in profiler.events()]
        executed = sum(name in ("mm", "addmm", "bmm", "baddbmm") for name in names)
        assert len(recorder.calls) == executed > 0
        found.append(sorted(sorted((*a[0], *b[0])) for _, (a, b) in recorder.calls))
    assert all(products == found[0] for products in found)


@pytest.mark.parametrize("model", ["spikegpt", "bert"])
def test_a_training_step_of_every_gate_has_gradients_throughout_and_leaves_the_weights(bench, model):
    for gate, adapter in bench.GATES.items():
        training = bench.Training(adapter, getattr(bench, model), n_layer=1, n_embd=96, batch=4, tokens=20)
        training.backward()
        gradients = {name: p.grad for name, p in training.model.named_parameters() if p.requires_grad}
        assert [name for name, grad in gradients.items() if not (grad.isfinite().all() and grad.any())] == [], gate
        before = [p.clone() for p in training.parameters]
        training.step()
        assert all(map(torch.equal, before, training.parameters)), gate
