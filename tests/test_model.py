"""SpikeGPT's equations, state, mask, generation, and life inside transformers.

In float64 different ways to the same result agree to rounding. In float32 rounding can flip a spike, so there the tests
allow sentences that differ, and demand that their first flip happened at the threshold.
"""

import math

import pytest
import torch
from helpers import DESIGNS, SIZES, largest_difference, lively
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)

from spikegpt_lora import (
    SpikeGPTConfig,
    SpikeGPTForCausalLM,
    SpikeGPTForSequenceClassification,
    SpikeGPTModel,
    record_spikes,
)
from spikegpt_lora.neurons.lif import LIF
from spikegpt_lora.pretrain.tokenizer import train_tokenizer


@pytest.fixture(params=DESIGNS)
def design(request):
    return request.param


def by_equations(model, ids):
    """Logits and spikes for one sentence, written from the paper's equations: one token and one vector at a time."""
    weights = {name.removeprefix("spikegpt."): tensor for name, tensor in model.state_dict().items()}

    def layer_norm(x, name):
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def mixed(new, old, name):
        share = weights[name].flatten()
        return share * new + (1 - share) * old

    def fire(membrane, current):
        membrane = membrane + (current - membrane) / 2
        spikes = (membrane >= 1).double()
        return spikes, membrane * (1 - spikes)

    L, zero = model.config.n_layer, torch.zeros(model.config.n_embd, dtype=torch.float64)
    att_x, ffn_x, lif1, lif2 = ([zero] * L for _ in range(4))
    past = [[] for _ in range(L)]  # (k, v) of every token so far
    logits, spikes = [], []
    for token in ids.tolist():
        x = layer_norm((weights["emb.weight"][token] >= 0).double(), "blocks.0.ln0")
        for i in range(L):
            att, ffn = f"blocks.{i}.att", f"blocks.{i}.ffn"
            new = layer_norm(x, f"blocks.{i}.ln1")
            k, v, r = (
                weights[f"{att}.{name}.weight"] @ mixed(new, att_x[i], f"{att}.time_mix_{name[0]}")
                for name in ("key", "value", "receptance")
            )
            w, u = torch.exp(weights[f"{att}.time_decay"]), weights[f"{att}.time_first"]
            share = [torch.exp(-(len(past[i]) - 1 - n) * w + old_k) for n, (old_k, _) in enumerate(past[i])]
            share.append(torch.exp(u + k))
            values = [old_v for _, old_v in past[i]] + [v]
            y = sum(s * value for s, value in zip(share, values)) / sum(share)
            past[i].append((k, v))
            s1, lif1[i] = fire(lif1[i], weights[f"{att}.output.weight"] @ (torch.sigmoid(r) * y))
            att_x[i], x = new, x + s1
            new = layer_norm(x, f"blocks.{i}.ln2")
            k = weights[f"{ffn}.key.weight"] @ mixed(new, ffn_x[i], f"{ffn}.time_mix_k")
            r = weights[f"{ffn}.receptance.weight"] @ mixed(new, ffn_x[i], f"{ffn}.time_mix_r")
            s2, lif2[i] = fire(lif2[i], torch.sigmoid(r) * (weights[f"{ffn}.value.weight"] @ k.clamp(min=0) ** 2))
            ffn_x[i], x = new, x + s2
            spikes.append((s1, s2))
        logits.append(weights["head.weight"] @ layer_norm(x, "ln_out"))
    return torch.stack(logits), spikes


@pytest.mark.parametrize("design", ["published"])
def test_logits_and_spikes_follow_the_equations(lm, ids):
    logits, spikes = by_equations(lm, ids[0])
    trace = record_spikes(lm, {"input_ids": ids[:1]})
    ours = [
        (trace.spikes[f"blocks.{i}.lif1"][0, t], trace.spikes[f"blocks.{i}.lif2"][0, t])
        for t in range(ids.shape[1])
        for i in range(lm.config.n_layer)
    ]
    assert largest_difference(lm(ids[:1]).logits[0], logits) < 1e-12
    for expected, got in zip(spikes, ours, strict=True):
        assert all((e.numpy() == g).all() for e, g in zip(expected, got))
    for population in trace.spikes:
        assert 0.02 < trace.firing_rate(population) < 0.98  # the comparison saw both values


