"""Training towards a teacher: the divergence by its definition, and a run that imitates."""

import numpy as np
import pytest
import torch
from helpers import SIZES, lively

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM
from spikegpt_lora.pretrain.loop import Pretraining, PretrainOptions
from spikegpt_lora.pretrain.perplexity import divergence, next_token_loss

TOKENS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], 1000).astype(np.uint16)


def model(seed):
    torch.manual_seed(seed)
    return lively(SpikeGPTForCausalLM(SpikeGPTConfig(**SIZES, dropout=0.0)), seed).float()


def test_the_divergence_is_zero_from_itself_and_else_as_defined_with_states_carried():
    student, teacher = model(0), model(1)
    ids = torch.randint(SIZES["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(0))
    same, _, _ = divergence(teacher, teacher, ids, None, None, False)
    assert same.item() == pytest.approx(0, abs=1e-6)
    _, state, teachers = divergence(student, teacher, ids[:, :7], None, None, False)
    loss, *_ = divergence(student, teacher, ids[:, 6:], state, teachers, False)
    with torch.no_grad():
        p, q = (one(ids[:, :-1]).logits[:, 6:].double().softmax(-1) for one in (teacher, student))
    assert loss.item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)


def test_a_run_with_a_teacher_comes_nearer_to_it_and_leaves_it_alone(tmp_path):
    student, teacher = model(0), model(1)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    options = PretrainOptions(steps=40, batch_size=2, length=16, warmup=1, learning_rate=1e-2)
    losses = list(Pretraining(student, TOKENS, options, teacher=teacher).train(tmp_path))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in teacher.named_parameters())


def test_without_a_teacher_the_loss_is_the_texts(tmp_path):
    run = Pretraining(model(0), TOKENS, PretrainOptions(steps=1, batch_size=1, length=16))
    expected, _ = next_token_loss(model(0), run.streams[0][0], None, False)
    assert next(run.train(tmp_path)) == pytest.approx(expected.item())
