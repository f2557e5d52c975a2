"""Every kernel against its reference: values, states and every gradient; and as torch's operator: opcheck, compile.

Needs a C++ compiler; the tests marked gpu need a CUDA device and nvcc, and compare CUDA with the CPU's kernels.
"""

from dataclasses import fields

import pytest
import torch
from helpers import NEURONS, current, need_extension, wkv_inputs

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForSequenceClassification
from spikegpt_lora.neurons.lif import LIF, NeuronParameters
from spikegpt_lora.ops.backend import default_backend
from spikegpt_lora.ops.dropout import Dropout
from spikegpt_lora.ops.wkv import wkv, wkv_reference

TOLERANCES = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
}


def wkv_results(backend, dtype, device, shape, k_scale, with_state, with_mask):
    """y, state, and the gradient of every input for one random gradient of y and state."""
    state_dtype = torch.promote_types(dtype, torch.float32)
    time_decay, time_first, k, v = wkv_inputs(*shape, k_scale=k_scale)
    B, T, C = shape
    leaves = [time_decay.to(state_dtype), time_first.to(state_dtype), k.to(dtype), v.to(dtype)]
    if with_state:
        leaves.append(wkv_reference(time_decay, time_first, k.flip(1), v.flip(1))[1].to(state_dtype))
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.7 if with_mask else None
    leaves = [x.to(device).requires_grad_() for x in leaves]
    y, state = wkv(*leaves[:4], *leaves[4:] or [None], None if mask is None else mask.to(device), backend=backend)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (y, state)]
    return [y, state, *torch.autograd.grad([y, state], leaves, weights)]


WKV_CASES = {
    "dtype": list(TOLERANCES),
    "shape": [(1, 1, 1), (1, 1, 70), (2, 7, 3), (3, 33, 17), (2, 9, 130)],
    "with_state": [False, True],
    "with_mask": [False, True],
}


def wkv_cases(function):
    for name, values in WKV_CASES.items():
        function = pytest.mark.parametrize(name, values, ids=str)(function)
    return function


@wkv_cases
def test_wkv_equals_the_reference_in_values_states_and_every_gradient(dtype, shape, with_state, with_mask):
    need_extension()
    ours = wkv_results("extension", dtype, "cpu", shape, 1.0, with_state, with_mask)
    theirs = wkv_results("reference", dtype, "cpu", shape, 1.0, with_state, with_mask)
    torch.testing.assert_close(ours, theirs, **TOLERANCES[dtype])


@pytest.mark.gpu
@wkv_cases
def test_wkv_on_cuda_equals_the_cpus(dtype, shape, with_state, with_mask):
    need_extension("cuda")
    ours = [x.cpu() for x in wkv_results("extension", dtype, "cuda", shape, 1.0, with_state, with_mask)]
    theirs = wkv_results("extension", dtype, "cpu", shape, 1.0, with_state, with_mask)
    torch.testing.assert_close(ours, theirs, **TOLERANCES[dtype])


@pytest.mark.parametrize("k_scale", [20.0, 80.0])
def test_wkv_equals_the_reference_where_k_is_large(k_scale):
    need_extension()
    ours = wkv_results("extension", torch.float64, "cpu", (2, 31, 9), k_scale, True, True)
    theirs = wkv_results("reference", torch.float64, "cpu", (2, 31, 9), k_scale, True, True)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_wkv_of_a_long_sequence_has_no_limit():
    need_extension()
    time_decay, time_first, k, v = (x.float().requires_grad_() for x in wkv_inputs(1, 8192, 5))
    y, state = wkv(time_decay, time_first, k, v)
    first, carried = wkv(time_decay, time_first, k[:, :5000], v[:, :5000])
    second, carried = wkv(time_decay, time_first, k[:, 5000:], v[:, 5000:], carried)
    assert torch.equal(torch.cat([first, second], 1), y) and torch.equal(carried, state)
    whole = torch.autograd.grad(y.sum(), (time_decay, k, v))
    in_parts = torch.autograd.grad(first.sum() + second.sum(), (time_decay, k, v))
    torch.testing.assert_close(in_parts, whole, rtol=1e-3, atol=1e-3)


def test_the_number_of_threads_changes_nothing():
    need_extension()
    threads, shape = torch.get_num_threads(), (5, 64, 200)
    many = wkv_results("extension", torch.float32, "cpu", shape, 1.0, True, True)
    try:
        torch.set_num_threads(1)
        one = wkv_results("extension", torch.float32, "cpu", shape, 1.0, True, True)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(many, one))


