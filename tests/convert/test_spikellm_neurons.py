"""Integer spikes before a linear layer: the code of multi-step spikes, silence, salient channels, integer weights."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spikegpt_lora.convert.int_weights import Clipping, round_to_grid
from spikegpt_lora.convert.salient_channels import SCORES, salient, scores_of
from spikegpt_lora.convert.spiking_linear import SpikingLinear, spike_steps
from spikegpt_lora.convert.transformers_models import STEPS, Spiking, put_neurons
from spikegpt_lora.neurons.multilevel import IntegerSpikes

C, OUT = 12, 5


def tokens(*shape, seed=0):
    return torch.randn(*shape, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear(kind=nn.Linear):
    torch.manual_seed(1)
    module = nn.Linear(C, OUT) if kind is nn.Linear else Conv1D(OUT, C)
    with torch.no_grad():
        module.bias.normal_()
    return module.double()


def spiking_linear(x, kind=nn.Linear, **settings):
    model = nn.ModuleDict({"one": linear(kind)})
    return put_neurons(model, {"one": x.flatten(0, -2).float()}, Spiking(**settings))["one"]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_every_code_is_the_sum_of_its_spikes(bits, steps):
    """All codes of all bit widths, the highest of them too: those of one-sided neurons, and signed ones."""
    most = 2**bits - 1
    codes = torch.arange(-most * steps, most * steps + 1)
    spikes = spike_steps(codes, most, steps)
    assert spikes.shape == (steps, len(codes)) and spikes.abs().max() == most
    assert torch.equal(spikes.sum(0), codes) and not (spikes * codes < 0).any()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("times", [1, 2, 4])
@pytest.mark.parametrize("zero_point", [False, True])
def test_every_code_that_a_neuron_can_send_decodes_to_itself(bits, times, zero_point):
    """A token that holds each code of a salient channel once is sent as those codes, which decode to the token: no code
    is lost at the top, and no zero point is taken off that was not added."""
    base = 2**bits - 1 if zero_point else 2 ** (bits - 1) - 1
    z = base * times // 3 if zero_point else 0
    codes = torch.arange(0 if zero_point else -base * times, base * times + 1).double()
    neuron = IntegerSpikes(len(codes), 1, signed=not zero_point).double()
    with torch.no_grad():
        neuron.most.fill_(base * times)
        neuron.log_scale.fill_(1 / times).log_()
    identity = nn.Linear(len(codes), len(codes), bias=False).double()
    nn.init.eye_(identity.weight)
    module = SpikingLinear(identity, neuron, base, zero_point=zero_point).double()
    x = 0.37 / times * (codes - z)
    sent = module.spikes(x)[0]
    assert torch.equal(sent, codes)
    assert torch.equal(spike_steps(sent, base, module.steps).sum(0), codes) and module.steps == times
    torch.testing.assert_close(module(x), x)


def test_an_integer_that_the_steps_cannot_reach_is_refused():
    with pytest.raises(ValueError, match="2 spikes of at most 15 reach 30, got 31"):
        spike_steps(torch.tensor([31]), 15, 2)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("zero_point", [False, True])
def test_more_spikes_come_to_the_layer(kind, steps, zero_point):
    x = tokens(2, 9)
    same = {"levels": 256 if zero_point else 255, "steps": steps, "zero_point": zero_point, "share": 1.0}
    errors = [
        (spiking_linear(x, kind, times=times, **same)(x) - linear(kind)(x)).abs().mean().item() for times in (1, 16)
    ]
    assert errors[0] < 0.02 and errors[1] < errors[0] / 10


@pytest.mark.parametrize("steps", STEPS)
def test_silent_neurons_are_the_layer_exactly(steps):
    x = tokens(2, 9)
    module = spiking_linear(x, levels=7, steps=steps, share=0.25, times=2)
    module.neuron.silent = True
    torch.testing.assert_close(module(x), linear()(x))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("zero_point", [False, True])
def test_the_matrix_reads_integers_alone_and_one_by_one_gives_the_same(steps, zero_point):
    x, seen = tokens(2, 9), []
    module = spiking_linear(x, levels=7, steps=steps, zero_point=zero_point, share=0.25, times=4)
    module.linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    whole = module(x)
    torch.testing.assert_close(module.one_by_one(x), whole)
    assert len(seen) == 1 + module.steps == 5 and all(torch.equal(q, q.round()) for q in seen)
    assert max(q.abs().max() for q in seen[1:]) == module.base


def test_a_token_of_zeros_fires_nothing_and_gives_the_bias():
    module = spiking_linear(tokens(2, 9), levels=15)
    x = torch.zeros(1, C, dtype=torch.float64)
    assert torch.equal(module(x), module.bias[None])


def test_what_is_never_negative_gets_all_its_levels_on_one_side():
    module = spiking_linear(tokens(2, 9).relu(), levels=15)
    assert module.neuron.levels == tuple(range(15)) and module.base == 14


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("zero_point", [False, True])
def test_salient_channels_err_less_and_the_others_as_before(steps, zero_point):
    x = tokens(4, 64)
    plain, better = (
        spiking_linear(x, levels=16 if zero_point else 15, steps=steps, zero_point=zero_point, share=share, times=4,
                       score="magnitude")
        for share in (0.0, 0.25)
    )  # fmt: skip
    chosen = better.neuron.most > better.base

    def error(module):
        module.linear.weight = nn.Parameter(torch.eye(C, dtype=torch.float64))
        module.bias = None
        return (module(x) - x).square().mean((0, 1))

    assert chosen.sum() == 3 and (error(better)[chosen] < error(plain)[chosen] / (1 if steps == "tensor" else 4)).all()
    if steps != "tensor":  # there a better fit of all moves the one step
        torch.testing.assert_close(error(better)[~chosen], error(plain)[~chosen])


def test_static_steps_of_channels_are_powers_of_two_of_one_another():
    x = tokens(4, 64) * torch.logspace(-2, 2, C, dtype=torch.float64)
    module = spiking_linear(x, levels=7, steps="channel", share=0.25, times=2)
    exponents = (module.neuron.scale / module.neuron.scale[0]).log2()
    torch.testing.assert_close(exponents, exponents.round(), atol=1e-6, rtol=0)
    assert len(exponents.round().unique()) > 3


def test_a_channel_that_calibration_has_not_seen_keeps_a_step():
    x = tokens(4, 64)
    x[..., 3] = 0
    scale = spiking_linear(x, levels=7, steps="channel").neuron.scale
    assert scale[3] > scale.median() / 8


def test_scores_choose_what_they_say():
    x = tokens(64).float()
    x[:, 2] *= 10
    weight = torch.zeros(OUT, C)
    weight[:, 4] = 1  # the only channel that the layer reads
    weight[0, 5] = -1  # read with channel 4, against it
    of = {score: scores_of(x, weight, score, torch.Generator().manual_seed(0)) for score in SCORES}
    assert of["magnitude"].argmax() == 2 and of["absolute"].argmax() == of["first-order"].argmax() == 4
    torch.testing.assert_close(of["first-order"].sum(), (x @ weight.T).square().sum(1).mean())
    assert (of["absolute"] >= of["first-order"].abs()).all() and of["random"].unique().numel() == C
    with pytest.raises(ValueError, match="score must be one of first-order, .*, got 'large'"):
        scores_of(x, weight, "large")


def test_a_share_of_the_channels_is_salient():
    assert salient(torch.tensor([3.0, 1.0, 4.0, 2.0]), 0.5).tolist() == [True, False, True, False]
    assert salient(torch.zeros(30), 0.1).sum() == 3 and salient(torch.zeros(5), 0.01).sum() == 1
    assert not salient(torch.zeros(5), 0.0).any()


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_integer_weights_are_the_nearest_on_a_grid_of_as_many_levels(bits, zero_point):
    weight = tokens(OUT) + 0.3
    rounded = round_to_grid(weight, bits, zero_point)
    for row, exact in zip(rounded, weight):
        values = row.unique()
        step = (exact.max().clamp(min=0) - exact.min().clamp(max=0)) / (2**bits - 1)
        step = step if zero_point else exact.abs().max() / (2 ** (bits - 1) - 1)
        assert len(values) <= 2**bits and (row - exact).abs().max() <= step / 2 * (2 if zero_point else 1) + 1e-12
        torch.testing.assert_close((values / step).round() * step, values)


def test_a_row_of_zeros_stays_one_and_other_bits_are_refused():
    assert not round_to_grid(torch.zeros(2, 3), 4).any() and not round_to_grid(torch.zeros(2, 3), 4, True).any()
    with pytest.raises(ValueError, match="2 to 8 bits, got 16"):
        round_to_grid(torch.zeros(2, 3), 16)


@pytest.mark.parametrize("zero_point", [False, True])
def test_clipping_has_a_gradient_that_finds_the_better_grid(zero_point):
    """A row with one outlier: its ends come in, and the error gets smaller."""
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 8
    clipping = Clipping(4, 4, zero_point)
    optimizer = torch.optim.Adam(clipping.parameters(), lr=0.1)
    errors = []
    for _ in range(60):
        error = (clipping(weight) - weight).square().sum()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.95 * errors[0] and clipping.upper.max() < 3.5


REFUSED = [
    ({"levels": 16}, "odd without a zero point, got 16"),
    ({"levels": 7, "steps": "word"}, "steps must be one of token, tensor, channel, got 'word'"),
    ({"levels": 7, "share": 2.0}, "share must be in 0 ... 1 and times >= 1, got 2.0 and 1"),
]


@pytest.mark.parametrize("settings, message", REFUSED)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Spiking(**settings)
