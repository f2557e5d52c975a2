"""The clock: the matrix products that a call makes are noted, all of them, and made again without what is added."""

import pytest
import torch
from torch.nn import functional as F

from spikegpt_lora.utils.timing import Disagreement, Recorder, agree, compare


def recorded(function):
    with Recorder() as recorder:
        function()
    recorder.replay()()
    return [(product.__name__, [tuple(shape) for shape, *_ in factors]) for product, factors in recorder.calls]


x, w, b, v = torch.randn(3, 4), torch.randn(5, 4), torch.randn(3, 5), torch.randn(4)


@pytest.mark.parametrize(
    "function",
    [
        lambda: x @ w.T,
        lambda: torch.mm(x, w.T, out=torch.empty(3, 5)),
        lambda: torch.addmm(b, x, w.T),
        lambda: torch.addmm(b, x, w.T, beta=0.5, alpha=2.0, out=torch.empty(3, 5)),
        lambda: b.clone().addmm_(x, w.T, alpha=2.0),
        lambda: F.linear(x, w, b[0]),
    ],
    ids=["mm", "mm.out", "addmm", "addmm.out", "addmm_", "linear with bias"],
)
def test_a_product_is_noted_by_its_factors_whatever_it_is_added_to(function):
    assert recorded(function) == [("mm", [(3, 4), (4, 5)])]


def test_products_of_vectors_and_of_batches_are_noted():
    two = torch.randn(2, 3, 4)
    assert recorded(lambda: b[:, 0].clone().addmv_(x, v)) == [("mv", [(3, 4), (4,)])]
    assert recorded(lambda: two @ two.mT) == [("bmm", [(2, 3, 4), (2, 4, 3)])]
    assert recorded(lambda: torch.baddbmm(torch.zeros(3), two, two.mT)) == [("bmm", [(2, 3, 4), (2, 4, 3)])]


def test_under_inference_mode_they_are_noted_too():
    with torch.inference_mode():
        assert recorded(lambda: F.linear(x, w, b[0])) == [("linear", [(3, 4), (5, 4)])]
        assert recorded(lambda: x @ v) == [("matmul", [(3, 4), (4,)])]


def test_products_of_the_backward_are_noted():
    weight = w.clone().requires_grad_()
    assert recorded(lambda: F.linear(x, weight).sum().backward()) == [
        ("mm", [(3, 4), (4, 5)]),
        ("mm", [(5, 3), (3, 4)]),
    ]


def test_they_are_made_again_on_inputs_of_the_same_strides_and_type():
    with Recorder() as recorder:
        x.bfloat16() @ w.bfloat16().T
    again = Recorder()
    with again:
        recorder.replay()()
    assert again.calls == recorder.calls


def test_ratios_are_to_the_first_row():
    rows = compare("a group", {"one": lambda: torch.randn(10), "other": lambda: torch.randn(100_000)}, 3)
    assert [row["what"] for row in rows] == ["one", "other"]
    assert rows[0]["ratio"] == 1.0 and rows[1]["ratio"] > 1.0


def test_results_that_differ_are_a_disagreement():
    agree("a sum", {"one": lambda: [x], "other": lambda: [x * (1 + 1e-7)]}, 1e-6)
    with pytest.raises(Disagreement, match="a sum: tensor 0 of 'one' and 'other' differ by"):
        agree("a sum", {"one": lambda: [x], "other": lambda: [x * (1 + 1e-5)]}, 1e-6)
    with pytest.raises(Disagreement):
        agree("a sum", {"one": lambda: [x], "other": lambda: [x * torch.nan]}, 1e-6)
