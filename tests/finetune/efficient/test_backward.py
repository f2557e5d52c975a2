"""Dropped backwards: the loss is the dense one to the bit, gradients those of a residual stream without the dropped."""

import pytest
import torch
from efficient_models import STOCK, adapted_model, difference, nothing_left, step_of
from torch import nn

from spikegpt_lora.finetune.efficient import DropBackward
from spikegpt_lora.finetune.efficient.backward import half_blocks

KNOWN = ["spikegpt-lora", "spikegpt-integer", "spikegpt-spikelora", "llama", "gpt2"]


def begun(model, p, step=0, **more):
    drop = DropBackward(p, **more)
    drop.begin(model)
    drop.begin_step(step, 10)
    return drop


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_the_loss_is_the_dense_one_to_the_bit(p, name, batch):
    model = adapted_model(name)
    dense = step_of(model, batch)
    with begun(model, p):
        assert torch.equal(step_of(model, batch)["loss"], dense["loss"])


@pytest.mark.parametrize("name", KNOWN)
def test_without_a_dropped_one_gradients_are_the_dense_ones(name, batch):
    model = adapted_model(name)
    dense = step_of(model, batch)
    with begun(model, 0.0):
        assert difference(step_of(model, batch), dense) == 0


@pytest.mark.parametrize("name", KNOWN)
def test_with_all_dropped_the_classifier_alone_learns_as_ever(name, batch):
    model = adapted_model(name)
    dense = step_of(model, batch)
    with begun(model, 1.0):
        found = step_of(model, batch)
    trained = {key for key in found if key != "loss"}
    assert trained == {key for key in dense if "score" in key}
    assert all(torch.equal(found[key], dense[key]) for key in trained)


@pytest.mark.parametrize("name", KNOWN)
def test_gradients_are_those_of_a_stream_to_which_the_dropped_add_a_constant(name, batch):
    model = adapted_model(name)
    with begun(model, 0.5) as drop:
        found, dropped = step_of(model, batch), drop.dropped
    hooks = [half.register_forward_hook(lambda m, args, output: _detached(output)) for half in dropped]
    expected = step_of(model, batch)
    for hook in hooks:
        hook.remove()
    expected = {key: x for key, x in expected.items() if key in found or float(x.abs().max()) > 0}
    assert len(dropped) == 3 and difference(found, expected) < 1e-12


def _detached(output):
    if isinstance(output, torch.Tensor):
        return output.detach()
    return tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in output)


def test_every_step_drops_as_many_and_all_have_their_turn():
    model = adapted_model("spikegpt-lora")
    drop = begun(model, 0.5)
    with drop:
        turns = []
        for step in range(40):
            drop.begin_step(step, 40)
            turns.append(drop.dropped)
    assert {len(dropped) for dropped in turns} == {3}
    assert set().union(*turns) == set(half_blocks(model))


def test_evaluation_is_not_touched_and_nothing_is_left_behind(trainer_of):
    model = adapted_model("spikegpt-lora")
    hooks = nothing_left(model)
    trainer_of(model, DropBackward(0.75)).train()
    assert nothing_left(model) == hooks


def test_the_same_seed_gives_the_same_run(trainer_of):
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        trainer = trainer_of(adapted_model("llama"), DropBackward(0.5))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_a_share_out_of_range(p):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        DropBackward(p)


def test_several_processes_are_refused():
    class Two:
        world_size = 2

    with pytest.raises(ValueError, match="train in one process"):
        DropBackward(0.5).on_train_begin(Two(), None, None, model=adapted_model("llama"))


def test_a_model_without_known_half_blocks_is_told_how_to_name_them():
    with pytest.raises(ValueError, match="no half-blocks that are known"):
        half_blocks(nn.Linear(2, 2))
    assert "bert" in STOCK  # whose sublayers hold their own residual
    with pytest.raises(ValueError, match="no half-blocks that are known"):
        half_blocks(adapted_model("bert"))
    assert len(half_blocks(adapted_model("bert"), r".*\.layer\.\d+\.output\.dense")) == 3
