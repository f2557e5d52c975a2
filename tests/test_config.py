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
    with pytest.raises(ValueError, match="n_embd must be a whole number, got 8.0.*dropout must be a fin.*got '0.1'"):
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


@pytest.mark.parametrize("given", [{"AutoModel": "evil.SpikeGPTModel"}, {"AutoTokenizer": None}, ["AutoModel"], None])
def test_code_of_somebody_else_is_refused(given):
    with pytest.raises(ValueError, match="auto_map must name classes of modeling_spikegpt.py, or be left out, got"):
        SpikeGPTConfig(auto_map=given)


def test_a_file_may_name_our_code_or_none():
    assert SpikeGPTConfig(auto_map={}) == SpikeGPTConfig(auto_map=SpikeGPTConfig.auto_map) == SpikeGPTConfig()


def test_hidden_width_defaults_to_four_times_the_width():
    assert SpikeGPTConfig(n_embd=6).n_ffn == 24


@pytest.mark.parametrize(
    "values, message",
    [
        ({"lif_v_reset": "abc"}, "lif_v_reset must be a finite number, or None, got 'abc'"),
        ({"lif_decay_input": "no"}, "lif_decay_input must be True or False, got 'no'"),
        ({"use_cache": 1}, "use_cache must be True or False, got 1"),
        ({"layer_norm_eps": float("inf")}, "layer_norm_eps must be a finite number, got inf"),
        ({"lif_tau": float("nan")}, "lif_tau must be a finite number, got nan"),
        ({"n_embd": True}, "n_embd must be a whole number, got True"),
        ({"pad_token_id": -5}, "pad_token_id must be a token's id below 50277, got -5"),
        ({"vocab_size": 10, "eos_token_id": [3, 10]}, r"eos_token_id must be a token's id below 10, got \[3, 10\]"),
        ({"pooling": ["last"]}, r"pooling must be text, got \['last'\]"),
    ],
)
def test_no_value_of_another_kind_passes(values, message):
    with pytest.raises(ValueError, match=message):
        SpikeGPTConfig(**values)
