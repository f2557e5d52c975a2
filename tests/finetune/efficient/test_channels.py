"""Sparse channels: a step equals the dense model's with the other channels masked, on every kind of model; which ones
are chosen; dense where it should be; nothing is left behind."""

import pytest
import torch
from efficient_models import KINDS, adapted_model, difference, nothing_left, step_of
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from spikegpt_lora.adapters import SparsityCallback
from spikegpt_lora.finetune.efficient import SparseChannels, SparseConfig
from spikegpt_lora.finetune.efficient.channels import SELECT, calibrated_scores
from spikegpt_lora.finetune.efficient.pairs import find_pairs
from spikegpt_lora.forward import hooked, run

SOME = ["spikegpt-lora", "integer-spikelora", "bert", "gpt2"]  # where every kind would take minutes
ALL = {"layers": "all", "start": 0.0}


class Two:
    world_size, seed = 2, 0


def begun(model, batch, step=0, **config):
    """SparseChannels of `model` in a step, of ten."""
    sparse = SparseChannels(SparseConfig(**ALL | config))
    sparse.begin(model, 0, lambda number: [batch] * number)
    sparse.begin_step(step, 10)
    return sparse


def masked(model, sets):
    """Hooks by which the consumers read 0 from every channel outside `sets`."""
    for pair in find_pairs(model):
        kept = torch.zeros(pair.channels).index_fill(0, sets[pair.name], 1.0)
        yield pair.consumer.register_forward_pre_hook(
            lambda m, args, kept=kept: (args[0] * kept.to(args[0]), *args[1:])
        )


@pytest.mark.parametrize("select", ["static", "svd"])  # once for all steps, and anew in each
def test_all_channels_kept_is_the_dense_step(select, model, batch):
    dense = step_of(model, batch)
    with begun(model, batch, keep=1.0, select=select):
        assert difference(step_of(model, batch), dense) < 1e-12


@pytest.mark.parametrize(
    "name, select",
    [
        *((name, select) for name in KINDS for select in ("static", "oracle")),
        *(("bert", one) for one in SELECT if one not in ("static", "oracle")),
    ],
)
def test_a_share_of_the_channels_is_the_dense_step_with_the_others_masked(name, select, batch):
    model = adapted_model(name)
    with begun(model, batch, keep=0.5, select=select) as sparse:
        found, sets = step_of(model, batch), sparse.sets
    with hooked(masked(model, sets)):
        assert difference(found, step_of(model, batch)) < 1e-12


@pytest.mark.parametrize("name", ["spikegpt-lora", "spikegpt-integer", "llama"])
def test_gradient_checkpointing_computes_the_same_channels_again(name, batch):
    model = adapted_model(name)
    model.enable_input_require_grads()
    with begun(model, batch, keep=0.5, select="random"):
        plain = step_of(model, batch)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert difference(step_of(model, batch), plain) < 1e-12


@pytest.mark.parametrize("name", ["spikegpt-lora", "integer-spikelora", "bert"])
def test_bf16_autocast_reads_the_slices_of_the_step_it_is_in(name, batch):
    """The cast of a frozen weight is kept while it stays; a slice of another step may lie where the last one lay."""
    model = adapted_model(name).float()
    sparse = begun(model, batch, keep=0.5, select="random")
    with sparse, torch.autocast("cpu", torch.bfloat16):
        for step in range(4):
            sparse.begin_step(step, 10)
            found = step_of(model, batch)
            another = adapted_model(name).float()
            with begun(another, batch, step, keep=0.5, select="random"):
                assert difference(found, step_of(another, batch)) == 0


def test_static_channels_are_those_that_give_most(model, batch):
    """As the definition says, with h read by a hook and W2 multiplied out for each channel."""
    pairs, read = find_pairs(model), {}
    hooks = [
        pair.consumer.register_forward_pre_hook(lambda m, args, name=pair.name: read.update({name: args[0]}))
        for pair in pairs
    ]
    with hooked(hooks), model.disable_adapter():
        run(model, {name: x for name, x in batch.items() if name != "labels"})
    with begun(model, batch, keep=0.5) as sparse:
        for pair in pairs:
            h = read[pair.name][batch["attention_mask"].bool()]
            weight = pair.consumer.get_base_layer().weight
            weight = weight.t() if weight.shape[0] == pair.channels else weight
            scores = (h[:, :, None] * weight.t()).square().sum(dim=(0, 2))
            kept = torch.zeros(pair.channels).index_fill(0, sparse.sets[pair.name], 1.0).bool()
            assert scores[kept].min() >= scores[~kept].max()


