"""Levels given to salient channels: scores against their definitions, equal cost, and what is refused."""

import pytest
import torch
from helpers import SIZES, lively

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM, SpikeGPTForSequenceClassification
from spikegpt_lora.convert.calibrate import calibrate
from spikegpt_lora.convert.saliency import SCORES, binary_neurons, give_levels, neurons, saliency, spread
from spikegpt_lora.convert.spiking import prepare


def prepared(K=2, kind=SpikeGPTForCausalLM):
    torch.manual_seed(0)
    return prepare(lively(kind(SpikeGPTConfig(**SIZES))), K)


def text(rows=8, length=16):
    return torch.randint(SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(0))


def silent_inputs(model, ids):
    """x before every matrix, `(N, C)`, and the matrix, by the name of the neurons; from hooks on the linear layers."""
    found, handles = {}, []
    for name, _ in neurons(model):
        linear = model.get_submodule(name.replace("spike_", ""))

        def keep(_, args, kwargs, name=name, linear=linear):
            found[name] = (args[0] * kwargs["scale"]).flatten(0, -2), linear.weight

        handles.append(linear.register_forward_pre_hook(keep, with_kwargs=True))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


def test_output_and_magnitude_are_what_they_are_called():
    model, ids = prepared(), text()
    read = silent_inputs(model, ids)
    output, magnitude = (saliency(model, ids, score) for score in ("output", "magnitude"))
    assert output.keys() == magnitude.keys() == read.keys() == dict(neurons(model)).keys()
    for name, (x, weight) in read.items():
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad((x @ weight.T).square().sum() / 2, x)
        assert torch.allclose(output[name], (x * grad).abs().mean(0))
        assert torch.allclose(magnitude[name], x.abs().amax(0))


def test_the_gradient_is_that_of_the_loss_with_respect_to_a_factor_on_each_channel():
    """dL/d(factor) is the sum of x dL/dx over the tokens; of two tokens the loss is the first one's alone."""
    model, ids = prepared(), text(1, 2)
    found, worth = saliency(model, ids, "gradient"), []
    assert all(p.grad is None for p in model.parameters())
    for name, neuron in neurons(model):
        factor = torch.ones(len(neuron.most), dtype=torch.float64, requires_grad=True)
        handle = neuron.register_forward_hook(lambda _, args, u, factor=factor: u * factor)
        (expected,) = torch.autograd.grad(model(ids, labels=ids).loss, factor)
        handle.remove()
        assert torch.allclose(found[name], expected.abs()), name
        worth.append(expected.any())
    assert sum(worth) == len(worth) - 3  # one token has nothing to be weighed against: no key of WKV matters


@pytest.mark.parametrize("score", SCORES)
def test_every_score_costs_the_same_and_leaves_a_model_that_can_be_calibrated(score):
    model, ids = prepared(3), text(64, 64)
    before = binary_neurons(model)
    assert before == sum(len(n.most) * 3 * (2 if n.signed else 1) for _, n in neurons(model))
    calibrate(give_levels(model, ids, score, share=0.25, factor=2), ids)
    assert binary_neurons(model) == before * 5 // 4
    reached = {name: (model.get_submodule(name).most).unique().tolist() for name, _ in neurons(model)}
    expected = [3, 4] if score == "uniform" else [3, 6]
    assert all(most == expected for most in reached.values())


def test_spread_is_even_and_loses_nothing():
    assert spread(3, 7).sum() == 3 and spread(3, 7).max() == 1 and spread(17, 5).sum() == 17
    assert spread(17, 5).max() - spread(17, 5).min() == 1


def test_another_seed_draws_other_channels():
    drawn = [give_levels(prepared(), text(), "random", seed=seed).state_dict() for seed in (0, 0, 1)]
    names = [name for name in drawn[0] if name.endswith(".most")]
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in names)
    assert not all(torch.equal(drawn[0][name], drawn[2][name]) for name in names)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"score": "hessian"}, "score must be one of output, gradient, magnitude, random, uniform, got 'hessian'"),
        ({"share": 0.0}, r"share must be in \(0, 1\], got 0.0"),
        ({"factor": 0}, "factor must be >= 1, got 0"),
        ({"factor": 64}, "64 x 2 levels are more than 127"),
    ],
)
def test_wrong_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        give_levels(prepared(), text(), **values)


def test_a_classifier_has_no_gradient_but_every_other_score():
    with pytest.raises(ValueError, match="the gradient is a language model's"):
        give_levels(prepared(kind=SpikeGPTForSequenceClassification), text(), "gradient")
    give_levels(prepared(kind=SpikeGPTForSequenceClassification), text(), "output")