@pytest.mark.parametrize("cuts", [[1] * 9, [4, 5], [1, 7, 1]], ids=["tokens", "halves", "uneven"])
def test_any_chunks_equal_the_whole(lm, ids, cuts):
    whole = lm(ids, use_cache=True)
    state, logits = None, []
    for chunk in ids.split(cuts, dim=1):
        output = lm(chunk, state=state, use_cache=True)
        state = output.state
        logits.append(output.logits)
    assert largest_difference(torch.cat(logits, 1), whole.logits) < 1e-12
    assert largest_difference(state.to_tuple(), whole.state.to_tuple()) < 1e-12


def padded(ids, lengths, side):
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(ids.shape[1] - length, None)] = 1
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_logits_nor_state(lm, ids, side):
    lengths = [9, 5, 1, 7]
    batch, mask = padded(ids, lengths, side)
    output = lm(batch, attention_mask=mask, use_cache=True)
    for row in range(4):
        alone = lm(batch[row][mask[row].bool()][None], use_cache=True)
        assert largest_difference(output.logits[row][mask[row].bool()], alone.logits[0]) < 1e-12
        assert largest_difference(output.state.select([row]).to_tuple(), alone.state.to_tuple()) < 1e-12


@pytest.mark.parametrize("pooling", ["last", "mean", "last_mean"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_classification(ids, side, pooling):
    model = lively(SpikeGPTForSequenceClassification(SpikeGPTConfig(**SIZES, pooling=pooling)))
    batch, mask = padded(ids, [9, 5, 1, 7], side)
    logits = model(batch, attention_mask=mask).logits
    for row in range(4):
        assert largest_difference(logits[row], model(batch[row][mask[row].bool()][None]).logits[0]) < 1e-12


def test_what_stands_in_the_padding_does_not_matter(lm, ids):
    batch, mask = padded(ids, [9, 5, 1, 7], "left")
    other = torch.where(mask.bool(), batch, 30)
    real = mask.bool()
    assert torch.equal(lm(batch, attention_mask=mask).logits[real], lm(other, attention_mask=mask).logits[real])


def test_padding_gets_no_gradient(lm, ids):
    batch, mask = padded(ids, [9, 5, 1, 7], "left")
    embeds = lm.get_input_embeddings()(batch).detach().requires_grad_()
    lm(inputs_embeds=embeds, attention_mask=mask).logits[mask.bool()].sum().backward()
    real = mask.bool()
    assert torch.equal(embeds.grad[~real], torch.zeros_like(embeds.grad[~real])) and (embeds.grad[real] != 0).any()


def test_float32_padding_flips_spikes_only_at_the_threshold():
    model = lively(SpikeGPTForSequenceClassification(SpikeGPTConfig(vocab_size=64, n_embd=48, n_layer=3))).float()
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 64, (48, 24), generator=generator)
    lengths = torch.randint(5, 25, (48,), generator=generator).tolist()
    batches = [padded(ids.clone(), lengths, "right")]
    moved = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        moved[row, 24 - n :] = ids[row, :n]
    batches.append((moved, (torch.arange(24) >= 24 - torch.tensor(lengths)[:, None]).long()))
    traces, logits = [], []
    for batch, mask in batches:
        traces.append(record_spikes(model, {"input_ids": batch, "attention_mask": mask}))
        logits.append(model(batch, attention_mask=mask).logits)
    names = [name for name in traces[0].spikes if name != "emb"]
    differing = {
        row for name in names for row in (traces[0].spikes[name] != traces[1].spikes[name]).any((1, 2)).nonzero()[0]
    }
    same = [row for row in range(48) if row not in differing]
    assert len(differing) <= 5, f"{len(differing)} of 48 sentences differ"
    assert largest_difference(logits[0][same], logits[1][same]) < 1e-4
    for row in differing:
        assert distance_of_first_flip(model, ids[row, : lengths[row]], traces, names, row) < 1e-5


def distance_of_first_flip(model, ids, traces, names, row):
    """|membrane - threshold| in float64 at the earliest (token, layer) where two traces of a sentence differ."""
    flips = [
        (*index, name)
        for name in names
        for index in zip(*(traces[0].spikes[name][row] != traces[1].spikes[name][row]).nonzero())
    ]
    t, neuron, name = min(flips, key=lambda flip: (flip[0], names.index(flip[2])))
    currents = []
    handle = model.get_submodule(f"spikegpt.{name}").register_forward_hook(
        lambda m, inputs, out: currents.append(inputs[0])
    )
    model(ids[None])
    handle.remove()
    v = 0.0
    for x in currents[0][0, : t + 1, neuron].double().tolist():
        h = v + (x - v) / 2
        v = 0.0 if h >= 1 else h
    return abs(h - 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sentences_loss_is_the_same_on_whichever_side_it_is_padded(lm, ids, side):
    batch, mask = padded(ids[1:2], [5], side)
    alone = batch[mask.bool()][None]
    loss = lm(batch, attention_mask=mask, labels=batch.masked_fill(mask == 0, -100)).loss
    assert abs(loss - lm(alone, labels=alone).loss) < 1e-6


def test_masks_may_have_holes(lm, ids):
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) < 0.6
    output = lm(ids, attention_mask=mask, use_cache=True)
    for row in range(4):
        alone = lm(ids[row][mask[row]][None], use_cache=True)
        size = max(1, alone.state.ffn_shift.abs().max())
        assert largest_difference(output.logits[row][mask[row]], alone.logits[0]) < 1e-12
        assert largest_difference(output.state.select([row]).to_tuple(), alone.state.to_tuple()) < 1e-12 * size


def test_no_state_survives_an_exception(lm, ids):
    before = lm(ids).logits

    def explode(*_):
        raise RuntimeError("stopped half-way")

    handle = lm.spikegpt.blocks[1].ffn.register_forward_hook(explode)
    with pytest.raises(RuntimeError, match="half-way"):
        lm(ids)
    handle.remove()
    assert torch.equal(lm(ids).logits, before)
    assert not any(hasattr(module, "v") for module in lm.modules() if isinstance(module, LIF))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "exactly one of"),
        ({"input_ids": torch.zeros(2, 0).long()}, "at least one token"),
        ({"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 4)}, r"must be \(2, 3\), got \(2, 4\)"),
    ],
)
def test_wrong_input_is_named(lm, arguments, message):
    with pytest.raises(ValueError, match=message):
        lm(**arguments)