@pytest.mark.parametrize("select", ["static", "svd", "svd_token", "oracle"])
def test_padding_does_not_count(select, batch):
    model = adapted_model("spikegpt-lora")
    longer = {
        "input_ids": torch.cat([batch["input_ids"], torch.full((4, 5), 7)], dim=1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros(4, 5, dtype=torch.long)], dim=1),
        "labels": batch["labels"],
    }
    chosen = []
    for some in (batch, longer):
        with begun(model, some, keep=0.5, select=select) as sparse:
            step_of(model, some)
            chosen.append(sparse.sets)
    assert all(torch.equal(chosen[0][name], chosen[1][name]) for name in chosen[0])


def test_the_oracle_finds_what_the_batch_itself_gives_most(batch):
    model = adapted_model("spikegpt-rows")
    pairs = find_pairs(model)
    with begun(model, batch, keep=0.25, select="oracle", layers=[0]) as sparse:
        step_of(model, batch)
        found = sparse.sets[pairs[0].name]
    read = []
    with hooked([pairs[0].consumer.register_forward_pre_hook(lambda m, args: read.append(args[0]))]):
        run(model, {name: x for name, x in batch.items() if name != "labels"})
    h = read[0][batch["attention_mask"].bool()]
    scores = h.norm(dim=0) * pairs[0].out_norms()
    assert set(found.tolist()) == set(scores.topk(12).indices.tolist())


def test_the_choice_holds_for_the_micro_batches_of_a_step_and_for_refresh_steps(batch):
    model = adapted_model("spikegpt-lora")
    sparse = begun(model, batch, keep=0.5, select="random", refresh=2)
    with sparse:
        chosen = []
        for step in range(4):
            sparse.begin_step(step, 10)
            for _ in range(2):
                step_of(model, batch)
                chosen.append(next(iter(sparse.sets.values())).tolist())
    assert chosen[0] == chosen[1] == chosen[2] == chosen[3] != chosen[4] == chosen[5] == chosen[6] == chosen[7]


@pytest.mark.parametrize("layers, names", [("all", [0, 1, 2]), ("all_but_first", [1, 2]), ([2, 0], [0, 2])])
def test_layers(layers, names, batch):
    model = adapted_model("spikegpt-lora")
    with begun(model, batch, layers=layers) as sparse:
        assert [f"blocks.{number}.ffn" in name for number, name in zip(names, sparse.sets)] == [True] * len(names)
        assert len(sparse.sets) == len(names)


@pytest.mark.parametrize("step, dense", [(0, True), (1, True), (2, False), (7, False), (8, True)])
def test_steps_before_start_and_from_end_on_are_dense(step, dense, batch):
    model = adapted_model("spikegpt-lora")
    expected = step_of(model, batch)
    with begun(model, batch, step, keep=0.25, start=0.2, end=0.8):
        assert (difference(step_of(model, batch), expected) == 0) == dense


