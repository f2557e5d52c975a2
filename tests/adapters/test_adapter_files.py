"""An adapter's files: what is refused of them, which base model they belong to, and where it is found."""

import json
import math
import re
import warnings

import pytest
import torch
from helpers import SIZES, adapted, fresh_classifier, lively, trained_classifier
from peft import (
    AutoPeftModelForSequenceClassification,
    KasaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForSequenceClassification, SpikeLoraConfig
from spikegpt_lora.adapters import SpikeLoraLinear
from spikegpt_lora.checkpoint import base_of, load_adapted, load_adapter
from spikegpt_lora.utils.errors import DamagedFile

IDS = torch.tensor([[1, 2, 3]])


def spoil(folder, **changes):
    """Change tensors of a saved adapter: those whose name contains a key, by the function given for it."""
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    for part, change in changes.items():
        name = next(name for name in weights if part in name)
        weights[name] = change(weights[name])
    save_file(weights, file, {"format": "pt"})


def assert_holds(model, folder):
    """That every tensor of the adapter saved in `folder` is one of the model's."""
    saved, own = load_file(folder / "adapter_model.safetensors"), list(model.state_dict().values())
    assert saved and all(any(torch.equal(tensor, one) for one in own) for tensor in saved.values())


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


def test_a_wrong_setting_in_a_file_is_said_with_its_folder(tmp_path):
    trained_classifier().save_pretrained(tmp_path)
    set_in_config(tmp_path, r="4", spikelora_tau=math.inf)
    with pytest.raises(
        ValueError, match=f"the adapter in {re.escape(str(tmp_path))}: SpikeLoraConfig: r must.*tau must"
    ):
        PeftModel.from_pretrained(fresh_classifier(), tmp_path)


@pytest.fixture(params=[SpikeLoraConfig, LoraConfig], ids=["spikelora", "lora"])
def moved(request, tmp_path):
    """What recipes/subj_finetune.py leaves, moved as a whole: the adapter's folder, and its logits."""
    out = tmp_path / "out"
    fresh_classifier().float().save_pretrained(out / "base" / "seed0")
    base = SpikeGPTForSequenceClassification.from_pretrained(out / "base" / "seed0")
    model = adapted(base, request.param(task_type="SEQ_CLS", r=2), "lora_", dtype=torch.float32)
    model.save_pretrained(out / "adapter" / "seed0")
    return out.rename(tmp_path / "elsewhere") / "adapter" / "seed0", model(IDS).logits


def test_an_adapter_that_was_moved_with_its_base_is_loaded_and_saved_for_peft(moved, caplog):
    folder, logits = moved
    model = load_adapted(SpikeGPTForSequenceClassification, folder).eval()
    place = folder.parents[1] / "base" / "seed0"
    assert torch.equal(model(IDS).logits, logits) and f"was moved from {folder.parents[2]}/out" in caplog.text
    assert model.peft_config["default"].base_model_name_or_path == base_of(folder) == str(place)
    model.peft_config["default"].save_pretrained(folder)
    assert torch.equal(AutoPeftModelForSequenceClassification.from_pretrained(folder)(IDS).logits, logits)


def test_a_relative_base_is_one_from_the_adapters_folder(moved, tmp_path, monkeypatch):
    set_in_config(moved[0], base_model_name_or_path="../../kept")
    (moved[0].parents[1] / "base" / "seed0").rename(moved[0].parents[1] / "kept")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load_adapted(SpikeGPTForSequenceClassification, moved[0])(IDS).logits, moved[1])


@pytest.mark.parametrize("moved", [SpikeLoraConfig], indirect=True)
def test_another_base_in_the_moved_ones_place_is_refused(moved):
    other_classifier().float().save_pretrained(moved[0].parents[1] / "base" / "seed0")
    with pytest.raises(DamagedFile, match="belongs to another base model .*32 of 32 weights"):
        load_adapted(SpikeGPTForSequenceClassification, moved[0])


def test_a_base_that_is_nowhere_is_said_with_the_adapter_that_names_it(moved):
    (moved[0].parents[1] / "base").rename(moved[0].parents[1] / "lost")
    with pytest.raises(ValueError, match="no SpikeGPT classifier at .*out/base/seed0.*the base model that .*adapter_c"):
        load_adapted(SpikeGPTForSequenceClassification, moved[0])


