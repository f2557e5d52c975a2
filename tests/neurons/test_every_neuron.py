"""What holds of every neuron of the package: token by token, at once, in the kernel, in numpy and from a file it is the
same neuron. A new one needs one line in NEURONS."""

import copy
import importlib
import json
import pkgutil
from itertools import product

import numpy as np
import pytest
import torch
from helpers import NEURONS as SETTINGS
from helpers import current, largest_difference, need_extension

import spikegpt_lora
from spikegpt_lora.adapters import SpikeGate
from spikegpt_lora.export.interpreter import Program
from spikegpt_lora.neurons.embedding import EmbeddingSpike
from spikegpt_lora.neurons.lif import LIF
from spikegpt_lora.neurons.multilevel import IntegerSpikes
from spikegpt_lora.neurons.neuron import Neuron, neurons_of
from spikegpt_lora.ops.backend import default_backend

B, T, C = 3, 9, 4
KINDS = [{}, {"signed": False}, {"signed": False, "squared": True}]
GATES = product(["pointwise", "token"], ["graded", "binary"], ["none", "both"], [0.0, -0.2, None])

NEURONS = [
    EmbeddingSpike(),
    *(LIF(**settings) for settings in SETTINGS),
    *(
        SpikeGate(C, time=time, kind=kind, learn=learn, per_rank=True, v_reset=reset, v_threshold=0.3, tau=3.0)
        for time, kind, learn, reset in GATES
    ),
    *(SpikeGate(C, kind="integer", learn=learn, per_rank=True, v_threshold=0.1) for learn in ("none", "both")),
    *(IntegerSpikes(C, most, scale=0.7, **kind) for most, kind in product([1, 3], KINDS)),
]


@pytest.fixture(params=NEURONS, ids=[f"{type(neuron).__name__}-{i}" for i, neuron in enumerate(NEURONS)])
def neuron(request):
    return copy.deepcopy(request.param).double()


def some_mask():
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[2] = False
    return mask


@pytest.mark.parametrize("mask", [None, some_mask()], ids=["whole", "masked"])
def test_token_by_token_is_the_whole(neuron, mask, backend):
    x, spikes, membrane = current(B, T, C), [], None
    whole, end = neuron.step(x, None, mask)
    for t in range(T):
        one, membrane = neuron.step(x[:, t : t + 1], membrane, None if mask is None else mask[:, t : t + 1])
        spikes.append(one)
    assert torch.equal(torch.cat(spikes, dim=1), whole)
    assert membrane is end is None if neuron.from_rest else torch.equal(membrane, end)


def test_spikes_are_levels_seen_by_hooks_and_none_where_there_is_no_step(neuron, backend):
    x, mask, seen = current(B, T, C), some_mask(), []
    neuron.register_forward_hook(lambda module, inputs, output: seen.append(output))
    spikes, _ = neuron.step(x, None, mask)
    assert set(spikes.unique().tolist()) == set(neuron.levels) and not spikes[~mask].any()
    assert torch.equal(seen[0][mask], spikes[mask])
    assert [found for _, found in neurons_of(torch.nn.Sequential(neuron))] == [neuron]


def test_the_kernel_is_plain_torch(neuron):
    need_extension()
    mask, results = some_mask(), []
    for backend in ("extension", "reference"):
        x = current(B, T, C).requires_grad_()
        with default_backend(backend):
            spikes, membrane = neuron.step(x, None, mask)
        membrane = x.new_zeros(B, C) if membrane is None else membrane
        loss = (spikes * current(B, T, C)).sum() + membrane.square().sum()
        results.append((spikes, membrane, *torch.autograd.grad(loss, [x, *neuron.parameters()])))
    assert torch.equal(results[0][0], results[1][0]) and largest_difference(*results) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spikes_have_the_currents_dtype_and_a_membrane_is_no_half(neuron, dtype, backend):
    spikes, membrane = neuron.float().step(current(B, T, C, dtype=torch.float32).to(dtype))
    assert spikes.dtype == dtype and (membrane is None or membrane.dtype == torch.float32)


def exported(neuron, x, folder):
    """Write a graph of `neuron` alone into `folder`; what it reads there is x, or the rows of a table of its spikes."""
    node = {"name": "neuron", "op": neuron.op, "inputs": ["token"], **neuron.node()}
    pool = {"name": "pool", "op": "pool", "inputs": ["neuron"], "kind": "last", "weight": "score"}
    weights, given = {"score": np.eye(C)}, x.numpy()
    if not neuron.has_current:
        node["weight"], weights["table"] = "table", neuron(x.flatten(0, 1)).numpy()
        given = np.arange(B * T).reshape(B, T)
    folder.joinpath("graph.json").write_text(json.dumps({"labels": [], "nodes": [node, pool]}))
    np.savez(folder / "weights.npz", **weights)
    return given


def test_numpy_alone_gives_the_same_from_the_graphs_file(neuron, tmp_path):
    if not hasattr(Program, neuron.op):
        pytest.skip(f"the interpreter has no operation {neuron.op}")
    x, lengths = current(B, T, C), torch.tensor([9, 4, 6])
    if not getattr(neuron, "decay_input", True):
        with pytest.raises(ValueError, match="must divide its input by tau"):
            neuron.node()
        return
    given = exported(neuron, x, tmp_path)
    _, seen = Program(tmp_path, np.float64).run(given, lengths.numpy(), watch=["neuron"])
    spikes, _ = neuron.step(x, None, torch.arange(T) < lengths[:, None])
    assert np.array_equal(seen["neuron"], spikes.detach().numpy())


def test_a_saved_neuron_comes_back(neuron, tmp_path):
    new, x = copy.deepcopy(neuron), current(B, T, C)
    if "_extra_state" in neuron.state_dict():
        neuron.v_threshold = 0.45
    with torch.no_grad():
        for parameter in neuron.parameters():
            parameter.add_(0.3)
    torch.save(neuron.state_dict(), tmp_path / "neuron.pt")
    new.load_state_dict(torch.load(tmp_path / "neuron.pt", weights_only=True))
    assert torch.equal(new.step(x)[0], neuron.step(x)[0])


def test_stored_membranes_end_in_the_one_that_is_handed_on(neuron, backend):
    if neuron.has_membrane:
        neuron.store_v_seq = True
        _, membrane = neuron.step(current(B, T, C), None, some_mask())
        assert neuron.v_seq.shape == (B, T, C) and not neuron.v_seq.requires_grad
        assert membrane is None or torch.equal(neuron.v_seq[:, -1], membrane)


RIVALS = "spikegpt_lora.finetune.rivals"  # what neurons are compared with is none


def test_every_class_of_neurons_stands_in_the_list():
    for info in pkgutil.walk_packages(spikegpt_lora.__path__, "spikegpt_lora."):
        importlib.import_module(info.name)
    found, new = set(), {Neuron}
    while new:
        new = {sub for cls in new for sub in cls.__subclasses__() if sub.__module__.startswith("spikegpt_lora")}
        new = {sub for sub in new if sub.__module__ != RIVALS}
        found |= new
    assert found == set(map(type, NEURONS))
