"""Pre-training: the same curve after a kill, a longer run from a shorter one, the schedule, and what is measured."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM
from spikegpt_lora.pretrain.loop import (
    Pretraining,
    PretrainOptions,
    Streams,
    save_rounded,
    write_log,
)
from spikegpt_lora.pretrain.perplexity import next_token_loss, perplexity

TOKENS = np.random.default_rng(0).integers(0, 20, 1000).astype(np.uint16)


class Signs:
    """A tokenizer whose sentences end at token 1, and documents at 0."""

    eos_token_id = 0

    def __call__(self, texts):
        return {"input_ids": [[1]] * len(texts)}


def pretraining(steps=12, tokens=TOKENS, n_layer=2, **changes):
    torch.manual_seed(0)
    model = SpikeGPTForCausalLM(SpikeGPTConfig(vocab_size=20, n_embd=8, n_layer=n_layer, dropout=0.2))
    options = {"batch_size": 3, "length": 7, "warmup": 2, "learning_rate": 1e-2} | changes
    return Pretraining(model, tokens, PretrainOptions(steps=steps, **options), Signs())


def weights(run):
    return {name: p.detach().clone() for name, p in run.trained.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("pairs", [0, 2])
def test_a_killed_run_goes_on_with_the_same_curve_and_ends_with_the_same_weights(tmp_path, monkeypatch, pairs):
    monkeypatch.setattr("spikegpt_lora.pretrain.loop.LOG_EVERY", 3)
    whole = pretraining(pairs=pairs)
    curve = list(whole.train(tmp_path / "whole"))
    killed = pretraining(pairs=pairs).train(tmp_path / "killed", save_seconds=0)
    first = [next(killed) for _ in range(5)]  # saved before each next step: the fifth is lost with the process
    killed.close()
    again = pretraining(pairs=pairs)
    assert again.resume(tmp_path / "killed")
    assert again.step == 4 and first == curve[:5]
    assert list(again.train(tmp_path / "killed")) == curve[4:]
    assert same(weights(again), weights(whole))
    assert len(whole.log) == 4 and [row[:-1] for row in again.log] == [row[:-1] for row in whole.log]


def test_a_longer_run_goes_on_from_before_the_decay_of_a_shorter_one(tmp_path):
    list(pretraining(10).train(tmp_path))
    longer = pretraining(20)
    assert longer.resume(tmp_path) and longer.step == 8
    curve = list(longer.train(tmp_path))
    assert curve == list(pretraining(20).train(tmp_path / "whole"))[8:]


def test_a_finished_run_has_nothing_to_do(tmp_path):
    list(pretraining().train(tmp_path))
    again = pretraining()
    assert again.resume(tmp_path) and list(again.train(tmp_path)) == []


def test_a_new_directory_starts_from_the_beginning(tmp_path):
    run = pretraining()
    assert not run.resume(tmp_path) and run.step == 0


def test_a_run_of_other_settings_is_not_mixed_in(tmp_path):
    list(pretraining().train(tmp_path))
    with pytest.raises(ValueError, match=r"batch_size was 3, is 2; seed was 0, is 1"):
        pretraining(batch_size=2, seed=1).resume(tmp_path)
    with pytest.raises(ValueError, match="tokens was"):
        pretraining(tokens=TOKENS[::-1]).resume(tmp_path)
    with pytest.raises(ValueError, match="n_layer was 2, is 3"):
        pretraining(n_layer=3).resume(tmp_path)


def test_a_longer_run_is_not_thrown_away_for_a_shorter_one(tmp_path):
    list(pretraining(12).train(tmp_path))
    with pytest.raises(ValueError, match="a run of 12 steps, 12 of them done: ask for at least as many"):
        pretraining(11).resume(tmp_path)


def test_a_run_that_decayed_too_early_is_not_gone_on_from(tmp_path):
    list(pretraining(12).train(tmp_path))
    (tmp_path / "stable.safetensors").unlink()
    with pytest.raises(ValueError, match="whose decay begins before"):
        pretraining(20).resume(tmp_path)


def test_what_a_killed_save_left_is_no_run(tmp_path):
    (tmp_path / ".training-abc.safetensors").write_bytes(b"half")
    run = pretraining()
    assert not run.resume(tmp_path)
    list(run.train(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stable.safetensors", "training.safetensors"]


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "training.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"training\.safetensors is no whole file of a training run"):
        pretraining().resume(tmp_path)


def test_options_out_of_range_are_listed_together():
    with pytest.raises(ValueError, match=r"steps must be >= 1, got 0; warmup must be >= 1, got -1"):
        PretrainOptions(steps=0, warmup=-1)


def test_what_is_saved_holds_weights_moments_state_and_generator(tmp_path):
    list(pretraining().train(tmp_path))
    names = load_file(tmp_path / "training.safetensors").keys()
    assert {"model.spikegpt.emb.weight", "optimizer.0.exp_avg", "state.wkv", "rng"} <= set(names)


def test_the_rate_warms_up_stays_and_decays():
    options = PretrainOptions(steps=100, warmup=10, decay=0.2, learning_rate=1.0)
    rates = [options.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:81] == [1.0] * 71 and options.decay_start == 80
    assert rates[80:] == pytest.approx([(100 - i) / 20 for i in range(80, 100)])


def test_streams_go_on_from_step_to_step_and_read_everything_once_an_epoch():
    tokens = np.arange(100, dtype=np.uint16)
    streams = Streams(tokens, batch_size=4, length=6, seed=3)
    batches = [streams[step] for step in range(streams.per_epoch)]
    for before, after in zip(batches, batches[1:]):
        assert torch.equal(before[:, -1], after[:, 0])
    read = torch.cat([ids[:, :-1] for ids in batches], dim=1)
    assert len(read.unique()) == read.numel() == 4 * (100 // 4 - 1) // 6 * 6
    assert not torch.equal(streams[0], streams[streams.per_epoch])


def test_several_texts_are_read_side_by_side_by_streams_of_their_own():
    texts = [(np.full(200, 3, np.uint16), 1), (np.full(300, 7, np.uint16), 2)]
    run = pretraining(tokens=texts)
    assert [row.unique().tolist() for row in run.batch(5)] == [[3], [7], [7]]


def test_the_streams_of_all_texts_are_the_batch():
    with pytest.raises(ValueError, match="read by 3 streams in all, got 4"):
        pretraining(tokens=[(TOKENS, 2), (TOKENS, 2)])


def test_a_run_of_other_shares_of_the_texts_is_refused(tmp_path):
    texts = [TOKENS[:400], TOKENS[400:]]
    list(pretraining(2, tokens=list(zip(texts, (1, 2)))).train(tmp_path))
    with pytest.raises(ValueError, match="holds a run of other settings .tokens was"):
        pretraining(2, tokens=list(zip(texts, (2, 1)))).resume(tmp_path)


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="3 streams of 7 tokens need 24 tokens, got 23"):
        pretraining(tokens=TOKENS[:23])


def test_the_state_goes_on_inside_an_epoch_but_no_gradient_does(tmp_path):
    run = pretraining(3)
    states = [run.state for _ in run.train(tmp_path)]
    assert all(not tensor.requires_grad for state in states for tensor in state.to_tuple())
    assert not torch.equal(states[0].att_shift, states[1].att_shift)


def test_the_loss_of_a_stretch_depends_on_the_state_before_it(lm, ids):
    _, state = next_token_loss(lm, ids, None, bf16=False)
    carried, rested = (next_token_loss(lm, ids, before, bf16=False)[0] for before in (state, None))
    assert carried != rested


def test_it_learns_what_is_there_to_learn(tmp_path):
    run = pretraining(150, np.tile(np.arange(5, dtype=np.uint16), 100))
    losses = list(run.train(tmp_path))
    assert losses[0] == pytest.approx(math.log(20), abs=0.5) and losses[-1] < 0.5


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = pretraining()
    run.model.head.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"loss \[nan\], gradient norm nan at step 0"):
        list(run.train(tmp_path))


def test_perplexity_is_that_of_the_summed_loss():
    run = pretraining()
    tokens = np.tile(TOKENS, 64)  # so that each of the 64 streams reads the same 1000 tokens
    measured = perplexity(run.model, tokens, {"tokens": 64000, "words": 32000, "characters": 128000})
    ids = torch.from_numpy(TOKENS.astype(np.int64))[None]
    nats = next_token_loss(run.model.eval(), ids, None, bf16=False)[0].item()
    assert measured["nats_per_token"] == pytest.approx(nats, rel=1e-6)
    assert measured["token_perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)
    assert measured["word_perplexity"] == pytest.approx(math.exp(2 * nats), rel=1e-5)
    assert measured["bits_per_character"] == pytest.approx(nats / 2 / math.log(2), rel=1e-5)


def test_the_rounded_model_is_half_the_size_and_loads_in_float32_as_it_was_measured(tmp_path):
    model = pretraining().model.eval()
    rounded = save_rounded(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["head.weight"].dtype == torch.bfloat16
    assert loaded.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), rounded.parameters(), strict=True))
    assert all(torch.allclose(a, b, rtol=2**-8) for a, b in zip(model.parameters(), rounded.parameters(), strict=True))


def test_rounding_changes_no_spike_of_the_embedding(tmp_path):
    model = pretraining().model
    model.spikegpt.emb.weight.data[3, :2] = torch.tensor([-1e-45, 0.0])  # rounded to -0, the first would fire
    save_rounded(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.spikegpt.emb.weight >= 0, model.spikegpt.emb.weight >= 0)


def test_the_curve_is_written_as_csv(tmp_path):
    write_log([[50, 5.25, 12.3], [100, 4.0, 24.0]], tmp_path / "loss.csv")
    assert (tmp_path / "loss.csv").read_text() == "step,loss,seconds\n50,5.2500,12\n100,4.0000,24\n"
