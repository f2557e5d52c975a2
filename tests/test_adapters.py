"""SpikeLoRA as a peft method: its equation, saving and loading by stock peft code, and what it refuses."""

import json
import math
import pickle
import re
import warnings

import pytest
import torch
from conftest import SIZES, largest_difference, lively
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForSequenceClassification, SpikeLoraConfig
from spikegpt_lora.adapters import SpikeGate, SpikeLoraLinear

GATE = {"spikelora_v_threshold": 0.3, "spikelora_tau": 3.0, "spikelora_surrogate_alpha": 1.5}
RKV = [
    f"blocks.{i}.{half}.{name}" for i in range(3) for half in ("att", "ffn") for name in ("key", "receptance", "value")
]


def fresh_classifier():
    torch.manual_seed(0)
    return lively(SpikeGPTForSequenceClassification(SpikeGPTConfig(**SIZES)))


def adapted(config=None):
    """A classifier with an adapter that has been trained, so to speak: B is not 0."""
    model = (
        get_peft_model(fresh_classifier(), config or SpikeLoraConfig(task_type="SEQ_CLS", r=4, **GATE)).double().eval()
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    return model


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
    model = adapted()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "score" in name for name in trained)
    assert any("score" in name for name in trained) and len(trained) == 2 * len(RKV) + 1
    model(ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in model.parameters() if p.requires_grad)


def test_a_new_adapter_changes_nothing_and_a_disabled_one_neither(ids):
    base = fresh_classifier()(ids).logits
    assert torch.equal(get_peft_model(fresh_classifier(), SpikeLoraConfig(task_type="SEQ_CLS"))(ids).logits, base)
    model = adapted()
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
    model = adapted(config)
    with torch.no_grad():
        model.get_submodule("base_model.model.score.modules_to_save.default").weight.add_(1.0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh_classifier(), tmp_path).double().eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert type(loaded.peft_config["default"]) is type(model.peft_config["default"])


def test_every_gate_setting_is_saved(tmp_path):
    adapted().save_pretrained(tmp_path)
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
    model = adapted()
    before = model(ids).logits
    with pytest.raises(RuntimeError, match="'default' cannot be merged: its gate SN.A x. depends on the input"):
        merge(model)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    "config", [LoraConfig(task_type="SEQ_CLS"), SpikeLoraConfig(task_type="SEQ_CLS", use_spikelora=False)]
)
def test_plain_lora_merges(config, ids):
    model = adapted(config)
    before = model(ids).logits
    merged = model.merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())
    assert largest_difference(merged(ids).logits, before) < 1e-10


def test_a_plain_and_a_spiking_adapter_live_side_by_side(ids, tmp_path):
    model = adapted()
    spiking = model(ids).logits
    model.add_adapter("plain", SpikeLoraConfig(task_type="SEQ_CLS", r=2, use_spikelora=False))
    model.set_adapter("plain")
    assert not torch.equal(model.double().eval()(ids).logits, spiking)
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, spiking)
    model.delete_adapter("plain")
    model.delete_adapter("default")
    assert not any(isinstance(module, SpikeGate) for module in model.modules())


def test_layers_that_are_no_plain_linear_are_refused_by_name():
    with pytest.raises(ValueError, match="adapts torch.nn.Linear, .* got Embedding"):
        get_peft_model(fresh_classifier(), SpikeLoraConfig(target_modules=["emb"]))


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
        ({"spikelora_gate": "ternary"}, "spikelora_gate must be 'graded' or 'binary', got 'ternary'"),
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
        ({"target_parameters": ["emb.weight"]}, "target_parameters must be None .there is no gate for parameters"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SpikeLoraConfig(**settings)


NUMBERS = ("spikelora_tau", "spikelora_v_threshold", "spikelora_surrogate_alpha", "lora_alpha", "lora_dropout")


@pytest.mark.parametrize(
    "name, value",
    [(name, value) for name in NUMBERS for value in ("0.1", None, True, math.nan, math.inf)]
    + [
        (name, value)
        for name in ("spikelora_v_reset", "spikelora_target_sparsity")
        for value in ("0", False, math.nan, -math.inf)
    ]
    + [(name, value) for name in ("use_spikelora", "spikelora_detach_reset") for value in (None, 1, "no")]
    + [("r", value) for value in ("4", 4.0, None, True)]
    + [("spikelora_base_fingerprint", value) for value in (7, "", "float32:00", "int8:" + 256 * "0")],
)
def test_settings_of_another_type_and_not_finite_are_named(name, value):
    with pytest.raises(ValueError, match=f"SpikeLoraConfig: {name} must be .*, got {re.escape(repr(value))}"):
        SpikeLoraConfig(**{name: value})


def test_one_message_lists_every_problem():
    with pytest.raises(ValueError) as types:
        SpikeLoraConfig(r="4", spikelora_tau=None, spikelora_v_threshold=math.nan, target_parameters=["x"])
    assert all(f"{name} must" in str(types.value) for name in ("r", "spikelora_tau", "target_parameters"))
    with pytest.raises(ValueError) as ranges:
        SpikeLoraConfig(r=-1, spikelora_tau=0.5, spikelora_time="never")
    assert all(f"{name} must" in str(ranges.value) for name in ("r", "spikelora_tau", "spikelora_time"))


def test_config_and_model_can_be_pickled(ids):
    model = adapted()
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, model(ids).logits)


