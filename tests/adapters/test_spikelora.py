"""SpikeLoRA as a peft method: its equation, saving and loading by stock peft code, and what it refuses."""

import json
import math
import pickle
import re

import pytest
import torch
from helpers import GATE, fresh_classifier, largest_difference, trained_classifier
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from spikegpt_lora import SpikeGPTForSequenceClassification, SpikeLoraConfig
from spikegpt_lora.adapters import SpikeGate, SpikeLoraLinear

RKV = [
    f"blocks.{i}.{half}.{name}" for i in range(3) for half in ("att", "ffn") for name in ("key", "receptance", "value")
]


def adapted_modules(model):
    return sorted(
        name.split("spikegpt.")[-1] for name, module in model.named_modules() if isinstance(module, LoraLayer)
    )


def test_a_layer_computes_the_equation():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7, bias=False)).double()
    model = get_peft_model(net, SpikeLoraConfig(target_modules=["0"], r=4, lora_alpha=12, **GATE)).double()
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    x = 3 * torch.randn(3, 6, 5, dtype=torch.float64)
    a = x @ layer.lora_A["default"].weight.T
    spikes = (a / 3.0 >= 0.3).double()  # one step from rest: membrane a / tau against V_theta
    expected = x @ layer.base_layer.weight.T + (12 / 4) * (spikes * a) @ layer.lora_B["default"].weight.T
    assert 0.1 < spikes.mean() < 0.9
    assert largest_difference(model(x), expected) < 1e-14


@pytest.mark.parametrize("v_threshold, silent", [(0.0, 0.500), (0.1, 0.635), (0.25, 0.807), (0.5, 0.958)])
def test_sparsity_at_initialisation_follows_from_the_threshold(v_threshold, silent):
    # A ~ U(+-1/sqrt d) and |x| = sqrt d give A x ~ N(0, 1/3): silent = P(A x < 2 V_theta)
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(256, 8)), SpikeLoraConfig(target_modules=["0"], r=64))
    x = nn.functional.layer_norm(torch.randn(2000, 256), (256,))
    spikes = SpikeGate(64, v_threshold=v_threshold)(model.base_model.model[0].lora_A["default"](x))
    assert abs((1 - spikes.mean().item()) - silent) < 0.02


@pytest.mark.parametrize("config", [LoraConfig, SpikeLoraConfig])
def test_the_default_targets_are_receptance_key_and_value_of_both_halves(config):
    assert adapted_modules(get_peft_model(fresh_classifier(), config(task_type="SEQ_CLS"))) == sorted(RKV)


def test_all_linear_adds_the_output_projection():
    model = get_peft_model(fresh_classifier(), SpikeLoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    assert adapted_modules(model) == sorted(RKV + [f"blocks.{i}.att.output" for i in range(3)])


def test_only_adapters_and_score_are_trained(ids):
    model = trained_classifier()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "score" in name for name in trained)
    assert any("score" in name for name in trained) and len(trained) == 2 * len(RKV) + 1
    model(ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in model.parameters() if p.requires_grad)


def test_a_new_adapter_changes_nothing_and_a_disabled_one_neither(ids):
    base = fresh_classifier()(ids).logits
    assert torch.equal(get_peft_model(fresh_classifier(), SpikeLoraConfig(task_type="SEQ_CLS"))(ids).logits, base)
    model = trained_classifier()
    assert largest_difference(model(ids).logits, base) > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base)