def test_a_state_of_another_batch_or_depth_is_refused(lm, ids):
    state = lm(ids, use_cache=True).state
    with pytest.raises(ValueError, match=r"\(2, 3\), got \(4, 3\)"):
        lm(ids[:2], state=state)
    deeper = SpikeGPTForCausalLM(SpikeGPTConfig(**(SIZES | {"n_layer": 4})))(ids, use_cache=True).state
    with pytest.raises(ValueError, match=r"\(4, 3\), got \(4, 4\)"):
        lm(ids, state=deeper)


def test_generate_returns_several_sequences_and_hidden_states(lm, ids):
    torch.manual_seed(0)
    result = lm.generate(
        ids, do_sample=True, num_return_sequences=3, max_new_tokens=4, pad_token_id=0,
        return_dict_in_generate=True, output_hidden_states=True,
    )  # fmt: skip
    assert result.sequences.shape == (12, 13) and len(result.hidden_states) == 4
    assert result.hidden_states[1][0].shape == (12, 1, 12)


def test_generate_from_inputs_embeds(lm, ids):
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    embeds = lm.get_input_embeddings()(ids)
    assert torch.equal(lm.generate(inputs_embeds=embeds, **settings), lm.generate(ids, **settings)[:, 9:])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("rows", [1, 4])