def lif_results(backend, x, membrane, mask, settings):
    """Spikes, membrane, and the gradients of x and of the membrane that came in."""
    x, membrane = x.detach().requires_grad_(), membrane.detach().requires_grad_()
    with default_backend(backend):
        spikes, after = LIF(**settings).step(x, membrane, mask)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in (spikes, after)]
    return [spikes, after, *torch.autograd.grad([spikes, after], [x, membrane], weights)]


LIF_CASES = {
    "settings": NEURONS,
    "dtype": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    "shape": [(1, 1, 1), (1, 1, 70), (3, 33, 17), (2, 9, 130)],
}


def lif_cases(function):
    for name, values in LIF_CASES.items():
        function = pytest.mark.parametrize(name, values, ids=str)(function)
    return function


def lif_inputs(dtype, shape):
    B, T, C = shape
    membrane = current(B, C, dtype=torch.promote_types(dtype, torch.float32), scale=0.4)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.7
    return current(*shape, dtype=torch.float32).to(dtype), membrane, mask


def assert_equal_spikes_and_near_gradients(ours, theirs, dtype):
    half = dtype in (torch.bfloat16, torch.float16)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1:], theirs[1:], rtol=2e-2 if half else 1e-4, atol=1e-2 if half else 1e-5)


@pytest.mark.parametrize("name", ["lif", "lif_backward"])
def test_the_settings_of_the_schemas_are_the_neurons_in_its_order(name):
    need_extension()
    names = [argument.name for argument in getattr(torch.ops.spikegpt_lora, name).default._schema.arguments]
    assert names[3:9] == [field.name for field in fields(NeuronParameters)]


@lif_cases
def test_lif_equals_spikingjelly_in_spikes_membrane_and_gradients(settings, dtype, shape):
    need_extension()
    inputs = lif_inputs(dtype, shape)
    ours, theirs = (lif_results(backend, *inputs, settings) for backend in ("extension", "reference"))
    assert_equal_spikes_and_near_gradients(ours, theirs, dtype)


@pytest.mark.gpu
@lif_cases
def test_lif_on_cuda_equals_the_cpus(settings, dtype, shape):
    need_extension("cuda")
    inputs = lif_inputs(dtype, shape)
    ours = [y.cpu() for y in lif_results("extension", *(x.cuda() for x in inputs), settings)]
    assert_equal_spikes_and_near_gradients(ours, lif_results("extension", *inputs, settings), dtype)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", [(d, d) for d in LIF_CASES["dtype"]] + [(torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("shape", LIF_CASES["shape"], ids=str)
@pytest.mark.parametrize("settings", NEURONS, ids=str)
def test_spikes_added_in_one_pass_are_the_neurons_own_bit_for_bit_and_in_every_gradient(settings, shape, dtypes, p):
    """Against the neuron, the addition and dropout one after the other, which is what happens where a hook looks on."""
    need_extension()
    x, membrane, mask = lif_inputs(dtypes[0], shape)
    residual, dropout, results = current(*shape, dtype=torch.float32, scale=0.7).to(dtypes[1]), Dropout(p), []
    for lif in (LIF(**settings), LIF(**settings)):
        if results:
            lif.register_forward_hook(lambda module, given, output: None)
        leaves = [t.detach().requires_grad_() for t in (residual, x, membrane)]
        torch.manual_seed(4)
        out, after = lif.add(*leaves, mask, dropout)
        weights = [torch.linspace(-1, 2, y.numel()).view(y.shape).to(y) for y in (out, after)]
        results.append([out, after, *torch.autograd.grad([out, after], leaves, weights)])
    assert results[0][0].dtype == dtypes[1]
    assert all(torch.equal(*pair) for pair in zip(*(r[:3] for r in results)))
    half = dtypes[0] in (torch.bfloat16, torch.float16)  # there the sum of both ways' gradients is rounded
    torch.testing.assert_close(*(r[3:] for r in results), **TOLERANCES[dtypes[0]] if half else {"rtol": 0, "atol": 0})