def test_without_the_gate_it_is_stock_lora_bit_for_bit(ids):
    losses = []
    for config in (
        LoraConfig(task_type="SEQ_CLS", r=4),
        SpikeLoraConfig(task_type="SEQ_CLS", r=4, use_spikelora=False),
    ):
        torch.manual_seed(0)
        model = get_peft_model(fresh_classifier(), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            losses.append(model(ids, labels=torch.tensor([0, 1, 0, 1])).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[0] != losses[2]
    assert [loss.item() for loss in losses[:3]] == [loss.item() for loss in losses[3:]]


@pytest.mark.parametrize("method", ["spikelora", "lora"])
def test_saved_adapters_come_back_with_score_bit_for_bit(method, ids, tmp_path):
    config = LoraConfig(task_type="SEQ_CLS", r=4) if method == "lora" else None
    model = trained_classifier(config)
    with torch.no_grad():
        model.get_submodule("base_model.model.score.modules_to_save.default").weight.add_(1.0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh_classifier(), tmp_path).double().eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert type(loaded.peft_config["default"]) is type(model.peft_config["default"])


def test_every_gate_setting_is_saved(tmp_path):
    trained_classifier().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "SPIKELORA" and saved["use_spikelora"] is True
    assert {key: saved[key] for key in GATE} == GATE
    gate = next(
        m for m in PeftModel.from_pretrained(fresh_classifier(), tmp_path).modules() if isinstance(m, SpikeGate)
    )
    assert (gate.v_threshold, gate.tau, gate.surrogate_function.alpha) == (0.3, 3.0, 1.5)


def test_peft_finds_the_base_model_by_itself(ids, tmp_path):
    fresh_classifier().save_pretrained(tmp_path / "base")
    base = SpikeGPTForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.float64)
    model = get_peft_model(base, SpikeLoraConfig(task_type="SEQ_CLS")).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", dtype=torch.float64)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


MERGES = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_adapter": lambda model: model.merge_adapter(),
    "layer.merge": lambda model: next(m for m in model.modules() if isinstance(m, SpikeLoraLinear)).merge(),
    "get_delta_weight": lambda model: next(
        m for m in model.modules() if isinstance(m, SpikeLoraLinear)
    ).get_delta_weight("default"),
    "add_weighted_adapter": lambda model: model.add_weighted_adapter(["default"], [1.0], "sum"),
}


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_merging_is_refused_with_the_reason_and_changes_nothing(merge, ids):
    model = trained_classifier()
    before = model(ids).logits
    with pytest.raises(RuntimeError, match="'default' cannot be merged: its gate SN.A x. depends on the input"):
        merge(model)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    "config", [LoraConfig(task_type="SEQ_CLS"), SpikeLoraConfig(task_type="SEQ_CLS", use_spikelora=False)]
)
def test_plain_lora_merges(config, ids):
    model = trained_classifier(config)
    before = model(ids).logits
    merged = model.merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    assert largest_difference(merged(ids).logits, before) < 1e-10


def test_a_plain_and_a_spiking_adapter_live_side_by_side(ids, tmp_path):
    model = trained_classifier()
    spiking = model(ids).logits
    model.add_adapter("plain", SpikeLoraConfig(task_type="SEQ_CLS", r=2, use_spikelora=False))
    model.set_adapter("plain")
    assert not torch.equal(model.double().eval()(ids).logits, spiking)
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, spiking)
    model.delete_adapter("plain")
    model.delete_adapter("default")
    assert not any(isinstance(module, SpikeGate) for module in model.modules())


