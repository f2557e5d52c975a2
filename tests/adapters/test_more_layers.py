"""SpikeLoRA on convolutions and embeddings: the equation, peft's calls, what is counted, and what is refused."""

import copy

import pytest
import torch
from helpers import GATE, adapted, fresh_classifier, largest_difference, padded_batch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    set_seed,
)

from spikegpt_lora import SpikeLoraConfig
from spikegpt_lora.adapters import SparsityController, SpikeGate, calibrate_thresholds
from spikegpt_lora.convert.planes import as_planes
from spikegpt_lora.export.graph import graph_of
from spikegpt_lora.observe.adapters import observe_adapters
from spikegpt_lora.observe.operations import count_operations

IDS = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(0))
LAYERS = {
    "conv1d": (lambda: nn.Conv1d(3, 6, 3, stride=2, padding=1), (2, 3, 9)),
    "conv1d-groups": (lambda: nn.Conv1d(4, 6, 3, padding="same", groups=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 6, (3, 2), padding=1, bias=False), (2, 3, 5, 6)),
    "conv2d-one-image": (lambda: nn.Conv2d(3, 6, 3), (3, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), (2, 2, 3, 4, 3)),
    "embedding": (lambda: nn.Embedding(11, 6, padding_idx=0), None),
}
KINDS = ["graded", "binary", "integer"]
LEARNED = {"spikelora_learn": "both", "spikelora_per_rank": True}
every_layer = pytest.mark.parametrize("name", LAYERS)


def base(name):
    torch.manual_seed(0)
    return nn.Sequential(LAYERS[name][0]()).double()


def reads(name, scale=1.0):
    shape = LAYERS[name][1]
    generator = torch.Generator().manual_seed(1)
    return IDS if shape is None else scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def trained(name, config=SpikeLoraConfig, **changes):
    """A layer whose adapter, and what its gate learns, is drawn."""
    return adapted(base(name), config(target_modules=["0"], r=4, lora_alpha=12, **changes), "lora_")


def layer_of(model):
    return model.base_model.model[0]


def pair(layer):
    """A and B, whichever way peft keeps them."""
    if layer.lora_embedding_A:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def activations(layer, x):
    """A * x, or A[x], `(..., r)`."""
    (a, _), of = pair(layer), layer.base_layer
    if isinstance(of, nn.Embedding):
        return a.T[x]
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[a.dim()]
    return convolve(x, a, stride=of.stride, padding=of.padding).movedim(1 - a.dim(), -1)


def matrix(layer):
    """B as a matrix `(outputs, r)`: in groups it is 0 but for the units of an output's own group."""
    b = pair(layer)[1].flatten(1)
    groups = 4 // b.shape[1]
    return torch.block_diag(*b.chunk(groups))


@every_layer
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learned", [{}, LEARNED], ids=["fixed", "learned"])
def test_a_layer_computes_the_equation(name, kind, learned):
    model, x = trained(name, spikelora_gate=kind, **GATE, **learned), reads(name)
    layer = layer_of(model)
    a, gate = activations(layer, x), layer.lora_gate["default"]
    tau, threshold = gate.tau_now(), gate.threshold_now()  # numbers, or (r,)
    spikes, w = (a / tau >= threshold).double(), 2 * tau * threshold
    passed = {"graded": spikes * a, "binary": spikes, "integer": w * (a / w + 0.5).floor().clamp(0, 3)}[kind]
    added = (12 / 4) * passed @ matrix(layer).T
    if not isinstance(layer.base_layer, nn.Embedding):
        added = added.movedim(-1, 1 - pair(layer)[0].dim())
    assert 0.05 < spikes.mean() < 0.95 and len(set(torch.as_tensor(w).flatten().tolist())) == (4 if learned else 1)
    assert largest_difference(model(x), layer.base_layer(x) + added) < 1e-13