def operator_calls():
    """Each operator with arguments that require gradients, state and mask included."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).requires_grad_()

    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
    x, y, wide, last, state, w, u, share = (
        draw(2, 4, 3),
        draw(2, 4, 3),
        draw(2, 4, 5),
        draw(2, 3),
        draw(2, 3, 3),
        *(draw(3) for _ in range(3)),
    )
    yield "wkv", (w, u, x, y, state, mask)
    yield "wkv", (w, u, x, y, None, None)
    yield "lif", (x, last, mask, 2.0, 1.0, 0.0, True, 2.0, False)
    yield "lif", (x, None, None, 3.0, 0.5, None, False, 2.0, True)
    yield "lif_add", (y, x, last, mask, 2.0, 1.0, 0.0, True, 2.0, False, torch.tensor([7]), 0.3)
    yield "lif_add", (y, x, None, None, 3.0, 0.5, None, False, 2.0, True, None, 0.0)
    yield "token_shift2", (x, None, None, 0.0, last, mask, w, u, None)
    yield "token_shift3", (x, share, w, 1e-5, None, None, w, u, share, None)
    yield "sigmoid_gate", (x, y)
    yield "squared_relu", (wide,)
    yield "integer_spikes", (x, w, torch.tensor([1.0, 2.0, 3.0]), True, False)
    yield "integer_spikes", (wide, draw(5), torch.ones(5), False, True)
    yield "dropout", (wide, torch.tensor([7]), 0.3)
    yield "adapter_in", (x, draw(2, 3))
    yield "adapter_out", (x, draw(5, 3), draw(5), draw(2, 4, 2), draw(5, 2), 0.7)
    without = [t.detach() for t in (draw(2, 4, 3), draw(5, 3), draw(3, 5), draw(2, 4), draw(2, 4), draw(2, 4, 2))]
    spikes, scaled, vectors, mean, rstd, passed = without
    read = (spikes, scaled, vectors, x, draw(5, 3), mean, rstd)
    yield "integer_read", (*read, None, None, None, 1.0, None, None, None)
    yield "integer_read", (*read, passed, draw(2, 4, 2), draw(5, 2), 0.7, draw(5), draw(2, 5), mask)
    yield "integer_rows", (wide.detach(), mean, rstd, vectors, draw(5).detach(), None, None)


@pytest.mark.parametrize("number", range(18))
def test_opcheck(number):
    need_extension()
    name, arguments = list(operator_calls())[number]
    torch.library.opcheck(getattr(torch.ops.spikegpt_lora, name).default, arguments)


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("wkv", {2: torch.zeros(2, 3)}, r"k must be \(B, T, C\) with T >= 1, got \(2, 3\)"),
        ("wkv", {2: torch.zeros(2, 4, 3).long()}, "k must be floating point, got Long"),
        ("wkv", {3: torch.zeros(2, 4, 5)}, r"v must be \(2, 4, 3\) for input \(2, 4, 3\), got \(2, 4, 5\)"),
        ("wkv", {3: torch.zeros(2, 4, 3).double()}, "v must be Float for Float input, got Double"),
        ("wkv", {5: torch.zeros(2, 4)}, "mask must be Bool"),
        ("lif", {1: torch.zeros(3)}, r"membrane must be \(2, 3\)"),
        ("token_shift2", {6: torch.zeros(4)}, r"share must be \(3,\)"),
        ("sigmoid_gate", {1: torch.zeros(2, 4)}, r"y must be \(2, 4, 3\)"),
        ("integer_spikes", {2: torch.ones(4)}, r"most must be \(5,\)"),
        ("integer_rows", {3: torch.zeros(2, 5)}, r"vectors must be \(3, 5\)"),
    ],
)
def test_an_operator_names_what_does_not_fit_before_it_reads_it(name, arguments, message):
    need_extension()
    given = [x.detach() if isinstance(x, torch.Tensor) else x for x in dict(operator_calls())[name]]
    for i, value in arguments.items():
        given[i] = value
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.spikegpt_lora, name)(*given)


def test_a_whole_model_compiles_without_a_graph_break():
    need_extension()
    config = SpikeGPTConfig(vocab_size=11, n_embd=8, n_layer=2, dropout=0.0, pad_token_id=0)
    torch.manual_seed(0)
    model = SpikeGPTForSequenceClassification(config)
    ids, mask = torch.randint(1, 11, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.tensor([0, 1])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        loss = run(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*results)


def test_autocast_keeps_states_in_float32_and_outputs_in_its_dtype():
    need_extension()
    lif = LIF()
    with torch.autocast("cpu", torch.bfloat16):
        k = torch.nn.functional.linear(torch.ones(1, 4, 3), torch.eye(3))
        y, state = wkv(torch.zeros(3), torch.zeros(3), k, k)
        spikes, membrane = lif.step(k)
    assert k.dtype == y.dtype == spikes.dtype == torch.bfloat16
    assert state.dtype == membrane.dtype == torch.float32


@pytest.mark.parametrize("number", range(12))
def test_a_second_derivative_is_refused_not_wrong(number):
    need_extension()
    name, arguments = list(operator_calls())[number]
    tensors = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    first = tensors[name == "lif_add"]  # what it adds to is no argument of a kernel's gradient
    result = getattr(torch.ops.spikegpt_lora, name)(*arguments)
    loss = (result[0] if isinstance(result, tuple) else result).square().sum()
    (gradient,) = torch.autograd.grad(loss, first, create_graph=True)
    with pytest.raises(RuntimeError, match="is not implemented"):
        gradient.sum().backward()
