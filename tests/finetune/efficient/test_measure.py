"""What choices of channels are worth, and whether one gradient tells of another."""

import pytest
import torch
from efficient_models import adapted_model, nothing_left

from spikegpt_lora.finetune.efficient import SkipBatches
from spikegpt_lora.finetune.efficient.measure import CHOICES, Novelties, choices, spearman
from spikegpt_lora.finetune.efficient.pairs import find_pairs
from spikegpt_lora.forward import hooked, run


def test_the_oracle_is_the_best_of_all_choices(kind, batch):
    model = adapted_model(kind)
    found = choices(model, [batch], [batch], keep=0.25)
    assert set(found) == set(CHOICES) and found["oracle"]["overlap"] == 1
    assert all(row["energy"] <= 1 and 0 <= row["overlap"] <= 1 for row in found.values())
    assert found["static"]["overlap"] >= found["random"]["overlap"]
    assert nothing_left(model) or kind == "spikegpt-token"


def test_all_channels_are_no_error(batch):
    for row in choices(adapted_model("spikegpt-lora"), [batch], [batch], keep=1.0).values():
        assert row == pytest.approx({"overlap": 1, "energy": 1, "error": 0}, abs=1e-12)


def test_error_and_energy_are_what_they_are_called(batch):
    """By hand, of the static set of each MLP."""
    model, read = adapted_model("llama"), {}
    pairs = find_pairs(model)
    hooks = [
        pair.consumer.register_forward_pre_hook(lambda m, args, name=pair.name: read.update({name: args[0]}))
        for pair in pairs
    ]
    model.disable_adapter_layers()
    with hooked(hooks):
        run(model, {name: x for name, x in batch.items() if name != "labels"})
    expected = []
    for pair in pairs:
        h, weight = read[pair.name][batch["attention_mask"].bool()], pair.consumer.get_base_layer().weight
        kept = (h.norm(dim=0) * weight.norm(dim=0)).topk(5).indices
        whole, part = h @ weight.t(), h[:, kept] @ weight[:, kept].t()
        energy = h[:, kept].square().sum() / h.square().sum()
        expected.append([float(energy), float((whole - part).square().sum() / whole.square().sum())])
    found = choices(model, [batch], [batch], keep=0.25)["static"]
    assert [found["energy"], found["error"]] == pytest.approx(torch.tensor(expected).mean(dim=0).tolist())


def test_novelties_are_of_the_heads_and_of_all_adapters_gradients(trainer_of):
    gate = SkipBatches(1.0)
    seen, model = Novelties(gate), adapted_model("spikegpt-lora")
    trainer_of(model, gate, seen).train()
    assert len(seen.rows) == 8 and seen.rows[0]["true"] == 1
    assert all(0 <= row["head"] <= 1 and 0 <= row["true"] <= 1 and row["norm"] > 0 for row in seen.rows)
    width = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert seen.true.rows.shape[1] == width


def test_rank_correlation_and_its_interval():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(120, generator=generator)
    noise = torch.randn(120, generator=generator)
    rows = [{"a": float(x), "same": float(x) ** 3, "near": float(x + y)} for x, y in zip(a, noise)]
    assert spearman(rows, "a", "same", 20) == pytest.approx((1, 1, 1))
    value, low, high = spearman(rows, "a", "near", 20)
    assert 0.3 < low < value < high < 0.95
