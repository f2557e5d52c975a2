"""Every matrix of an integer model reads integers: by a hook of the test's own, and by the package's table."""

import pytest
import torch
from helpers import adapted, fresh_classifier, padded_batch
from torch import nn

from spikegpt_lora import SpikeLoraConfig
from spikegpt_lora.observe.matrix_inputs import HEAD, REAL, RESIDUAL, by_kind, cells, matrix_inputs

DESIGNS = {"M": {"token_shift": "rows"}, "H": {"token_shift": "channels"}}


def spiking(design):
    return fresh_classifier(matrix_spikes="integer", spike_levels=7, **DESIGNS[design])


def batch():
    return padded_batch([9, 2, 5, 7], left=True, seed=6)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("pooling", ["last", "mean", "last_mean"])
@torch.no_grad()
def test_a_hook_of_ones_own_sees_integers_alone(design, pooling):
    model, seen = fresh_classifier(matrix_spikes="integer", pooling=pooling, **DESIGNS[design]), {}

    def look(name, module, args, kwargs):
        seen.setdefault(name, []).append(args[0])

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: look(name, module, args, kwargs), with_kwargs=True
            )
    model(**batch())
    assert len(seen) == 7 * 3 + 1
    for name, inputs in seen.items():
        assert all(torch.equal(x, x.round()) for x in inputs), name
        assert any(x.count_nonzero() for x in inputs), name


def test_the_table_names_what_each_matrix_reads():
    for design in DESIGNS:
        rows = {row.matrix: row for row in matrix_inputs(spiking(design), [batch()])}
        reader = RESIDUAL if design == "M" else "blocks.1.att.spike_key"
        assert rows["blocks.1.att.key"].reads == reader and rows["score"].reads == RESIDUAL
        assert rows["blocks.1.att.output"].reads == "blocks.1.att.spike_output"
        assert rows["blocks.0.ffn.value"].reads == "blocks.0.ffn.spike_value"
        assert set(rows["blocks.0.ffn.value"].levels) <= {k * k for k in range(8)}
        assert set(rows["blocks.1.att.output"].levels) <= set(range(-7, 8))
        for row in rows.values():
            assert 0 < row.nonzero == pytest.approx(row.weight_reads) and row.weight_reads <= row.plane_additions


def test_a_float_model_reads_real_numbers_and_so_does_the_b_of_a_graded_gate():
    rows = {row.matrix: row for row in matrix_inputs(fresh_classifier(), [batch()])}
    assert rows["blocks.0.att.key"].reads == REAL and rows["blocks.0.att.key"].levels is None
    config = SpikeLoraConfig(task_type="SEQ_CLS", r=4, spikelora_gate="graded")
    rows = {row.matrix: row for row in matrix_inputs(adapted(spiking("H"), config, "lora_"), [batch()])}
    assert rows["blocks.0.att.key.lora_A.default"].reads == "blocks.0.att.spike_key"
    assert rows["blocks.0.att.key.lora_B.default"].reads == REAL
    config = SpikeLoraConfig(task_type="SEQ_CLS", r=4, spikelora_gate="binary")
    rows = {row.matrix: row for row in matrix_inputs(adapted(spiking("H"), config, "lora_"), [batch()])}
    assert rows["blocks.0.att.key.lora_B.default"].levels == (0, 1)
    assert rows["blocks.0.att.key.lora_B.default"].reads == "blocks.0.att.key.lora_gate.default"


def test_no_hook_stays():
    model = spiking("M")
    matrix_inputs(model, [batch()])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_blocks_are_taken_together_and_written_as_text():
    table = matrix_inputs(spiking("H"), [batch()])
    kinds = {row.matrix: row for row in by_kind(table)}
    assert list(kinds) == [row.matrix.removeprefix("blocks.0.") for row in table[:7]] + ["score"]
    mine = [row for row in table if row.matrix.endswith("att.key")]
    assert len(mine) == 3 and kinds["att.key"].nonzero == pytest.approx(sum(row.nonzero for row in mine) / 3)
    assert set(kinds["att.key"].levels) == set().union(*(row.levels for row in mine))
    assert kinds["att.key"].reads == "att.spike_key"
    rows = cells(by_kind(table))
    assert all(len(row) == len(HEAD) for row in rows) and rows[0][:2] == ["att.key", "att.spike_key"]
    real = cells(by_kind(matrix_inputs(fresh_classifier(), [batch()])))
    assert real[0][1:3] == [REAL, ""] and real[0][5] == ""
