"""Dropout: the share, the scale, the gradient's mask, seeds; and that the kernel's hash looks random."""

import pytest
import torch
from helpers import need_extension

from spikegpt_lora.ops.backend import default_backend
from spikegpt_lora.ops.dropout import Dropout

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("p", [0.03, 0.5, 0.9])
def test_the_share_p_is_zero_and_the_rest_divided_by_1_minus_p(p):
    torch.manual_seed(0)
    kept = Dropout(p)(torch.ones(1000, 300))
    assert abs((kept == 0).float().mean().item() - p) < 0.005
    assert torch.allclose(kept[kept != 0], torch.tensor(1 / (1 - p)))


def test_the_gradient_is_dropped_where_the_value_was():
    x = torch.ones(7, 130).requires_grad_()
    y = Dropout(0.4)(x)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, y.detach())


def test_evaluation_and_p_0_change_nothing():
    x = torch.randn(3, 5)
    assert Dropout(0.4).eval()(x) is x and Dropout(0.0)(x) is x


def test_p_1_drops_everything():
    assert not Dropout(1.0)(torch.ones(3, 5)).any()


def test_torchs_seed_decides_and_no_two_calls_are_alike():
    x, dropout = torch.ones(40, 40), Dropout(0.5)
    torch.manual_seed(3)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropout(x), first) and not torch.equal(first, second)


def test_neighbours_rows_and_successive_calls_are_uncorrelated(backend):
    torch.manual_seed(0)
    dropout = Dropout(0.5)
    draws = torch.stack([dropout(torch.ones(256, 256)) - 1 for _ in range(8)]).double()  # -1 or 1
    for a, b in ((draws[:, :, 1:], draws[:, :, :-1]), (draws[:, 1:], draws[:, :-1]), (draws[1:], draws[:-1])):
        assert abs((a * b).mean().item()) < 5 / a.numel() ** 0.5
    assert abs(draws.mean().item()) < 5 / draws.numel() ** 0.5
    assert draws.mean(dim=(0, 1)).abs().max() < 6 / (8 * 256) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_mask_does_not_depend_on_the_dtype(dtype):
    need_extension()
    with default_backend("extension"):
        results = []
        for x in (torch.ones(3, 77), torch.ones(3, 77, dtype=dtype)):
            torch.manual_seed(1)
            results.append(Dropout(0.5)(x).float())
    assert torch.equal(*results)
