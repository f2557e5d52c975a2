"""Integer spikes: kernel and reference, and the reference against finite differences where there are any."""

import pytest
import torch
from helpers import need_extension

from spikegpt_lora.neurons.multilevel import IntegerSpikes
from spikegpt_lora.ops.integer_spikes import integer_spikes

KINDS = [(True, False), (False, False), (False, True)]  # signed, squared
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
kinds = pytest.mark.parametrize("signed, squared", KINDS, ids=["signed", "one-sided", "squared"])


def inputs(dtype, shape, device="cpu"):
    """x, some of it exactly between two levels; log_scale and most, each channel its own."""
    generator, wide = torch.Generator().manual_seed(0), torch.promote_types(dtype, torch.float32)
    log_scale = torch.randn(shape[-1], generator=generator, dtype=torch.float64).mul(0.4).to(wide)
    log_scale[::3] = 0
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    x = torch.where(torch.rand(shape, generator=generator) < 0.2, torch.floor(x) + 0.5, x).to(dtype)
    most = torch.randint(1, 6, shape[-1:], generator=generator).to(wide)
    return [t.to(device) for t in (x, log_scale, most)]


def results(backend, dtype, shape, signed, squared, device="cpu"):
    x, log_scale, most = inputs(dtype, shape, device)
    leaves = [x.requires_grad_(), log_scale.requires_grad_()]
    spikes = integer_spikes(*leaves, most, signed, squared, backend=backend)
    weight = torch.linspace(-1, 2, spikes.numel()).view(shape).to(spikes)
    return spikes.detach(), torch.autograd.grad(spikes, leaves, weight)


@kinds
@pytest.mark.parametrize("shape", [(1,), (5, 3), (3, 33, 17), (2, 9, 130), (2, 2, 3, 600), (0, 4, 3)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_kernel_is_the_reference_bit_for_bit_and_in_every_gradient(dtype, shape, signed, squared):
    need_extension()
    (ours, our_gradients), (theirs, their_gradients) = (
        results(backend, dtype, shape, signed, squared) for backend in ("extension", "reference")
    )
    assert ours.dtype == dtype and torch.equal(ours, theirs)
    assert all(a.dtype == b.dtype for a, b in zip(our_gradients, their_gradients))
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(our_gradients, their_gradients, rtol=tolerance, atol=tolerance * max(1, shape[0]))


@pytest.mark.gpu
@kinds
def test_the_cuda_kernel_equals_the_cpus(signed, squared):
    need_extension("cuda")
    (ours, our_gradients), (theirs, their_gradients) = (
        results("extension", torch.float32, (3, 33, 17), signed, squared, device) for device in ("cuda", "cpu")
    )
    assert torch.equal(ours.cpu(), theirs)
    torch.testing.assert_close([g.cpu() for g in our_gradients], list(their_gradients), rtol=1e-5, atol=1e-5)


@kinds
def test_it_fires_its_kth_spike_at_k_minus_a_half_and_at_most_K(signed, squared, backend):
    u = torch.arange(-4, 4, 0.25, dtype=torch.float64)[:, None]
    spikes = integer_spikes(u, torch.zeros(1).double(), torch.tensor([3.0]).double(), signed, squared)
    expected = [max(-3 if signed else 0, min(3, int((u + 0.5).floor()))) for u in u.flatten()]
    assert spikes.flatten().tolist() == [k * k if squared else k for k in expected]


@pytest.mark.parametrize("signed", [True, False])
def test_inside_the_range_gradients_are_finite_differences_of_what_is_not_rounded_and_beyond_it_of_the_spikes(
    signed, backend
):
    x, log_scale, most = inputs(torch.float64, (7, 5))
    neuron = IntegerSpikes(5, 1, signed=signed).double()
    with torch.no_grad():
        neuron.log_scale.copy_(log_scale), neuron.most.copy_(most)
    for log_scale_moves in (False, True):
        leaf = neuron.log_scale if log_scale_moves else x.requires_grad_()
        neuron.silent = False
        weight = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view(x.shape)
        (gradient,) = torch.autograd.grad(neuron(x), leaf, weight)
        u = x.detach() / neuron.log_scale.detach().exp()
        inside = (u >= (-most if signed else 0 * most) - 0.5) & (u < most + 0.5)
        differences = torch.zeros_like(weight)
        for silent, where in ((True, inside), (False, ~inside)):
            neuron.silent, slopes = silent, []
            for sign in (1, -1):
                with torch.no_grad():
                    leaf += sign * 1e-6
                    k = neuron(x) if not silent else x / neuron.log_scale.exp()
                    leaf -= sign * 1e-6
                slopes.append(k)
            differences = torch.where(where, (slopes[0] - slopes[1]) / 2e-6, differences)
        expected = (differences * weight).sum(0) if log_scale_moves else differences * weight
        torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-7)


def test_with_the_scale_in_the_matrix_the_scales_gradient_is_that_of_a_learned_step_size(backend):
    x, log_scale, most = inputs(torch.float64, (7, 5))
    log_scale.requires_grad_()
    q = integer_spikes(x, log_scale, most, True, False)
    (gradient,) = torch.autograd.grad((q * log_scale.exp()).sum(), log_scale)
    u, s = x / log_scale.detach().exp(), log_scale.detach().exp()
    inside = (u >= -most - 0.5) & (u < most + 0.5)
    torch.testing.assert_close(gradient, (s * torch.where(inside, q.detach() - u, q.detach())).sum(0))


@kinds
def test_nan_and_what_is_too_large_come_through_as_in_torch(signed, squared):
    need_extension()
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e30, -0.0])[:, None]
    ours, theirs = (
        integer_spikes(x, torch.zeros(1), torch.full((1,), 3.0), signed, squared, backend=backend)
        for backend in ("extension", "reference")
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
