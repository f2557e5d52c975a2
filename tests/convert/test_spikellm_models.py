"""Integer spikes before the linear layers of stock transformers models, and of ours: tiny ones with random weights."""

import copy

import pytest
import torch
from helpers import SIZES
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM
from spikegpt_lora.convert.clipping import blocks_of, learn_clipping
from spikegpt_lora.convert.spiking_linear import SpikingLinear
from spikegpt_lora.convert.transformers_models import (
    Spiking,
    calibration_rows,
    linears_of,
    put_neurons,
    round_weights,
    spiking_linears,
)

LLAMA = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "num_hidden_layers": 2}
BERT = {"num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 2}
MODELS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(vocab_size=37, hidden_size=16, **LLAMA)), 14, 1),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=37, n_embd=16, n_head=2, n_layer=2)), 8, 1),
    "bert": (lambda: BertModel(BertConfig(vocab_size=37, hidden_size=16, **BERT)), 12, 1),
    "spikegpt": (lambda: SpikeGPTForCausalLM(SpikeGPTConfig(**SIZES)), 21, 1),
}  # of each its linear layers in blocks, and outside of them


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    model = MODELS[request.param][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def counts(request):
    return MODELS[request.node.callspec.params["model"]][1:]


def batches(count=2, length=9):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 37, (count, 3, length), generator=generator)
    mask = (torch.arange(length) < torch.tensor([9, 5, 7])[:, None]).long()
    return [{"input_ids": one, "attention_mask": mask} for one in ids]


def hidden(model, batch):
    return model(**batch)[0].detach()


def test_linears_of_blocks_are_those_between_embedding_and_head(model, counts):
    inside, outside = counts
    names = set(linears_of(model))
    assert len(names) == inside and len(linears_of(model, "all")) == inside + outside
    assert not [name for name in names if "head" in name or "pooler" in name or "emb" in name]


def test_a_model_without_blocks_and_other_choices_are_refused():
    with pytest.raises(ValueError, match="Sequential has no nn.Linear or Conv1D in blocks"):
        linears_of(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="which must be one of blocks, all, got 'heads'"):
        linears_of(nn.Sequential(nn.Linear(2, 2)), "heads")


def test_rows_are_what_layers_read_of_real_tokens(model):
    given = batches()
    rows = calibration_rows(model, given)
    assert list(rows) == list(linears_of(model)) and {len(x) for x in rows.values()} == {2 * (9 + 5 + 7)}
    name, first = next(iter(rows.items()))
    seen = []
    with torch.no_grad():
        linears_of(model)[name].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(**given[0])
    assert torch.equal(first[:21], seen[0][given[0]["attention_mask"].bool()])
    assert {len(x) for x in calibration_rows(model, given, most=10).values()} == {10}


@pytest.mark.parametrize("zero_point", [False, True])
def test_every_matrix_of_the_blocks_reads_integers_and_classes_stay_stock(model, counts, zero_point):
    kind, spiking = type(model), copy.deepcopy(model)
    put_neurons(spiking, calibration_rows(model, batches()), Spiking(levels=7 + zero_point, zero_point=zero_point))
    round_weights(spiking, 4)
    seen = []
    for _, module in spiking_linears(spiking):
        module.linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert type(spiking) is kind and torch.isfinite(hidden(spiking, batches()[0])).all()
    assert len(seen) == counts[0] and all(torch.equal(q, q.round()) for q in seen)
    assert not [m for b in (m for _, m in blocks_of(spiking)) for m in b.modules() if type(m) in (nn.Linear, Conv1D)]


@pytest.mark.parametrize("steps", ["token", "tensor", "channel"])
def test_more_levels_come_nearer_and_silence_is_the_model(model, steps):
    rows, given = calibration_rows(model, batches()), batches(1)[0]
    real = given["attention_mask"].bool()

    def error(levels, silent=False):
        spiking = put_neurons(copy.deepcopy(model), rows, Spiking(levels=levels, steps=steps))
        for _, module in spiking_linears(spiking):
            module.neuron.silent = silent
        return (hidden(spiking, given) - hidden(model, given))[real].abs().mean().item()

    assert error(255) < error(15) / 3 and error(3, silent=True) < 1e-5


def test_weights_on_a_grid_leave_the_model_they_came_from_alone(model):
    before = copy.deepcopy(model.state_dict())
    spiking = put_neurons(copy.deepcopy(model), calibration_rows(model, batches()), Spiking(levels=255))
    round_weights(spiking, 4)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(len(m.weight[0].unique()) <= 15 for _, m in spiking_linears(spiking))


def test_clipping_is_learned_block_by_block_and_comes_nearer(model):
    given = [batch | ({} if isinstance(model, BertModel) else {"use_cache": False}) for batch in batches()]
    rows = calibration_rows(model, given)
    spiking = put_neurons(copy.deepcopy(model), rows, Spiking(levels=255))
    errors = learn_clipping(spiking, model, given, bits=4, epochs=12)
    assert len(errors) == len(list(blocks_of(spiking))) and all(last <= first for first, last in errors)
    assert sum(last for _, last in errors) < sum(first for first, _ in errors)
    assert all(type(m.linear).__name__ == "SpikeLinear" and len(m.weight[0].unique()) <= 15
               for _, m in spiking_linears(spiking))  # fmt: skip


def test_what_cannot_be_converted_is_refused(model):
    rows = calibration_rows(model, batches())
    with pytest.raises(ValueError, match="must have float32 weights, has torch.bfloat16"):
        put_neurons(copy.deepcopy(model).bfloat16(), rows, Spiking(levels=7))
    with pytest.raises(ValueError, match="it has no other"):
        put_neurons(copy.deepcopy(model), {"other": torch.ones(2, 2)}, Spiking(levels=7))
    spiking = put_neurons(copy.deepcopy(model), calibration_rows(model, batches(), "all"), Spiking(levels=7))
    assert any(isinstance(m, SpikingLinear) for m in spiking.children()) or isinstance(model, BertModel)
    with pytest.raises(ValueError, match="is in none: put neurons into blocks alone"):
        learn_clipping(spiking, model, batches(), bits=4)


def test_a_layer_that_the_text_does_not_reach_is_named():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

        def forward(self, input_ids):
            return self.layers[0](input_ids)

    with pytest.raises(ValueError, match="layers.1 was never called: give more text"):
        calibration_rows(Lazy(), [{"input_ids": torch.ones(1, 3, 2)}])


def test_random_channels_are_those_of_the_seed(model):
    rows = calibration_rows(model, batches())

    def chosen(seed):
        spiking = Spiking(levels=7, share=0.25, times=2, score="random", seed=seed)
        model_of_seed = put_neurons(copy.deepcopy(model), rows, spiking)
        return torch.cat([module.neuron.most for _, module in spiking_linears(model_of_seed)])

    assert torch.equal(chosen(0), chosen(0)) and not torch.equal(chosen(0), chosen(1))
