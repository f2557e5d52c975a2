"""Adapters added in place by the matrix product: the same results and gradients as peft's own forward, and when not."""

import pytest
import torch
from helpers import fresh_classifier, need_extension, padded_batch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from spikegpt_lora import SpikeLoraConfig
from spikegpt_lora.adapters import SparsityController, fused
from spikegpt_lora.adapters.layer import FusedLinear
from spikegpt_lora.forward import hooked

KINDS = {
    "lora": lambda **settings: fused(LoraConfig(**settings)),
    "spikelora": SpikeLoraConfig,
    "binary": lambda **settings: SpikeLoraConfig(spikelora_gate="binary", **settings),
    "learned": lambda **settings: SpikeLoraConfig(spikelora_learn="both", **settings),
}
TOLERANCES = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}


def net(kind="spikelora", dtype=torch.float64, bias=True, shape=(6, 9), **settings):
    """Two linear layers, one of which reads what requires a gradient, with adapters whose B is not 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*shape, bias=bias), nn.Tanh(), nn.Linear(*shape[::-1], bias=bias))
    config = KINDS[kind](target_modules=["0", "2"], **{"r": 4, "lora_alpha": 3} | settings)
    model = get_peft_model(model, config).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, FusedLinear)]


def results(model, x):
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(torch.linspace(-1, 2, y.numel()).view(y.shape).to(y))
    return y, x.grad, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def by_peft(model, monkeypatch):
    """The same model, by peft's own forward."""
    for layer in layers(model):
        monkeypatch.setattr(layer, "_fusible", lambda x: None)
    return model


