"""Token shift by rows in place of channels: what it keeps, and what it makes of the shares."""

import pytest
import torch
from helpers import SIZES, lively

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM
from spikegpt_lora.convert.calibrate import calibrate
from spikegpt_lora.convert.rows import mix_rows
from spikegpt_lora.convert.spiking import prepare
from spikegpt_lora.neurons.multilevel import IntegerSpikes

SHARES = ("time_mix_k", "time_mix_v", "time_mix_r")


def speaker(**config):
    torch.manual_seed(0)
    return lively(SpikeGPTForCausalLM(SpikeGPTConfig(**SIZES, **config))).double().eval()


def text(rows=4, length=16):
    return torch.randint(SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))


def shares_of(model):
    return {name: p for name, p in model.named_parameters() if name.endswith(SHARES)}


def test_where_all_channels_have_one_share_nothing_changes():
    model = speaker()
    for p in shares_of(model).values():
        p.data.fill_(0.3)
    torch.testing.assert_close(mix_rows(model)(text()).logits, model(text()).logits, rtol=1e-10, atol=1e-10)


def test_a_rows_share_is_that_of_least_squares():
    model = speaker()
    att, row = model.spikegpt.blocks[1].att, 5
    mixed = mix_rows(model).spikegpt.blocks[1].att.time_mix_v.flatten()[row]
    x, before = torch.randn(2, 200_000, att.value.in_features, dtype=torch.float64)
    now, then = x @ att.value.weight[row], before @ att.value.weight[row]
    mu = att.time_mix_v.flatten()
    wanted = (mu * x + (1 - mu) * before) @ att.value.weight[row] - then
    best = (wanted @ (now - then)) / ((now - then) @ (now - then))
    assert mixed.item() == pytest.approx(best.item(), abs=0.02) and mu.std() > 0.1


def test_a_model_that_mixes_rows_is_returned():
    model = speaker(token_shift="rows")
    assert mix_rows(model) is model


def test_one_that_reads_integer_spikes_is_refused():
    with pytest.raises(ValueError, match="read integer spikes already"):
        mix_rows(speaker(matrix_spikes="integer"))


def test_made_spiking_its_readers_have_no_neurons_and_what_they_read_is_the_integer_stream():
    model = mix_rows(speaker())
    spiking = calibrate(prepare(model, 7), text(64, 64))
    neurons = {name.rpartition(".")[2] for name, m in spiking.named_modules() if isinstance(m, IntegerSpikes)}
    assert neurons == {"spike_output", "spike_value"}
    read = []
    spiking.spikegpt.blocks[1].att.key.register_forward_pre_hook(lambda m, args: read.append(args[0]))
    spiking(text())
    assert torch.equal(read[0], read[0].round()) and read[0].any()


def test_prepared_and_silent_it_gives_what_it_gave_where_every_token_has_as_many_spikes():
    model = mix_rows(speaker())
    emb = model.spikegpt.emb.weight
    emb.data = emb.abs() * torch.where(torch.arange(emb.shape[1]) % 2 == 0, 1.0, -1.0).double()  # half of each row
    torch.testing.assert_close(prepare(model)(text()).logits, model(text()).logits, rtol=1e-9, atol=1e-9)
