"""SpikeGPTConfig refuses what would otherwise pass silently."""

import pytest
from transformers import AutoConfig

from spikegpt_lora import SpikeGPTConfig


def test_unknown_keys_are_an_error_that_names_them_all():
    with pytest.raises(ValueError, match="unknown key 'n_head'; unknown key 'n_layers'"):
        SpikeGPTConfig(n_layers=3, n_head=2)


def test_values_out_of_range_are_named_in_one_message():
    with pytest.raises(ValueError, match="n_layer must be >= 1, got 0.*lif_tau must be > 1, got 1.0"):
        SpikeGPTConfig(n_layer=0, lif_tau=1.0)


def test_values_of_another_type_are_named():
    with pytest.raises(ValueError, match="n_embd must be an integer, got 8.0.*dropout must be a finite num.*got '0.1'"):
        SpikeGPTConfig(n_embd=8.0, dropout="0.1")


def test_transformers_names_are_accepted():
    config = SpikeGPTConfig(hidden_size=8, num_hidden_layers=2, num_labels=5)
    assert (config.n_embd, config.n_layer, config.num_labels, config.hidden_size) == (8, 2, 5, 8)


def test_a_saved_config_comes_back_equal(tmp_path):
    config = SpikeGPTConfig(n_embd=8, n_layer=2, lif_v_reset=None, pooling="mean", id2label={0: "a", 1: "b", 2: "c"})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is SpikeGPTConfig
    assert loaded.to_diff_dict() | {"_name_or_path": ""} == config.to_diff_dict() | {"_name_or_path": ""}


def test_hidden_width_defaults_to_four_times_the_width():
    assert SpikeGPTConfig(n_embd=6).n_ffn == 24
