"""Thresholds that follow a sparsity: calibration, the controller in a loop of one's own and in a Trainer."""

import pytest
import torch
from helpers import SIZES, fresh_classifier
from peft import LoraConfig, get_peft_model

from spikegpt_lora import SpikeLoraConfig
from spikegpt_lora.adapters import SparsityController, SpikeGate, calibrate_thresholds
from spikegpt_lora.adapters.sparsity import controllable
from spikegpt_lora.observe.adapters import observe_adapters


def untrained(**config):
    model = fresh_classifier(pad_token_id=0)
    return get_peft_model(model, SpikeLoraConfig(task_type="SEQ_CLS", r=8, **config)).double()


def batches(count=6):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        lengths = torch.randint(3, 13, (16, 1), generator=generator)
        ids = torch.randint(1, SIZES["vocab_size"], (16, 12), generator=generator)
        yield {"input_ids": ids, "attention_mask": (torch.arange(12) < lengths).long()}


def sparsities(model):
    with observe_adapters(model) as seen:
        for batch in batches():
            model(**batch)
    return [module["sparsity"] for module in seen.activity().modules.values()]


@pytest.mark.parametrize("time", ["pointwise", "token"])
@pytest.mark.parametrize("v_reset", [0.0, -0.2, None])
@pytest.mark.parametrize("sparsity", [0.8, 0.95])
def test_calibration_makes_every_module_as_silent_as_asked(time, v_reset, sparsity):
    model = untrained(spikelora_time=time, spikelora_v_reset=v_reset).train()
    thresholds = calibrate_thresholds(model, batches(), sparsity)
    assert len(thresholds) == 18 and model.training
    assert all(abs(found - sparsity) < 0.01 for found in sparsities(model))


def test_calibration_warns_of_modules_that_are_more_silent_without_any_threshold(caplog):
    model = untrained()
    with torch.no_grad():
        model.get_submodule("base_model.model.spikegpt.blocks.0.ffn.value.lora_A.default").weight.copy_(
            -torch.ones(8, 48)
        )
    with caplog.at_level("WARNING", "spikegpt_lora"):
        thresholds = calibrate_thresholds(model, batches(), 0.5)
    assert "blocks.0.ffn.value" in caplog.text and "more silent than 0.5 with a threshold of 0" in caplog.text
    assert any(value == 0 for value in thresholds.values())


@pytest.mark.parametrize("time", ["pointwise", "token"])
def test_the_controller_reaches_its_target_in_every_module(time):
    model = untrained(spikelora_time=time, spikelora_target_sparsity=0.9).train()
    with SparsityController(model, rate=1.0) as controller:
        for _ in range(80):
            for batch in batches(2):
                model(**batch)
            controller.step()
    assert all(abs(found - 0.9) < 0.03 for found in sparsities(model))


def test_a_target_may_be_a_schedule():
    model = untrained().train()
    targets = []
    with SparsityController(model, lambda progress: targets.append(progress) or 0.5) as controller:
        model(**next(batches()))
        controller.step(0.25)
    assert targets == [0.25]


def test_validation_does_not_move_thresholds():
    model = untrained().train()
    with SparsityController(model, 0.9) as controller:
        model.eval()
        model(**next(batches()))
        controller.step()
    assert all(gate.v_threshold == 0.1 for gate in controllable(model).values())


def test_a_controller_that_is_closed_sees_nothing():
    model = untrained().train()
    with SparsityController(model, 0.9) as controller:
        pass
    model(**next(batches()))
    assert not controller.seen


@pytest.mark.parametrize("target", [None, 0.0, 1.0])
def test_a_controller_without_a_target_in_range_is_refused(target):
    with pytest.raises(ValueError, match=rf"needs a target sparsity in \(0, 1\), got {target}: give target="):
        SparsityController(untrained(), target)


def test_models_without_a_free_threshold_are_refused():
    model = get_peft_model(fresh_classifier(), LoraConfig())
    for wrong in (model, untrained(spikelora_learn="threshold")):
        with pytest.raises(ValueError, match="has no spiking adapter whose threshold is free"):
            calibrate_thresholds(wrong, batches(), 0.5)
    assert any(isinstance(module, SpikeGate) for module in untrained(spikelora_learn="tau").modules())


@pytest.mark.parametrize(
    "given, sparsity, message",
    [([], 0.5, "at least one batch"), (list(batches(1)), 1.5, r"sparsity must be in \(0, 1\), got 1.5")],
)
def test_calibration_says_what_is_wrong(given, sparsity, message):
    with pytest.raises(ValueError, match=message):
        calibrate_thresholds(untrained(), given, sparsity)


def test_activations_that_are_not_finite_move_no_threshold():
    model = untrained().train()
    model.get_submodule("base_model.model.spikegpt.blocks.1.att.key.lora_A.default").weight.data[0] = float("nan")
    with SparsityController(model, 0.9) as controller:
        model(**next(batches()))
        with pytest.raises(FloatingPointError, match="activations are NaN or infinite: the training has diverged"):
            controller.step()
    with pytest.raises(
        ValueError, match="what calibration reads must be finite, got NaN or infinity in .*blocks.1.att.key"
    ):
        calibrate_thresholds(model, batches(1), 0.5)
    assert all(gate.v_threshold == 0.1 for gate in controllable(model).values())
