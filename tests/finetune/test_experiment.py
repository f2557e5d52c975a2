"""The engine of a comparison: what of a plan counts, how a folder is taken up, which runs are done."""

from dataclasses import dataclass

import pytest

from spikegpt_lora.finetune.experiment import aside, counted, run_missing, take_up
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


def test_only_what_is_missing_is_run_and_results_are_written_before_and_after(tmp_path):
    runs = [{"method": "lora", "rank": 8, "seed": 0}, {"method": "lora", "rank": 8, "seed": 1}]
    finish(tmp_path, runs[0])
    called = []
    run_missing(tmp_path, runs, lambda run, description: called.append((run["seed"], description)), called.append)
    assert called == [False, (1, "2/2 lora rank 8 seed 1"), True]