@every_layer
@pytest.mark.parametrize("kind", KINDS)
def test_where_no_unit_fires_the_surrogate_still_reaches_a_and_nothing_reaches_b(name, kind):
    model, x = trained(name, spikelora_gate=kind), reads(name)
    layer = layer_of(model)
    layer.lora_gate["default"].v_threshold = float(activations(layer, x).max()) / 2 + 0.01
    y = model(x)
    y.square().sum().backward()
    a, b = pair(layer)
    assert torch.equal(y, layer.base_layer(x)) and a.grad.any() and not b.grad.any()


@every_layer
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_and_learns_at_once(name, kind):
    model, x = get_peft_model(base(name), SpikeLoraConfig(target_modules=["0"], r=4, spikelora_gate=kind)), reads(name)
    a, b = pair(layer_of(model))
    before = a.clone(), b.clone()
    optimizer = torch.optim.SGD([a, b], lr=1e-3)
    losses = []
    for _ in range(3):
        losses.append(model(x).square().sum())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert torch.equal(losses[0], base(name)(x).square().sum()) and losses[2] < losses[0]
    assert not torch.equal(a, before[0]) and not torch.equal(b, before[1])


def test_the_padding_token_of_an_embedding_is_left_alone():
    model = get_peft_model(base("embedding"), SpikeLoraConfig(target_modules=["0"], r=4))
    a = layer_of(model).lora_embedding_A["default"]
    assert not a[:, 0].any() and a[:, 1:].all()
    nn.init.normal_(layer_of(model).lora_embedding_B["default"])
    x = torch.tensor([[0, 3]])
    assert (model(x) == base("embedding")(x)).all(-1).tolist() == [[True, False]]


def test_an_embedding_that_multiplies_what_it_gives_multiplies_what_the_adapter_adds():
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, x):
            return super().forward(x) * self.embed_scale

    results = []
    for kind in (nn.Embedding, Scaled):
        torch.manual_seed(0)
        net = nn.Sequential(kind(11, 6))
        results.append(adapted(net, SpikeLoraConfig(target_modules=["0"], r=4), "lora_")(IDS))
    assert largest_difference(3 * results[0], results[1]) < 1e-14


@every_layer
@pytest.mark.parametrize("settings", [{}, LEARNED | {"spikelora_gate": "integer"}], ids=["graded", "integer"])
@pytest.mark.parametrize("low", [False, True])
def test_saved_adapters_come_back_bit_for_bit(name, settings, low, tmp_path):
    model, x = trained(name, spikelora_v_threshold=0.3, **settings).float(), reads(name)
    x = x if name == "embedding" else x.float()
    layer_of(model).lora_gate["default"].v_threshold = 0.2  # as a controller moves it
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(name).float(), tmp_path, low_cpu_mem_usage=low).eval()
    assert torch.equal(loaded(x), model(x)) and not torch.equal(model(x), base(name).float()(x))
    assert layer_of(loaded).lora_gate["default"].v_threshold == 0.2


@every_layer
def test_without_the_gate_it_is_stock_lora_bit_for_bit_and_merges(name):
    results = []
    for config, changes in ((LoraConfig, {}), (SpikeLoraConfig, {"use_spikelora": False})):
        torch.manual_seed(1)
        model = get_peft_model(base(name), config(target_modules=["0"], r=4, lora_dropout=0.1, **changes)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            model(reads(name)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.eval()(reads(name)))
    assert torch.equal(*results) and not torch.equal(results[0], base(name)(reads(name)))
    if "groups" not in name:
        assert largest_difference(model.merge_and_unload()(reads(name)), results[1]) < 1e-13


@every_layer
def test_unloaded_and_disabled_adapters_are_the_base_layer_bit_for_bit(name):
    model, x = trained(name), reads(name)
    expected = base(name)(x)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    unloaded = model.unload()
    assert torch.equal(unloaded(x), expected) and not any(isinstance(m, SpikeGate) for m in unloaded.modules())


MERGES = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_adapter": lambda model: model.merge_adapter(safe_merge=True),
    "layer.merge": lambda model: layer_of(model).merge(),
    "get_delta_weight": lambda model: layer_of(model).get_delta_weight("default"),
    "add_weighted_adapter": lambda model: model.add_weighted_adapter(["default"], [1.0], "sum"),
}


