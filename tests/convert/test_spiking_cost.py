"""What parts cost: losses token by token, differences in pairs, and a model that is afterwards as it was."""

import numpy as np
import pytest
import torch
from helpers import SIZES, lively

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM
from spikegpt_lora.convert.calibrate import calibrate
from spikegpt_lora.convert.cost import cost, costs
from spikegpt_lora.convert.spiking import prepare
from spikegpt_lora.pretrain.perplexity import STREAMS, token_losses

TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], STREAMS * 70).astype(np.uint16)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    model = lively(SpikeGPTForCausalLM(SpikeGPTConfig(**SIZES)))
    ids = torch.randint(SIZES["vocab_size"], (64, 64), generator=torch.Generator().manual_seed(0))
    return model, prepare(model, 1, tokens=ids), calibrate(prepare(model, 1, tokens=ids), ids)


def test_token_losses_are_those_of_streams_read_whole(models):
    losses = token_losses(models[0], TOKENS)
    ids = torch.from_numpy(TOKENS.astype(np.int64)).view(STREAMS, -1)
    with torch.no_grad():
        log_p = models[0](ids[:, :-1]).logits.log_softmax(dim=-1)
    torch.testing.assert_close(losses, -log_p.gather(2, ids[:, 1:, None])[..., 0].float())


def test_a_cost_is_a_mean_difference_with_its_error_over_streams():
    base = torch.randn(STREAMS, 5, generator=torch.Generator().manual_seed(0))
    shift = torch.linspace(0, 1, STREAMS)[:, None]
    found = cost("x", base + shift, base)
    assert found.nats == pytest.approx(0.5, abs=1e-5)
    assert found.error == pytest.approx(float(shift.std() / STREAMS**0.5), rel=1e-4)
    with pytest.raises(ValueError, match="128 tokens or more, got 127"):
        token_losses(None, TOKENS[:127])


def test_every_part_is_measured_awake_by_itself_and_the_model_is_left_awake(models):
    model, prepared, calibrated = models
    float_losses, everything = token_losses(model, TOKENS), token_losses(calibrated, TOKENS)
    found = costs(prepared, calibrated, TOKENS, float_losses)
    nats = {one.part: one.nats for one in found}
    assert len(nats) == 7 and nats["everything"] == pytest.approx(cost("", everything, float_losses).nats)
    assert len(set(nats.values())) == 7
    assert not any(m.silent for m in calibrated.modules() if hasattr(m, "silent"))
    assert calibrated.config.wkv_powers_of_two is False and torch.equal(token_losses(calibrated, TOKENS), everything)