def test_generate_with_the_state_equals_full_recompute(lm, ids, rows, beams):
    prompt, mask = padded(ids[:rows], [9, 5, 1, 7][:rows], "left")
    settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    cached = lm.generate(prompt, attention_mask=mask, **settings)
    assert torch.equal(cached, lm.generate(prompt, attention_mask=mask, use_cache=False, **settings))
    for row in range(rows):
        alone = lm.generate(prompt[row][mask[row].bool()][None], **settings)
        assert torch.equal(alone[0, -12:], cached[row, -12:])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_goes_on_from_a_state(lm, ids, beams, use_cache):
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "use_cache": use_cache}
    state = lm(ids[:, :4], use_cache=True).state
    assert torch.equal(lm.generate(ids[:, 4:], state=state, **settings)[:, 5:], lm.generate(ids, **settings)[:, 9:])


@pytest.mark.parametrize(
    "auto, cls",
    [
        (AutoModel, SpikeGPTModel),
        (AutoModelForCausalLM, SpikeGPTForCausalLM),
        (AutoModelForSequenceClassification, SpikeGPTForSequenceClassification),
    ],
)
def test_auto_classes_load_what_was_saved(auto, cls, ids, tmp_path):
    model = lively(cls(SpikeGPTConfig(**SIZES)))
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is cls
    assert torch.equal(loaded(ids)[0], model(ids)[0])


INITIAL = SpikeGPTConfig(vocab_size=37, n_embd=12, n_layer=3)
PARAMETERS = [name for name, _ in SpikeGPTForCausalLM(INITIAL).named_parameters()] + ["score.weight"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_missing_from_the_file_gets_its_documented_initial_value(name, tmp_path):
    cls = SpikeGPTForSequenceClassification if name == "score.weight" else SpikeGPTForCausalLM
    model = lively(cls(INITIAL)).float()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = cls.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())
    check_initial_value(name.removeprefix("spikegpt."), loaded[name])


def check_initial_value(name, value):
    """The table in SpikeGPTPreTrainedModel._init_weights, for 3 layers of width 12."""
    C, channel = 12, torch.arange(12.0)
    layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
    h, i, l, m = channel / (C - 1), channel / C, layer / 2, 1 - layer / 3
    exact = {
        "time_decay": -5 + 8 * h ** (0.7 + 1.3 * l),
        "time_first": math.log(0.3) + torch.tensor([0.0, 0.5, -0.5] * 4),
        "att.time_mix_k": i**m,
        "att.time_mix_v": i**m + 0.3 * l,
        "att.time_mix_r": i ** (m / 2),
        "ffn.time_mix_k": i**m,
        "ffn.time_mix_r": i**m,
    }
    gains = {"emb.weight": 1e-4 * math.sqrt(37), "att.value.weight": 1.0, "ffn.key.weight": 2.0}
    gains["head.weight"] = 0.5 * math.sqrt(37 / 12)
    for ending, expected in exact.items():
        if name.endswith(ending):
            return torch.testing.assert_close(value.flatten(), expected)
    for ending, gain in gains.items():
        if name.endswith(ending):
            return torch.testing.assert_close(value.T @ value, gain**2 * torch.eye(C), atol=1e-5 * gain**2, rtol=1e-4)
    if name == "score.weight":
        return torch.testing.assert_close(value.std().item(), 0.02, atol=0.008, rtol=0)
    assert torch.equal(value, torch.full_like(value, float("ln" in name and name.endswith("weight"))))


@pytest.mark.parametrize("sizes", [{"n_layer": 1}, {"n_embd": 1}, {"n_layer": 1, "n_embd": 1}], ids=str)
def test_the_smallest_models_are_finite(sizes, ids):
    model = SpikeGPTForCausalLM(SpikeGPTConfig(**(SIZES | sizes)))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(torch.isfinite(p).all() and torch.isfinite(p.grad).all() for p in model.parameters())


def test_bfloat16_models_can_be_made_and_run(ids):
    model = AutoModelForCausalLM.from_config(SpikeGPTConfig(**SIZES), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and torch.isfinite(model(ids).logits).all()


def test_inputs_embeds_equal_input_ids(lm, ids):
    assert torch.equal(lm(inputs_embeds=lm.get_input_embeddings()(ids)).logits, lm(ids).logits)


def test_labels_are_shifted_and_minus_100_is_ignored(lm, ids):
    labels = ids.clone()
    labels[:, 5:] = -100
    output = lm(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :4].flatten(0, 1).float(), ids[:, 1:5].flatten())
    assert abs(output.loss - expected) < 1e-6


