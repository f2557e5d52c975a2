"""prepare: the same model with silent neurons before every matrix. calibrate: scales fitted to a text, and awake."""

import pytest
import torch
from helpers import SIZES, adapted, lively, padded_batch
from peft import LoraConfig
from torch import nn

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM, SpikeGPTForSequenceClassification, SpikeGPTModel
from spikegpt_lora.convert.calibrate import FLOOR, calibrate, centre, fit_scale
from spikegpt_lora.convert.generation import pack_weights
from spikegpt_lora.convert.spiking import PARTS, integer_embedding, prepare, use_powers_of_two, wake
from spikegpt_lora.neurons.multilevel import IntegerSpikes
from spikegpt_lora.neurons.residual import IntegerNorm

CLASSES = [SpikeGPTForCausalLM, SpikeGPTForSequenceClassification]


def made(kind=SpikeGPTForCausalLM, **config):
    """A lively model whose tokens all have the same number of spikes: ln0's mean and deviation are those of each."""
    torch.manual_seed(0)
    model = lively(kind(SpikeGPTConfig(**SIZES, **config)))
    with torch.no_grad():
        weight = model.spikegpt.emb.weight
        half = weight.argsort(dim=1).argsort(dim=1) >= SIZES["n_embd"] // 2
        weight.copy_(torch.where(half, weight.abs() + 0.1, -weight.abs() - 0.1))
    return model