class Looking(TrainerCallback):
    """Evaluates while it trains."""

    def __init__(self, batch):
        self.batch, self.logits, self.modes = batch, [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.logits.append(run(model, self.batch, self.batch.keys() - {"labels"}).logits)
        self.modes.append([name for name, module in model.named_modules() if "forward" in module.__dict__])


@pytest.mark.parametrize("name", SOME)
def test_evaluation_in_the_midst_of_training_is_dense(name, batch, trainer_of):
    model, looking = adapted_model(name), Looking(batch)
    trainer_of(model, SparseChannels(SparseConfig(start=0.0)), looking, learning_rate=0.0).train()
    expected = run(model.train(), batch, batch.keys() - {"labels"}).logits
    assert looking.modes[0] and all(torch.equal(logits, expected) for logits in looking.logits)


@pytest.mark.parametrize("name", SOME)
def test_after_training_nothing_is_left_in_the_model(name, trainer_of):
    model = adapted_model(name)
    before, hooks = set(model.state_dict()), nothing_left(model)
    trainer_of(model, SparseChannels(SparseConfig(start=0.0, select="svd"))).train()
    assert nothing_left(model) == hooks and set(model.state_dict()) == before
    assert all(
        type(p) is nn.Parameter for module in model.modules() for p in module._parameters.values() if p is not None
    )


class Breaking(TrainerCallback):
    def on_optimizer_step(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_after_an_exception_nothing_is_left_in_the_model(trainer_of):
    model = adapted_model("bert")
    with pytest.raises(KeyboardInterrupt), SparseChannels(SparseConfig(start=0.0)) as sparse:
        trainer_of(model, sparse, Breaking()).train()
    assert nothing_left(model)


def test_an_exception_inside_a_sparse_forward_leaves_whole_weights(batch):
    model = adapted_model("spikegpt-lora")
    pair = find_pairs(model)[0]
    whole = pair.consumer.get_base_layer().weight

    def broken(*args):
        raise RuntimeError("broken")

    with begun(model, batch, keep=0.5), hooked([pair.consumer.register_forward_hook(broken)]):
        with pytest.raises(RuntimeError, match="broken"):
            step_of(model, batch)
        assert pair.consumer.get_base_layer().weight is whole


def test_training_draws_the_same_numbers_with_and_without_calibration(batch, trainer_of):
    losses = []
    for callbacks in ((), (SparseChannels(SparseConfig(keep=1.0, start=0.0)),)):
        torch.manual_seed(0)
        trainer = trainer_of(adapted_model("spikegpt-lora"), *callbacks)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_calibration_does_not_see_what_adapters_have_learned(batch):
    model, loader = adapted_model("spikegpt-lora"), None
    pairs = find_pairs(model)
    loader = [{name: x for name, x in batch.items()}]
    before = calibrated_scores(model, pairs, loader)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.mul_(3)
    after = calibrated_scores(model, pairs, loader)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_mlps_that_are_not_known_are_named(batch):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Linear(6, 10), nn.Linear(10, 2)

        def forward(self, x):
            return self.narrow(self.wide(x).relu())

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Other(), Other()

    pairs = find_pairs(Net(), {r".*\.wide": "narrow"})
    assert [(pair.name, pair.channels) for pair in pairs] == [("first.narrow", 10), ("second.narrow", 10)]
    with pytest.raises(ValueError, match="no 'absent' beside what"):
        find_pairs(Net(), {r".*\.wide": "absent"})
    with pytest.raises(ValueError, match="holds no MLP that is known"):
        find_pairs(Net())


def test_a_gate_whose_threshold_is_moved_is_refused(trainer_of):
    model = adapted_model("spikegpt-spikelora")
    with pytest.raises(ValueError, match="SparsityCallback moves thresholds"):
        trainer_of(model, SparseChannels(), SparsityCallback(0.9)).train()


def test_dora_is_refused_by_name(batch):
    model = adapted_model("llama").unload()
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", use_dora=True))
    with pytest.raises(ValueError, match="Dora looks at whole weights"):
        begun(model, batch)


def test_packed_weights_are_refused_by_name(batch):
    model = adapted_model("llama")

    class Linear4bit(nn.Linear):
        pass

    class Packed(nn.Parameter):
        pass

    base = find_pairs(model)[0].consumer.get_base_layer()
    base.__class__ = Linear4bit
    base._parameters["weight"] = Packed(base.weight.data, requires_grad=False)
    with pytest.raises(ValueError, match="got Linear4bit, whose weight is packed"):
        begun(model, batch)


def test_several_processes_choose_the_same_channels_or_none(batch):
    sparse = SparseChannels(SparseConfig(select="svd"))
    with pytest.raises(ValueError, match="train in one process"):
        sparse.on_train_begin(Two(), None, None, model=adapted_model("llama"))
    assert SparseChannels().shared


def test_a_layer_that_there_is_not_is_refused(batch):
    with pytest.raises(ValueError, match=r"layers must be in 0 \.\.\. 2, got 3"):
        begun(adapted_model("llama"), batch, layers=[1, 3])


@pytest.mark.parametrize(
    "values, said",
    [
        ({"keep": 0.0}, "keep must be in"),
        ({"select": "best"}, "select must be one of static"),
        ({"layers": "some"}, "layers must be all, all_but_first or numbers"),
        ({"start": 0.5, "end": 0.5}, "start must be in"),
        ({"rank": 0, "refresh": 0}, "rank must be >= 1, got 0; refresh must be"),
    ],
)
def test_settings_out_of_range(values, said):
    with pytest.raises(ValueError, match=said):
        SparseConfig(**values)


def test_a_state_from_before_is_refused_where_it_holds_all_channels(batch):
    model = adapted_model("spikegpt-rows")
    state = model.eval()(**batch, use_cache=True).state
    model.train()
    with begun(model, batch, keep=0.5), pytest.raises(ValueError, match="begins at a text's start, got a state"):
        model(**batch, state=state)