def test_layers_of_other_kinds_are_refused_by_name():
    with pytest.raises(ValueError, match="adapts torch.nn.Linear, .* got LayerNorm"):
        get_peft_model(fresh_classifier(), SpikeLoraConfig(target_modules=["ln_out"]))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"spikelora_tau": 1.0}, "spikelora_tau must be > 1, got 1.0"),
        ({"spikelora_v_threshold": -0.1}, "spikelora_v_threshold must be >= spikelora_v_reset, at least 0, got -0.1"),
        ({"spikelora_surrogate_alpha": 0}, "spikelora_surrogate_alpha must be > 0"),
        ({"use_dora": True}, "use_dora must be False"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights must be True, False or 'gaussian' with the gate, got 'pissa'",
        ),
        ({"spikelora_time": "sequence"}, "spikelora_time must be 'pointwise' or 'token', got 'sequence'"),
        ({"spikelora_gate": "ternary"}, "spikelora_gate must be one of graded, binary, integer, got 'ternary'"),
        (
            {"spikelora_gate": "integer", "spikelora_time": "token"},
            "spikelora_time must be 'pointwise' with an integer gate, got 'token'",
        ),
        (
            {"spikelora_gate": "integer", "spikelora_v_threshold": 0.0},
            "spikelora_v_threshold must be above spikelora_v_reset with an integer gate, got 0.0",
        ),
        ({"spikelora_learn": "all"}, "spikelora_learn must be one of none, threshold, tau, both, got 'all'"),
        ({"spikelora_learn": "both", "spikelora_v_threshold": 0.0}, "spikelora_v_threshold must be above .* learned"),
        ({"spikelora_target_sparsity": 1.0}, r"spikelora_target_sparsity must be in \(0, 1\), or None, got 1.0"),
        (
            {"spikelora_target_sparsity": 0.9, "spikelora_learn": "threshold"},
            "spikelora_target_sparsity must be None where the threshold is learned, got 0.9",
        ),
        ({"lora_alpha": -1}, "lora_alpha must be > 0, got -1"),
        ({"lora_alpha": 0}, "lora_alpha must be > 0, got 0"),
        ({"r": 0}, "r must be >= 1, got 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"target_parameters": ["emb.weight"]}, "target_parameters must be None .parameters have no gate: name layers"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SpikeLoraConfig(**settings)


NUMBERS = ("spikelora_tau", "spikelora_v_threshold", "spikelora_surrogate_alpha", "lora_alpha", "lora_dropout")


@pytest.mark.parametrize(
    "name, value",
    [(name, value) for name in NUMBERS for value in ("0.1", None, True, math.nan, math.inf, 10**400)]
    + [
        (name, value)
        for name in ("spikelora_v_reset", "spikelora_target_sparsity")
        for value in ("0", False, math.nan, -math.inf)
    ]
    + [(name, value) for name in ("use_spikelora", "spikelora_detach_reset") for value in (None, 1, "no")]
    + [("r", value) for value in ("4", 4.0, None, True)]
    + [("spikelora_base_fingerprint", value) for value in (7, "", "float32:00", "int8:" + 256 * "0")]
    + [("target_modules", value) for value in (7, True, [7], {"query": 1})]
    + [("alpha_pattern", value) for value in (None, [], {"query": "8"}, {"query": math.nan}, {"query": 0})]
    + [("rank_pattern", None), ("bias", "some"), ("modules_to_save", "score"), ("eva_config", 1)],
)
def test_settings_of_another_type_and_not_finite_are_named(name, value):
    with pytest.raises(ValueError, match=f"SpikeLoraConfig: {name} must be .*, got {re.escape(repr(value))}"):
        SpikeLoraConfig(**{name: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": {"a", "b"}, "exclude_modules": ("c",)},
        {"lora_alpha": 2.5, "spikelora_tau": 3, "spikelora_v_reset": 0, "alpha_pattern": {"a": 1}},
        {"init_lora_weights": "gaussian", "layers_to_transform": 2, "spikelora_v_reset": None},
    ],
)
def test_what_peft_takes_beside_its_annotations_is_taken(settings):
    config = SpikeLoraConfig(**settings)
    assert all(getattr(config, name) == value for name, value in settings.items())
    assert SpikeGate(2, v_reset=0).v_reset == 0.0


def test_one_message_lists_every_problem():
    with pytest.raises(ValueError) as types:
        SpikeLoraConfig(r="4", spikelora_tau=None, spikelora_v_threshold=math.nan, target_parameters=["x"])
    assert all(f"{name} must" in str(types.value) for name in ("r", "spikelora_tau", "target_parameters"))
    with pytest.raises(ValueError) as ranges:
        SpikeLoraConfig(r=-1, spikelora_tau=0.5, spikelora_time="never")
    assert all(f"{name} must" in str(ranges.value) for name in ("r", "spikelora_tau", "spikelora_time"))


def test_config_and_model_can_be_pickled(ids):
    model = trained_classifier()
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, model(ids).logits)