def text(rows=64, length=64):
    return torch.randint(SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def inputs_of_matrices(model, batch):
    """What every nn.Linear is called with, by name."""
    found, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            keep = lambda _, args, name=name: found.update({name: args[0]})  # noqa: E731
            handles.append(module.register_forward_pre_hook(keep))
    logits(model, batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("pooling", ["last", "mean", "last_mean"])
def test_a_prepared_model_gives_the_float_models_logits(kind, pooling):
    model, batch = made(kind, pooling=pooling), padded_batch([9, 4, 6])
    real = batch["attention_mask"].bool() if kind is SpikeGPTForCausalLM else slice(None)
    prepared = prepare(model)
    assert type(prepared) is kind and prepared.config.matrix_spikes == "integer"
    assert (logits(prepared, batch) - logits(model, batch))[real].abs().max() < 1e-9


def test_where_tokens_spike_unequally_the_embedding_is_a_norm_of_the_mean_deviation():
    model = lively(SpikeGPTForCausalLM(SpikeGPTConfig(**SIZES)))
    ids, spikes = text(), (model.spikegpt.emb.weight >= 0).double()
    often = torch.bincount(ids.flatten(), minlength=len(spikes)).double()[:, None] / ids.numel()
    mu = (often * spikes.mean(1, keepdim=True)).sum()
    sigma = (often * (spikes.var(1, correction=0, keepdim=True) + 1e-5).sqrt()).sum()
    ln0 = model.spikegpt.blocks[0].ln0
    a, o = integer_embedding(model.spikegpt, ids)
    expected = ln0.weight * (spikes - mu) / sigma + ln0.bias
    assert torch.allclose(spikes * a + o, expected)


def test_nothing_is_changed_in_the_model_or_shared_with_it():
    model = made()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in prepare(model).parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tied_embeddings_stay_tied():
    prepared = prepare(made(tie_word_embeddings=True))
    assert prepared.head.weight is prepared.spikegpt.emb.weight


def test_ffn_has_levels_of_its_own():
    found = prepare(made(), 3, ffn_levels=5).named_modules()
    most = {name: set(m.most.tolist()) for name, m in found if isinstance(m, IntegerSpikes)}
    assert {name.endswith("ffn.spike_value") for name, k in most.items() if k == {5}} == {True}
    assert {name.endswith("ffn.spike_value") for name, k in most.items() if k == {3}} == {False}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_matrix_of_a_calibrated_model_reads_integers_within_its_levels(kind):
    model = calibrate(prepare(made(kind, pooling="last_mean"), 2), text())
    read = inputs_of_matrices(model, {"input_ids": text(3, 9)})
    assert len(read) == 7 * SIZES["n_layer"] + 1
    for name, x in read.items():
        assert torch.equal(x, x.round()), name
        assert x.unique().numel() > 1, name


def test_a_calibrated_model_comes_back_from_its_folder(tmp_path):
    model = calibrate(prepare(made(), 2, ffn_levels=3, wkv_powers_of_two=True), text()).float()
    model.save_pretrained(tmp_path)
    again, batch = SpikeGPTForCausalLM.from_pretrained(tmp_path), padded_batch([5, 7])
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_more_levels_are_nearer_to_the_float_model():
    model, batch = made(), {"input_ids": text(8, 32)}
    exact = logits(model, batch)
    wrong = [(logits(calibrate(prepare(model, K), text()), batch) - exact).square().mean() for K in (1, 3, 15, 127)]
    assert wrong == sorted(wrong, reverse=True)


@pytest.mark.parametrize("sequential", [True, False])
def test_scales_are_fitted_to_what_each_neuron_is_given(sequential):
    model = prepare(made(), 3)
    before = {name: p.clone() for name, p in model.named_parameters() if "log_scale" in name}
    calibrate(model, text(), sequential)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if "log_scale" in name)
    assert not any(module.silent for module in model.modules() if hasattr(module, "silent"))


@pytest.mark.parametrize("signed, squared", [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("most", [1, 3, 7])
def test_no_other_scale_is_much_better(signed, squared, most):
    x = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 1.0, 3.0, 40.0])
    x = x.sign() * x.abs() ** 1.5
    levels = torch.full((4,), float(most))

    def left(s):
        k = torch.clamp(torch.floor(x / s + 0.5), -levels if signed else 0 * levels, levels)
        wanted = x.relu() if not signed else x
        return ((wanted**2 - (s * k) ** 2) if squared else (wanted - s * k)).square().mean(0)

    rms = x.square().mean(0).sqrt()
    everywhere = torch.stack([left(rms * m / most) for m in torch.linspace(0.1, 60, 3000)]).amin(0)
    found = left(fit_scale(x, levels, signed, squared))
    floored = fit_scale(x, levels, signed, squared) > FLOOR * fit_scale(x, levels, signed, squared).median() * 1.0001
    assert floored.sum() >= 2 and (found <= 1.02 * everywhere + 1e-12)[floored].all()


def test_rare_channels_do_not_get_a_step_near_0():
    x = torch.randn(5000, 9, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 0
    x[7, 0] = 1e-4  # once in 5,000 tokens
    x[:, 1] = 0
    s = fit_scale(x, torch.full((9,), 3.0), signed=False, squared=True)
    assert torch.allclose(s[:2], FLOOR * s[[0, 2, 3, 4, 5, 6, 7, 8]].median().expand(2), rtol=0.2)
    assert torch.equal(fit_scale(x * 0, torch.full((9,), 3.0)), torch.ones(9))


def test_centring_changes_no_logits_and_makes_more_inputs_0():
    model, batch = calibrate(prepare(made()), text()), {"input_ids": text(4, 32)}
    centred, centres = logits(model, batch), [m.centre.clone() for m in model.modules() if isinstance(m, IntegerNorm)]
    share = (inputs_of_matrices(model, batch)["head"] == 0).double().mean()
    for module in model.modules():
        if isinstance(module, IntegerNorm):
            module.centre.zero_()
    assert any(c.any() for c in centres) and (logits(model, batch) - centred).abs().max() < 1e-9
    assert share > (inputs_of_matrices(model, batch)["head"] == 0).double().mean()


def test_a_model_whose_matrices_read_the_residual_itself_is_centred_too():
    model = lively(SpikeGPTForCausalLM(SpikeGPTConfig(**SIZES, matrix_spikes="integer", token_shift="rows")))
    batch = {"input_ids": text(4, 32)}
    for module in model.modules():
        if isinstance(module, IntegerNorm):
            module.centre.zero_()
    plain, before = logits(model, batch), inputs_of_matrices(model, batch)
    after = inputs_of_matrices(centre(model, text()), batch)
    assert (logits(model, batch) - plain).abs().max() < 1e-9
    nonzero = [sum((x != 0).double().mean() for name, x in read.items() if "att.key" in name or "ffn.key" in name)
               for read in (before, after)]  # fmt: skip
    assert nonzero[1] < nonzero[0] and all(torch.equal(x, x.round()) for x in after.values())


def test_calibrating_again_moves_no_offset_and_no_amplitude():
    model = calibrate(prepare(made()), text())
    names = [name for name in model.state_dict() if name.endswith(("offset", "amplitude"))]
    once = {name: model.state_dict()[name].clone() for name in names}
    calibrate(model, text())
    assert len(names) == 2 * SIZES["n_layer"] + 2
    assert all(torch.equal(model.state_dict()[name], once[name]) for name in names)


def test_parts_wake_by_themselves_and_are_all_neurons():
    model = prepare(made())
    every = {name for name, m in model.named_modules() if hasattr(m, "silent")}
    woken = [
        {name for name, m in wake(model, [part]).named_modules() if not getattr(m, "silent", True)} for part in PARTS
    ]
    assert set().union(*woken) == every and sum(map(len, woken)) == len(every) == 1 + 7 * SIZES["n_layer"]


def test_powers_of_two_are_switched_in_wkv():
    model, batch = prepare(made()), padded_batch([9])
    plain = logits(model, batch)
    rounded = logits(use_powers_of_two(model), batch)
    assert not torch.equal(plain, rounded) and torch.equal(logits(use_powers_of_two(model, False), batch), plain)
    assert torch.equal(rounded, logits(prepare(made(), wkv_powers_of_two=True), batch))


@pytest.mark.parametrize(
    "model, message",
    [
        (
            lambda: adapted(made(SpikeGPTForSequenceClassification), LoraConfig(target_modules=["key"])),
            "adapt the result",
        ),
        (lambda: adapted(made(), LoraConfig(target_modules=["key"])).base_model.model, "convert, then adapt"),
        (lambda: prepare(made()), "read integer spikes already"),
        (lambda: pack_weights(made().float(), "int8"), "before its weights are packed"),
        (lambda: SpikeGPTModel(SpikeGPTConfig(**SIZES)), "got a SpikeGPTModel"),
        (lambda: nn.Linear(2, 2), "got a Linear"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(model, message):
    with pytest.raises(ValueError, match=message):
        prepare(model())


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match=r"spike_levels must be in 1 \.\.\. 127, got 0"):
        prepare(made(), 0)
    with pytest.raises(ValueError, match=r"spike_levels must be in 1 \.\.\. 127, got 128"):
        prepare(made(), 3, ffn_levels=128)
    with pytest.raises(ValueError, match="4,096 tokens or more, got 64"):
        calibrate(prepare(made()), text(1))
    with pytest.raises(ValueError, match="real numbers: prepare"):
        calibrate(made(), text())