@pytest.mark.parametrize("name", ["conv2d", "embedding"])
@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_merging_is_refused_and_changes_nothing(name, merge):
    model, x = trained(name), reads(name)
    before = model(x)
    with pytest.raises(RuntimeError, match=r"cannot be merged: .* \(of an embedding in pointwise time a table would"):
        merge(model)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "embedding"])
@pytest.mark.parametrize("second", [{}, {"use_spikelora": False}], ids=["spiking", "plain"])
def test_the_rows_of_a_batch_use_the_adapters_that_they_name(name, second):
    model = trained(name)
    model.add_adapter("other", SpikeLoraConfig(target_modules=["0"], r=2, **second))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".other" in key:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    model.double().eval()
    x, names = reads(name)[[0, 1, 0, 1]], ["other", "default", "__base__", "other"]
    mixed = model(x, adapter_names=names)
    with model.disable_adapter():
        alone = {"__base__": model(x)}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        alone[adapter] = model(x)
    assert largest_difference(mixed, torch.stack([alone[n][i] for i, n in enumerate(names)])) < 1e-13
    assert largest_difference(alone["default"], alone["other"]) > 0.1


@pytest.mark.parametrize(
    "layer, settings, message",
    [
        (
            nn.Conv1d(3, 6, 3),
            {"spikelora_time": "token"},
            "token time needs a row of tokens, and 0 is a Conv1d, which gives places",
        ),
        (
            nn.Conv2d(3, 6, 3),
            {"spikelora_time": "token"},
            "token time needs a row of tokens, and 0 is a Conv2d, which gives places",
        ),
        (nn.Conv2d(3, 6, 3, dilation=2), {}, r"0 must have dilation 1 .* got \(2, 2\) and 'zeros'"),
        (nn.Conv1d(3, 6, 3, padding=1, padding_mode="circular"), {}, r"0 must have dilation 1 .* and 'circular'"),
        (nn.Conv2d(6, 6, 3, groups=3), {"r": 4}, "rank is divisible by groups"),
        (nn.ConvTranspose1d(3, 6, 3), {}, "SpikeLoRA adapts torch.nn.Linear, .* got ConvTranspose1d"),
        (nn.Embedding(5, 6), {"lora_bias": True}, "lora_bias=True is not supported"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_an_adapter_could_not_compute_is_refused(layer, settings, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(nn.Sequential(copy.deepcopy(layer)), SpikeLoraConfig(target_modules=["0"], **settings))


def test_a_second_adapter_in_token_time_is_refused_too():
    with pytest.raises(ValueError, match="token time needs a row of tokens, and 0 is a Conv2d, which gives places"):
        trained("conv2d").add_adapter("other", SpikeLoraConfig(target_modules=["0"], spikelora_time="token"))


# What is counted: of images every place, of text its real tokens.


def test_an_image_counts_by_its_places():
    model, x = trained("conv2d", **GATE), reads("conv2d")
    layer, gate = layer_of(model), layer_of(model).lora_gate["default"]
    with torch.no_grad():
        pair(layer)[0][1] = -10.0  # a unit that is silent
        x = x.abs()
        fired = activations(layer, x) / 3.0 >= 0.3
        frozen = layer.base_layer(x)
        with observe_adapters(model, membranes=True) as seen:
            added = model(x) - frozen
    activity = seen.activity()
    assert activity.left_out == [] and activity.dead_ranks == 0.25 and not fired[..., 1].any()
    assert activity.sparsity == pytest.approx(1 - fired.double().mean().item(), abs=1e-12)
    assert activity.contribution == pytest.approx(float(added.norm() / frozen.norm()), rel=1e-12)
    assert activity.modules["base_model.model.0"]["firing"] == pytest.approx(fired.double().mean((0, 1, 2)).tolist())
    assert gate.v_threshold == 0.3


class Text(nn.Module):
    """Tokens through an embedding and two convolutions, the second of which halves them."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(37, 9)  # as many channels as tokens: no shape tells them apart
        self.same, self.halved = nn.Conv1d(9, 9, 3, padding=1), nn.Conv1d(9, 9, 3, stride=2, padding=1)

    def forward(self, input_ids, attention_mask=None):
        return self.halved(self.same(self.words(input_ids).mT))


def text():
    torch.manual_seed(0)
    return adapted(Text(), SpikeLoraConfig(target_modules=["words", "same", "halved"], r=4, **GATE), "lora_")


def test_text_counts_real_tokens_and_a_convolution_that_gives_others_is_left_out_by_name():
    model, batch = text(), padded_batch([5, 9, 3])
    gates, outputs = {}, {}
    for name in ("words", "same"):
        layer = model.base_model.model.get_submodule(name)
        layer.lora_gate["default"].register_forward_hook(lambda m, i, o, name=name: gates.update({name: o}))
        for key, module in (("frozen", layer.base_layer), ("all", layer)):
            module.register_forward_hook(lambda m, i, o, at=(name, key): outputs.update({at: o}))
    with torch.no_grad(), observe_adapters(model) as seen:
        model(**batch)
    activity, real = seen.activity(), batch["attention_mask"].bool()
    assert activity.left_out == ["base_model.model.halved"]
    for name in ("words", "same"):
        found = activity.modules[f"base_model.model.{name}"]
        frozen, both = (outputs[name, key] for key in ("frozen", "all"))
        if name == "same":
            frozen, both = frozen.mT, both.mT
        assert found["sparsity"] == pytest.approx(1 - gates[name][real].mean().item(), abs=1e-12)
        expected = float((both - frozen)[real].norm() / frozen[real].norm())
        assert found["contribution"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["conv2d", "embedding"])
def test_thresholds_are_calibrated_and_held_over_the_places(name):
    shape, inputs = {"conv2d": (16, 3, 9, 9), "embedding": (64, 30)}[name], {}
    inputs["input"] = torch.randn(shape).double() if name == "conv2d" else torch.randint(1, 11, shape)
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 6, 3) if name == "conv2d" else nn.Embedding(11, 6)
    config = SpikeLoraConfig(target_modules=["0"], r=64, spikelora_target_sparsity=0.8)

    class Net(nn.Sequential):
        def forward(self, input):
            return super().forward(input)

    model = adapted(Net(layer), config, "lora_")
    calibrate_thresholds(model, [inputs], 0.6)

    def sparsity():
        with torch.no_grad(), observe_adapters(model) as seen:
            model(**inputs)
        return seen.activity().sparsity

    assert sparsity() == pytest.approx(0.6, abs=0.01)
    model.train()
    with SparsityController(model) as controller:
        for _ in range(60):
            model(**inputs)
            controller.step()
    assert sparsity() == pytest.approx(0.8, abs=0.01)


# Real models.

TINY = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
MODELS = {
    "resnet": (
        lambda: ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2)
        ),
        r".*\.convolution",
    ),
    "bert": (
        lambda: BertForSequenceClassification(BertConfig(**TINY)),
        ["word_embeddings", "position_embeddings", "query"],
    ),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**TINY)), ["embed_tokens", "v_proj"]),
}


def real(name, tie=False):
    set_seed(0)
    model = MODELS[name][0]()
    return model if not tie else LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=True))


def given(name):
    if name == "resnet":
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": images, "labels": torch.tensor([0, 1, 1, 0])}
    batch = padded_batch([5, 9, 9, 9])
    return batch | {"labels": torch.tensor([0, 1, 1, 0]) if name == "bert" else batch["input_ids"]}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers_trains_and_comes_back_bit_for_bit(name, tmp_path):
    config = SpikeLoraConfig(target_modules=MODELS[name][1], r=4, spikelora_v_threshold=0.0)
    model = get_peft_model(real(name), config)
    layers = [m for m in model.modules() if hasattr(m, "lora_gate")]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    assert len(layers) > 1 and not any(pair(layer)[1].any() for layer in layers)
    first = model(**given(name)).loss
    for _ in range(2):
        model(**given(name)).loss.backward()
        optimizer.step()
        grads = [part.grad.any() for layer in layers for part in pair(layer)]
        optimizer.zero_grad()
    assert all(grads) and all(pair(layer)[1].any() for layer in layers) and model(**given(name)).loss < first
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(real(name), tmp_path).eval()
    if name == "resnet":  # its statistics moved, and belong to no adapter
        loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(**given(name)).logits, model(**given(name)).logits)
    with observe_adapters(model) as seen:
        model(**given(name))
    left_out = [key for key in seen.activity().left_out]
    assert [key.rpartition(".")[2] for key in left_out] == (["position_embeddings"] if name == "bert" else [])


def test_an_embedding_in_token_time_remembers_earlier_tokens_and_no_padding():
    config = SpikeLoraConfig(target_modules=["word_embeddings"], r=4, spikelora_time="token")
    model = adapted(real("bert"), config, "lora_")
    embedding = model.get_submodule("base_model.model.bert.embeddings.word_embeddings")
    seen = []
    embedding.register_forward_hook(lambda module, inputs, output: seen.append(output))
    batch = padded_batch([5, 9])
    model(**batch)
    model(input_ids=batch["input_ids"][:1, :5])
    assert torch.equal(seen[0][:1, :5], seen[1])
    a = embedding.lora_embedding_A["default"].T[batch["input_ids"][1]]
    membrane, added = torch.zeros(4).double(), []
    for t in range(9):
        membrane = membrane + (a[t] - membrane) / 2
        spikes = (membrane >= 0.1).double()
        membrane = membrane * (1 - spikes)
        added.append(2.0 * (spikes * a[t]) @ embedding.lora_embedding_B["default"].T)
    expected = embedding.base_layer(batch["input_ids"][1]) + torch.stack(added)
    assert largest_difference(seen[0][1], expected) < 1e-13


def test_an_embedding_in_token_time_streams():
    config = SpikeLoraConfig(target_modules=["emb", "key"], r=4, spikelora_time="token")
    inside = adapted(fresh_classifier(), config, "lora_").base_model.model.spikegpt
    ids, state, parts = padded_batch([9, 9])["input_ids"], None, []
    for stretch in ids.split([1, 3, 5], dim=1):
        output = inside(stretch, state=state, use_cache=True)
        state = output.state
        parts.append(output.last_hidden_state)
    assert largest_difference(torch.cat(parts, dim=1), inside(ids).last_hidden_state) < 1e-12
    with pytest.raises(ValueError, match="or of inputs_embeds beside an embedding with one, keeps no state"):
        inside(inputs_embeds=inside.emb.base_layer(ids), use_cache=True)


def test_an_adapter_that_a_tied_head_would_share_is_refused():
    config = SpikeLoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match="lm_head is to share the embedding's adapter, .* no transposes"):
        get_peft_model(real("llama", tie=True), config)


def test_the_embedding_of_a_spikegpt_is_adapted_before_it_spikes_and_in_no_graph_and_no_planes():
    model = adapted(fresh_classifier(), SpikeLoraConfig(target_modules=["emb"], r=4), "lora_")
    inside = model.base_model.model.spikegpt
    seen = []
    inside.emb_spike.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    model(**padded_batch([5, 9]))
    current, spikes = seen[0]
    assert torch.equal(spikes, (current >= 0).double())
    assert not torch.equal(spikes, (inside.emb.base_layer(padded_batch([5, 9])["input_ids"]) >= 0).double())
    left_out = [f"emb.lora_embedding_{part}" for part in "AB"]
    assert count_operations(model, [padded_batch([5, 9])]).left_out == left_out
    with pytest.raises(ValueError, match="emb has an adapter, for which the graph has no operation"):
        graph_of(model)
    integer = adapted(fresh_classifier(matrix_spikes="integer"), SpikeLoraConfig(target_modules=["emb"], r=4))
    with pytest.raises(ValueError, match="emb has an adapter, whose B is no linear layer that could read planes"):
        as_planes(integer)