@pytest.mark.parametrize("shape", [(6, 9), (1, 3), (65, 130)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_pefts_own_forward_in_values_and_every_gradient(kind, dtype, bias, shape, monkeypatch):
    need_extension()
    x = torch.randn(3, 5, shape[0], generator=torch.Generator().manual_seed(1)).to(dtype)
    ours, theirs = (
        results(net(kind, dtype, bias, shape), x),
        results(by_peft(net(kind, dtype, bias, shape), monkeypatch), x),
    )
    tolerance = TOLERANCES[dtype]
    if dtype == torch.bfloat16:  # by the largest, for sums round differently
        tolerance = tolerance | {"atol": 0.05 * max(g.abs().max().item() for g in theirs[2].values())}
    torch.testing.assert_close(ours, theirs, **tolerance)


def test_gradcheck():
    need_extension()
    generator = torch.Generator().manual_seed(0)
    x, a, weight, bias, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((2, 3, 4), (2, 4), (5, 4), (5,), (5, 2))
    )
    weight.requires_grad_(False)

    def layer(x, a, bias, b):
        read, same = torch.ops.spikegpt_lora.adapter_in(x, a)
        return torch.ops.spikegpt_lora.adapter_out(same, weight, bias, read, b, 0.7)

    assert torch.autograd.gradcheck(layer, (x, a, bias, b))
    assert torch.autograd.gradgradcheck(layer, (x, a, bias, b))


def test_a_gradient_that_others_read_is_not_written_to():
    need_extension()
    x, a, other = (torch.ones(2, 3, 4).requires_grad_(), torch.ones(2, 4), torch.zeros(2, 3, 4).requires_grad_())
    kept = []
    read, same = torch.ops.spikegpt_lora.adapter_in(x * 1, a)
    total = same + other
    total.register_hook(kept.append)
    (total.sum() + read.sum()).backward()
    assert torch.equal(kept[0], torch.ones(2, 3, 4)) and torch.equal(other.grad, torch.ones(2, 3, 4))
    assert torch.equal(x.grad, torch.full((2, 3, 4), 3.0))


@pytest.mark.parametrize("kind", ["spikelora", "learned"])
def test_who_looks_on_sees_the_same_to_the_bit(kind):
    """Hooks on the frozen layers, as an observer has them: then peft's forward runs, with the same products."""
    need_extension()
    x, seen = torch.randn(3, 5, 6), []
    expected, model = net(kind, torch.float32)(x), net(kind, torch.float32)
    hooks = (
        layer.base_layer.register_forward_hook(lambda module, given, output: seen.append(output))
        for layer in layers(model)
    )
    with hooked(hooks):
        assert torch.equal(model(x), expected)
    assert len(seen) == 2


def test_dropout_before_a_is_not_before_w0(monkeypatch):
    need_extension()
    x, found = torch.randn(3, 5, 6).double(), []
    for model in (net("lora", lora_dropout=0.5), by_peft(net("lora", lora_dropout=0.5), monkeypatch)):
        torch.manual_seed(3)
        found.append(results(model.train(), x))
    torch.testing.assert_close(*found)


def test_several_adapters_merged_and_disabled_ones_go_pefts_way(monkeypatch):
    need_extension()
    x, model, called = torch.randn(3, 5, 6).double(), net("lora"), []
    monkeypatch.setattr(FusedLinear, "_fused", lambda *given: called.append(given))
    model.add_adapter("second", LoraConfig(target_modules=["0", "2"], r=2))
    model.base_model.set_adapter(["default", "second"])
    model(x)
    with model.disable_adapter():
        model(x)
    model.base_model.set_adapter("default")
    model.merge_adapter()
    model(x)
    assert not called


def test_a_layer_that_is_trained_itself_goes_pefts_way(monkeypatch):
    need_extension()
    model = net("spikelora")
    layers(model)[0].base_layer.weight.requires_grad_(True)
    monkeypatch.setattr(FusedLinear, "_fused", lambda *given: pytest.fail("its gradient would be missing"))
    monkeypatch.setattr(layers(model)[1], "_fusible", lambda x: None)
    *_, gradients = results(model, torch.randn(3, 5, 6).double())
    assert any(name.endswith("0.base_layer.weight") for name in gradients)


def test_without_the_gate_a_spikelora_configuration_never_fuses(monkeypatch):
    need_extension()
    model, x = net("spikelora", use_spikelora=False), torch.randn(3, 5, 6).double()
    monkeypatch.setattr(FusedLinear, "_fused", lambda *given: pytest.fail("stock LoRA to the bit is peft's own"))
    assert [layer._fusible(x) for layer in layers(model)] == [None, None]
    model(x)


def test_frozen_weights_are_cast_once_and_again_where_they_change():
    need_extension()
    model = net("spikelora", torch.float32)
    layer = layers(model)[0]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 6))
    held = layer._frozen(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 6)).sum().backward()  # what inference cast serves training
    assert layer._frozen(torch.bfloat16) is held and held.dtype == torch.bfloat16
    with torch.no_grad():
        layer.base_layer.weight.add_(1)
    assert torch.equal(layer._frozen(torch.bfloat16), layer.base_layer.weight.to(torch.bfloat16))
    assert not any("casts" in name for name in model.state_dict())


def test_a_weight_where_another_one_lay_in_memory_is_cast_anew():
    layer = layers(net(dtype=torch.float32))[0]
    for number in range(50):
        layer.base_layer._parameters["weight"] = None
        layer.base_layer._parameters["weight"] = nn.Parameter(torch.full((9, 6), float(number)), requires_grad=False)
        assert float(layer._frozen(torch.bfloat16)[0, 0]) == number


def test_under_autocast_it_is_near_pefts_own(monkeypatch):
    need_extension()
    x, found = torch.randn(3, 5, 6), []
    for model in (net("lora", torch.float32), by_peft(net("lora", torch.float32), monkeypatch)):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        y.float().square().sum().backward()
        found.append((y, [p.grad for p in model.parameters() if p.grad is not None]))
    assert found[0][0].dtype == found[1][0].dtype == torch.bfloat16
    torch.testing.assert_close(*found, rtol=5e-2, atol=0.3)


def test_its_files_are_stock_loras(tmp_path):
    model, x = net("lora"), torch.randn(3, 5, 6).double()
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))
    loaded = PeftModel.from_pretrained(plain, tmp_path).double()
    assert type(loaded.peft_config["default"]) is LoraConfig and not layers(loaded)
    torch.testing.assert_close(loaded(x), model(x))


