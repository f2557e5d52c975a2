"""Settings of fine-tuning: defaults, the authors', changes, trials."""

import pytest

from spikegpt_lora.finetune.options import (
    METHODS,
    PARITY,
    SETTINGS,
    choose,
    drawn,
)


@pytest.mark.parametrize("name", PARITY)
def test_the_authors_settings_are_given_to_adapters_whole(name):
    chosen = choose("embedded", parity=name)
    assert all(getattr(chosen["spikelora"], key) == value for key, value in PARITY[name].items())
    assert chosen["head"].learning_rate == SETTINGS["embedded"]["head"]["learning_rate"]


def test_parity_differs_by_what_the_paper_leaves_open():
    assert set(PARITY["library"]) - set(PARITY["paper"]) == {
        "learning_rate", "schedule", "epochs", "keep", "group_by_length", "read_padding",
    }  # fmt: skip


def test_a_change_for_one_method_counts_before_one_for_all():
    for_all = dict.fromkeys(METHODS, 7)
    chosen = choose("random", changes={"epochs": [{"lora": 2}, for_all]})
    assert chosen["lora"].epochs == 2 and chosen["full"].epochs == 7


def test_the_first_trial_is_the_settings_and_the_others_differ():
    options = choose("embedded")["lora"]
    trials = [drawn(options, trial) for trial in range(31)]
    assert trials[0] == options and len({repr(trial) for trial in trials}) == 31


def test_a_trial_draws_the_same_factors_for_every_method():
    chosen = choose("embedded")
    factors = {drawn(chosen[m], 3).learning_rate / chosen[m].learning_rate for m in METHODS}
    assert len({round(factor, 9) for factor in factors}) == 1
