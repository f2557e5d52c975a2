"""Looking on at a forward: modes and hooks are afterwards what they were, and only what is read is handed on."""

import pytest
import torch
from helpers import SIZES
from torch import nn

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM
from spikegpt_lora.forward import RealTokens, evaluating, hooked, real_first, run, token_model


def test_every_module_is_in_the_mode_that_it_was_in_also_after_an_exception(lm):
    lm.train()
    lm.spikegpt.blocks[1].eval()
    modes = [module.training for module in lm.modules()]
    with evaluating(lm):
        assert not any(module.training for module in lm.modules())
    with pytest.raises(KeyError), evaluating(lm):
        raise KeyError
    assert [module.training for module in lm.modules()] == modes


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_gone_after_an_exception_and_where_one_could_not_be_attached():
    net, calls = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), []

    def handles(fail=False):
        for linear in net:
            yield linear.register_forward_hook(lambda *given: calls.append(given))
            if fail:
                raise ValueError("packed")

    with hooked(handles()):
        net(torch.zeros(1, 2))
        assert hooks_of(net) == len(calls) == 2
    with pytest.raises(KeyError), hooked(handles()):
        raise KeyError
    with pytest.raises(ValueError, match="packed"), hooked(handles(fail=True)):
        pass
    assert hooks_of(net) == 0


def test_run_hands_on_what_a_forward_reads_without_gradient_and_in_evaluation_mode(lm, ids):
    expected = lm(ids).logits
    lm.train()
    output = run(lm, {"input_ids": ids, "labels": torch.ones(1), "note": "of no interest", "words": None})
    assert torch.equal(output.logits, expected) and not output.logits.requires_grad and output.loss is None
    assert lm.training and run(lm, {"input_ids": ids, "labels": ids}, ("input_ids", "labels")).loss > 0


def test_real_tokens_come_first_on_whichever_side_the_padding_is():
    mask = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 1]])
    real, front = real_first({"input_ids": torch.zeros(2, 4), "attention_mask": mask})
    assert torch.equal(real, mask.bool()) and front.tolist() == [[1, 2, 3], [0, 3, 1]]
    real, front = real_first({"inputs_embeds": torch.zeros(1, 2, 5)})
    assert bool(real.all()) and front.tolist() == [[0, 1]]


def test_real_tokens_are_those_of_the_forward_now_running(ids):
    model = SpikeGPTForCausalLM(SpikeGPTConfig(**SIZES, pad_token_id=0))
    tokens, mask = RealTokens(model), torch.arange(9) < torch.tensor([[9], [2], [5], [1]])
    with hooked([tokens.attach()]):
        model(input_ids=ids, attention_mask=mask.long())
        x = torch.ones(4, 9, 2)
        assert tokens.model is token_model(model) is model.spikegpt
        assert tokens.count(x) == 17 and tokens.real(x).sum() == 34 and tokens.real(x[:, :4]) is None
        assert [tokens.first("a"), tokens.first("a")] == [True, False]
        model(inputs_embeds=torch.zeros(1, 3, 12))
        assert tokens.count(x[:1, :3]) == 3 and tokens.first("a")