def test_merging_is_stock_loras():
    model, x = net("lora"), torch.randn(3, 5, 6).double()
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_packed_weights_are_refused_by_name():
    class Linear4bit(nn.Linear):
        pass

    packed = Linear4bit(3, 3)
    packed.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.uint8), requires_grad=False)
    packed.weight.__class__ = type("Params4bit", (nn.Parameter,), {})
    with pytest.raises(ValueError, match="needs a layer with one real weight, got Linear4bit"):
        get_peft_model(nn.Sequential(packed), fused(LoraConfig(target_modules=["0"])))


def test_gpt2s_transposed_linear_goes_pefts_way(monkeypatch):
    monkeypatch.setattr(FusedLinear, "_fused", lambda *given: pytest.fail("its weight is transposed"))
    model = get_peft_model(nn.Sequential(Conv1D(5, 3)), SpikeLoraConfig(target_modules=["0"], r=2))
    assert model(torch.randn(2, 4, 3)).shape == (2, 4, 5)


def test_a_controller_sees_the_gates_of_fused_layers():
    need_extension()
    model = net("spikelora", torch.float32).train()
    with SparsityController(model, 0.9) as controller:
        model(torch.randn(2, 3, 6))
        controller.step()
    assert 0 <= controller.silent <= 1


READERS = ["key", "value", "receptance", "output"]


def integer_net(kind, dtype, shift):
    """A model whose matrices read integers, all of them with adapters whose B is not 0."""
    torch.manual_seed(0)
    model = fresh_classifier(matrix_spikes="integer", token_shift=shift, dropout=0.0)
    model = get_peft_model(model, KINDS[kind](target_modules=READERS, r=4, lora_alpha=3)).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def integer_results(model, train=()):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or any(part in name for part in train))
    out = model(**padded_batch([7, 4, 1]))
    out.logits.square().sum().backward()
    return out.logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("train", [(), ("log_scale", "ln1", "ln2", "amplitude0")], ids=["adapters", "and scales"])
@pytest.mark.parametrize("shift", ["rows", "channels"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_of_a_model_that_reads_integers_it_is_pefts_own_forward_in_every_gradient(
    kind, dtype, shift, train, monkeypatch
):
    need_extension()
    (ours, our_gradients), (theirs, their_gradients) = (
        integer_results(integer_net(kind, dtype, shift), train),
        integer_results(by_peft(integer_net(kind, dtype, shift), monkeypatch), train),
    )
    assert our_gradients.keys() == their_gradients.keys() and any("lora_A" in name for name in our_gradients)
    tolerance = {"rtol": 1e-8, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(ours, theirs, **tolerance)
    for name, gradient in our_gradients.items():
        largest = their_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, their_gradients[name], rtol=0, atol=tolerance["atol"] * (1 + largest))


def test_a_model_that_reads_integers_runs_fused_and_where_somebody_looks_on_pefts_way(monkeypatch):
    need_extension()
    model, ways, batch = integer_net("spikelora", torch.float32, "rows"), [], padded_batch([3])
    plain = LoraLinear.forward
    monkeypatch.setattr(LoraLinear, "forward", lambda *given, **named: ways.append(given[0]) or plain(*given, **named))
    model(**batch)
    assert not ways
    looked_on = layers(model)[0]
    with hooked([looked_on.base_layer.register_forward_hook(lambda module, given, output: None)]):
        model(**batch)
    assert ways == [looked_on]


@pytest.mark.parametrize("shift", ["rows", "channels"])
def test_adapters_on_integers_compile_without_a_graph_break(shift):
    need_extension()
    model, batch, found = integer_net("lora", torch.float64, shift), padded_batch([7, 4, 1]), []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(**batch).logits.square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)


def test_an_adapter_that_reads_integers_is_not_merged():
    model = integer_net("lora", torch.float32, "rows")
    with pytest.raises(RuntimeError, match="'default' cannot be merged: it reads integers as they are"):
        model.merge_and_unload()
