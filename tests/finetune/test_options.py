"""Settings of fine-tuning: defaults, the authors', changes, trials."""

import pytest

from spikegpt_lora.finetune.methods import METHODS, resolve_options
from spikegpt_lora.finetune.options import PARITY, sample_trial


@pytest.mark.parametrize("name", PARITY)
def test_the_authors_settings_are_given_to_adapters_whole(name):
    resolved = resolve_options("embedded", parity=name)
    assert all(getattr(resolved["spikelora"], key) == value for key, value in PARITY[name].items())
    assert resolved["head"].learning_rate == METHODS["head"].settings["embedded"]["learning_rate"]


def test_parity_differs_by_what_the_paper_leaves_open():
    assert set(PARITY["library"]) - set(PARITY["paper"]) == {
        "learning_rate", "schedule", "epochs", "keep", "group_by_length", "read_padding",
    }  # fmt: skip


def test_a_change_for_one_method_counts_before_one_for_all():
    for_all = dict.fromkeys(METHODS, 7)
    resolved = resolve_options("random", changes={"epochs": [{"lora": 2}, for_all]})
    assert resolved["lora"].epochs == 2 and resolved["full"].epochs == 7


def test_after_another_task_each_method_takes_two_epochs_at_half_its_rate_unless_it_is_told_otherwise():
    usual = resolve_options("embedded")
    after = resolve_options("embedded", changes={"epochs": [{"lora": 3}]}, intermediate=True)
    assert all(after[name].learning_rate == usual[name].learning_rate / 2 for name in METHODS)
    assert after["lora"].epochs == 3 and after["full"].epochs == 2


def test_the_first_trial_is_the_settings_and_the_others_differ():
    options = resolve_options("embedded")["lora"]
    trials = [sample_trial(options, trial) for trial in range(31)]
    assert trials[0] == options and len({repr(trial) for trial in trials}) == 31


def test_a_trial_draws_the_same_factors_for_every_method():
    resolved = resolve_options("embedded")
    factors = {sample_trial(resolved[m], 3).learning_rate / resolved[m].learning_rate for m in METHODS}
    assert len({round(factor, 9) for factor in factors}) == 1