def test_an_adapter_of_a_method_that_is_gone_is_refused_by_name(tmp_path):
    trained_classifier().save_pretrained(tmp_path)
    set_in_config(tmp_path, peft_type="SPIKEADALORA")
    with pytest.raises(DamagedFile, match="peft_type must be SPIKELORA or .*got 'SPIKEADALORA': load it with"):
        load_adapter(fresh_classifier(), tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["lora_A", "lora_gate._extra_state", "score"])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_weights_that_are_not_finite_are_refused_by_name(load, part, value, tmp_path):
    trained_classifier().save_pretrained(tmp_path)
    spoil(tmp_path, **{part: lambda tensor: torch.full_like(tensor, value)})
    with pytest.raises(ValueError, match=f"weights of adapter .* must be finite, got NaN or infinity in .*{part}"):
        load(fresh_classifier(), tmp_path)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_another_base_of_the_same_sizes_is_noticed(load, tmp_path):
    trained_classifier().save_pretrained(tmp_path)
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
    trained_classifier().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    old = {k: v for k, v in json.loads(file.read_text()).items() if k != "spikelora_base_fingerprint"}
    file.write_text(json.dumps(old))
    assert_holds(load(other_classifier(), tmp_path), tmp_path)


@pytest.mark.parametrize("settings", [{"use_spikelora": False}, {}])
def test_a_base_that_cannot_be_seen_has_no_fingerprint(settings, tmp_path):
    model = trained_classifier(SpikeLoraConfig(task_type="SEQ_CLS", **settings))
    model.save_pretrained(tmp_path / "seen")
    assert SpikeLoraConfig.from_pretrained(tmp_path / "seen").spikelora_base_fingerprint.startswith("float64:")
    if settings:
        model.merge_adapter()
    else:
        next(m for m in model.modules() if isinstance(m, SpikeLoraLinear)).base_layer.to("meta")
    model.save_pretrained(tmp_path / "unseen")
    assert SpikeLoraConfig.from_pretrained(tmp_path / "unseen").spikelora_base_fingerprint is None


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"kasa_config": KasaConfig()}])
def test_adapters_that_change_their_base_when_put_in_have_no_fingerprint_and_are_loaded(settings, tmp_path):
    config = SpikeLoraConfig(task_type="SEQ_CLS", r=2, use_spikelora=False, **settings)
    get_peft_model(fresh_classifier().float(), config).save_pretrained(tmp_path)
    assert SpikeLoraConfig.from_pretrained(tmp_path).spikelora_base_fingerprint is None
    assert_holds(PeftModel.from_pretrained(fresh_classifier().float(), tmp_path), tmp_path)


def test_one_configuration_serves_for_two_bases(tmp_path):
    config = SpikeLoraConfig(task_type="SEQ_CLS")
    get_peft_model(fresh_classifier(), config).save_pretrained(tmp_path / "first")
    get_peft_model(other_classifier(), config).save_pretrained(tmp_path / "second")
    PeftModel.from_pretrained(other_classifier(), tmp_path / "second")
    PeftModel.from_pretrained(fresh_classifier(), tmp_path / "first")
    first, second = (SpikeLoraConfig.from_pretrained(tmp_path / name) for name in ("first", "second"))
    assert first.spikelora_base_fingerprint != second.spikelora_base_fingerprint


def test_a_gate_without_its_threshold_in_the_file_is_said(tmp_path):
    trained_classifier().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "_extra_state" not in k}, file, {"format": "pt"})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(fresh_classifier(), tmp_path)
    assert any("missing adapter keys" in str(w.message) and "_extra_state" in str(w.message) for w in said)


def test_transformers_own_load_adapter_looks_at_thresholds_too(tmp_path):
    trained_classifier().save_pretrained(tmp_path)
    spoil(tmp_path, **{"_extra_state": lambda tensor: torch.full_like(tensor, -1.0)})
    with pytest.raises(Exception, match="must be one finite number >= 0, got -1.0"):
        fresh_classifier().load_adapter(tmp_path)