def spoil(folder, **changes):
    """Change tensors of a saved adapter: those whose name contains a key, by the function given for it."""
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    for part, change in changes.items():
        name = next(name for name in weights if part in name)
        weights[name] = change(weights[name])
    save_file(weights, file, {"format": "pt"})


def set_in_config(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def by_the_state_dict(base, folder):
    model = get_peft_model(base, SpikeLoraConfig.from_pretrained(folder))
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model


def into_another_adapter(base, folder):
    model = get_peft_model(base, SpikeLoraConfig(task_type="SEQ_CLS"))
    model.load_adapter(folder, "second")
    return model


LOADS = {
    "from_pretrained": PeftModel.from_pretrained,
    "low_cpu_mem_usage": lambda base, folder: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True),
    "load_adapter": into_another_adapter,
    "set_peft_model_state_dict": by_the_state_dict,
}


def other_classifier():
    torch.manual_seed(0)
    return lively(SpikeGPTForSequenceClassification(SpikeGPTConfig(**SIZES)), seed=1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["lora_A", "lora_gate._extra_state", "score"])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_weights_that_are_not_finite_are_refused_by_name(load, part, value, tmp_path):
    adapted().save_pretrained(tmp_path)
    spoil(tmp_path, **{part: lambda tensor: torch.full_like(tensor, value)})
    with pytest.raises(ValueError, match=f"weights of adapter .* must be finite, got NaN or infinity in .*{part}"):
        load(fresh_classifier(), tmp_path)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_another_base_of_the_same_sizes_is_noticed(load, tmp_path):
    adapted().save_pretrained(tmp_path)
    load(fresh_classifier(), tmp_path)
    with pytest.raises(ValueError, match=r"belongs to another base model .*32 of 32 weights"):
        load(other_classifier(), tmp_path)


def test_autopeft_notices_another_base_too(tmp_path):
    fresh_classifier().save_pretrained(tmp_path / "base")
    base = SpikeGPTForSequenceClassification.from_pretrained(tmp_path / "base")
    get_peft_model(base, SpikeLoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "adapter")
    other_classifier().save_pretrained(tmp_path / "base")  # somebody trained it on
    with pytest.raises(ValueError, match="belongs to another base model .*base"):
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("saved", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_another_precision_is_the_same(saved, loaded, tmp_path):
    get_peft_model(fresh_classifier().to(saved), SpikeLoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    PeftModel.from_pretrained(fresh_classifier().to(loaded), tmp_path)
    with pytest.raises(ValueError, match="belongs to another base model"):
        PeftModel.from_pretrained(other_classifier().to(loaded), tmp_path)


def test_a_base_that_was_trained_on_a_little_is_noticed_where_precisions_show_it(tmp_path):
    base = fresh_classifier().float()
    get_peft_model(fresh_classifier().float(), SpikeLoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1 + 1e-5)
    with pytest.raises(ValueError, match="belongs to another base model"):
        PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_without_a_fingerprint_an_adapter_is_loaded_as_ever(load, tmp_path):
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    old = {k: v for k, v in json.loads(file.read_text()).items() if k != "spikelora_base_fingerprint"}
    file.write_text(json.dumps(old))
    load(other_classifier(), tmp_path)


@pytest.mark.parametrize("settings", [{"use_spikelora": False}, {}])
def test_a_base_that_cannot_be_seen_has_no_fingerprint(settings, tmp_path):
    model = adapted(SpikeLoraConfig(task_type="SEQ_CLS", **settings))
    model.save_pretrained(tmp_path / "seen")
    assert SpikeLoraConfig.from_pretrained(tmp_path / "seen").spikelora_base_fingerprint.startswith("float64:")
    if settings:
        model.merge_adapter()
    else:
        next(m for m in model.modules() if isinstance(m, SpikeLoraLinear)).base_layer.to("meta")
    model.save_pretrained(tmp_path / "unseen")
    assert SpikeLoraConfig.from_pretrained(tmp_path / "unseen").spikelora_base_fingerprint is None


def test_one_configuration_serves_for_two_bases(tmp_path):
    config = SpikeLoraConfig(task_type="SEQ_CLS")
    get_peft_model(fresh_classifier(), config).save_pretrained(tmp_path / "first")
    get_peft_model(other_classifier(), config).save_pretrained(tmp_path / "second")
    PeftModel.from_pretrained(other_classifier(), tmp_path / "second")
    PeftModel.from_pretrained(fresh_classifier(), tmp_path / "first")


def test_a_gate_without_its_threshold_in_the_file_is_said(tmp_path):
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "_extra_state" not in k}, file, {"format": "pt"})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(fresh_classifier(), tmp_path)
    assert any("missing adapter keys" in str(w.message) and "_extra_state" in str(w.message) for w in said)


def test_transformers_own_load_adapter_looks_at_thresholds_too(tmp_path):
    adapted().save_pretrained(tmp_path)
    spoil(tmp_path, **{"_extra_state": lambda tensor: torch.full_like(tensor, -1.0)})
    with pytest.raises(Exception, match="must be one finite number >= 0, got -1.0"):
        fresh_classifier().load_adapter(tmp_path)
