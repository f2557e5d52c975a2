"""The engine of a comparison: what of a plan counts, how a folder is taken up, which runs are done."""

from dataclasses import dataclass

import pytest

from spikegpt_lora.finetune import experiment
from spikegpt_lora.finetune.experiment import aside, bf16_of, counted, run_missing, take_up
from spikegpt_lora.report.results import folder_of
from spikegpt_lora.utils.files import write_json


@dataclass(frozen=True)
class Plan:
    rate: float
    seeds: list[int] = aside()


def test_results_depend_on_every_field_that_does_not_stand_aside():
    assert counted(Plan(0.5, [1])) == {"rate": 0.5}


def finish(out, run):
    (out / folder_of(run)).mkdir(parents=True)
    write_json(out / folder_of(run) / "run.json", run)


def test_a_folder_goes_on_with_the_same_settings_alone(tmp_path):
    take_up(tmp_path, {"rate": 0.5}, [])
    take_up(tmp_path, {"rate": 0.7}, [])  # nothing is there yet
    finish(tmp_path, {"method": "lora", "seed": 0})
    take_up(tmp_path, {"rate": 0.7}, [])
    with pytest.raises(ValueError, match=r"holds results of other settings \(rate was 0.7, is 0.5\)"):
        take_up(tmp_path, {"rate": 0.5}, [])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("place", [lambda bf16: {"bf16": bf16}, lambda bf16: {"settings": {"lora": {"bf16": bf16}}}])
@pytest.mark.parametrize("file", ["options.json", "results.json"])
def test_a_folder_knows_the_precision_of_what_was_begun_in_it(tmp_path, bf16, place, file):
    options = {"rate": 0.5, **place(bf16)}
    write_json(tmp_path / file, options if file == "options.json" else {"options": options})
    assert bf16_of(tmp_path) is None  # a false start
    finish(tmp_path, {"method": "lora", "seed": 0})
    assert bf16_of(tmp_path) is bf16


def test_a_folder_that_says_nothing_of_precision_has_none(tmp_path):
    finish(tmp_path, {"method": "lora", "seed": 0})
    assert bf16_of(tmp_path) is None


def test_only_what_is_missing_is_run_and_results_are_written_before_and_after(tmp_path):
    runs = [{"method": "lora", "rank": 8, "seed": 0}, {"method": "lora", "rank": 8, "seed": 1}]
    finish(tmp_path, runs[0])
    called = []
    run_missing(tmp_path, runs, lambda run, description: called.append((run["seed"], description)), called.append)
    assert called == [False, (1, "2/2 lora rank 8 seed 1"), True]


def test_each_run_says_how_long_all_that_are_missing_will_take(tmp_path, monkeypatch):
    runs = [{"method": method, "seed": seed} for seed in (0, 1) for method in ("full", "head")]
    seconds, said = {"full": 600, "head": 60}, []
    clock = [0.0]
    monkeypatch.setattr(experiment, "perf_counter", lambda: clock[0])

    def train(run, description):
        said.append(description)
        clock[0] += seconds[run["method"]]

    run_missing(tmp_path, runs, train, lambda complete: None)
    assert said == [
        "1/4 full seed 0",
        "2/4 head seed 0 (all: 30:00 to go)",  # nothing is known of head yet
        "3/4 full seed 1 (all: 11:00 to go)",
        "4/4 head seed 1 (all: 01:00 to go)",
    ]