def test_the_state_is_returned_by_default_only_when_a_language_model_reads(lm, classifier, ids):
    assert lm(ids).state is not None
    assert lm.train()(ids).state is None
    assert classifier(ids).state is None
    assert classifier(ids, use_cache=True).state is not None


def test_tuples_instead_of_outputs(lm, ids):
    logits, state = lm(ids, return_dict=False)
    assert torch.equal(logits, lm(ids).logits) and state.wkv.shape == (4, 3, 3, 12)


def test_hidden_states_are_one_more_than_the_layers(lm, ids):
    output = lm(ids, output_hidden_states=True)
    assert [tuple(x.shape) for x in output.hidden_states] == [(4, 9, 12)] * 4
    assert largest_difference(lm.head(output.hidden_states[-1]), output.logits) < 1e-12


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_gradient_checkpointing_changes_no_gradient(classifier, ids, adapters):
    model = classifier if not adapters else get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS")).double()
    batch, mask = padded(ids, [9, 5, 1, 7], "right")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        torch.manual_seed(0)
        model(batch, attention_mask=mask, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_trainer_trains_evaluates_and_predicts(classifier, ids, tmp_path):
    rows = [{"input_ids": row[:n].tolist(), "labels": n % 2} for row, n in zip(ids, [9, 5, 1, 7])]
    tokenizer = train_tokenizer(["a b c"], 20)
    before = classifier.score.weight.clone()
    trainer = Trainer(
        model=classifier.float(),
        args=TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    assert not torch.equal(classifier.score.weight, before)
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(rows).predictions.shape == (4, 2)


def test_a_causal_language_model_is_evaluated_without_gathering_its_state(lm, ids, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(
        model=lm.float(), args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    )
    assert trainer.predict(rows).predictions.shape == (4, 9, 37)


def test_pipeline_classifies_text(classifier):
    tokenizer = train_tokenizer(["a good film", "a bad film"], 30)
    classifier.config.id2label = {0: "objective", 1: "subjective"}
    classify = pipeline("text-classification", model=classifier, tokenizer=tokenizer, batch_size=2)
    together = classify(["a good film", "bad"])
    alone = classify("bad")[0]
    assert {answer["label"] for answer in together} <= {"objective", "subjective"}
    assert together[1]["label"] == alone["label"] and abs(together[1]["score"] - alone["score"]) < 1e-9


def test_a_language_model_becomes_a_classifier_on_the_same_weights(lm, ids):
    classifier = SpikeGPTForSequenceClassification.from_language_model(lm, num_labels=3, pooling="mean")
    for ours, theirs in zip(classifier.spikegpt.parameters(), lm.spikegpt.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr() and ours.requires_grad
    assert classifier(ids).logits.shape == (4, 3) and classifier.dtype == torch.float64 and not classifier.training
    assert 0.005 < classifier.score.weight.std() < 0.05
    assert classifier.config.pooling == "mean" and lm.config.pooling == "last"


def test_changes_to_its_configuration_reach_the_classifiers_modules(lm):
    classifier = SpikeGPTForSequenceClassification.from_language_model(lm, dropout=0.5, lif_tau=4.0)
    block = classifier.spikegpt.blocks[2]
    assert (block.dropout.p, block.lif1.tau) == (0.5, 4.0) and lm.spikegpt.blocks[2].lif1.tau == 2.0
    with pytest.raises(RuntimeError, match="blocks.2"):
        SpikeGPTForSequenceClassification.from_language_model(lm, n_layer=2)


def test_tied_embeddings_are_saved_once(ids, tmp_path):
    model = lively(SpikeGPTForCausalLM(SpikeGPTConfig(**SIZES, tie_word_embeddings=True)))
    assert model.head.weight is model.spikegpt.emb.weight
    model.save_pretrained(tmp_path)
    loaded = SpikeGPTForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.head.weight is loaded.spikegpt.emb.weight and torch.equal(loaded(ids).logits, model(ids).logits)
