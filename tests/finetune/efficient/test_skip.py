"""The gate before the backward: its sketches keep their bounds, its rate is held, a rejected step changes nothing."""

import math

import pytest
import torch
from efficient_models import adapted_model, nothing_left
from transformers import TrainerCallback

from spikegpt_lora import SpikeGPTConfig, SpikeGPTForCausalLM
from spikegpt_lora.finetune.efficient import SkipBatches
from spikegpt_lora.finetune.efficient.skip import SCORES, FrequentDirections, TensorSketch

SIZES = {"vocab_size": 37, "n_embd": 12, "n_layer": 2}


@pytest.mark.parametrize("size", [1, 2, 5, 8])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 12), (8, 8), (40, 1), (40, 5), (40, 12)])
def test_frequent_directions_keep_their_bound(size, rows, width):
    A = torch.randn(rows, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sketch = FrequentDirections(size)
    for row in A:
        sketch.add(row)
    B = sketch.rows
    error = torch.linalg.matrix_norm(A.t() @ A - B.t() @ B, 2)
    assert len(B) <= size and error <= A.square().sum() / (size + 1) * (1 + 1e-9)


def test_what_was_added_is_not_new_and_what_is_orthogonal_to_it_is():
    sketch, basis = FrequentDirections(4), torch.eye(6)
    assert sketch.novelty(basis[0]) == 1
    sketch.add(basis[0])
    sketch.add(2 * basis[1])
    assert sketch.novelty(basis[0] - basis[1]) == pytest.approx(0, abs=1e-6)
    assert sketch.novelty(basis[2]) == 1
    assert sketch.novelty(basis[0] + basis[2]) == pytest.approx(math.sqrt(0.5))
    assert sketch.novelty(torch.zeros(6)) == 0


def test_a_direction_that_keeps_coming_stays_known_among_many_others():
    """Which is what shrinking is for: a sketch that only replaced its smallest row would forget it."""
    generator, sketch = torch.Generator().manual_seed(0), FrequentDirections(4)
    often = torch.randn(64, generator=generator)
    for _ in range(200):
        sketch.add(often + 0.3 * torch.randn(64, generator=generator))
    assert sketch.novelty(often) < 0.1


def test_old_energy_decays():
    sketch = FrequentDirections(4, decay=0.25)
    for row in torch.eye(6)[:3]:
        sketch.add(row)
    assert sketch.rows.square().sum(dim=1).tolist() == pytest.approx([1, 0.25, 0.0625])


def test_a_tensor_sketch_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    e, h = torch.randn(5, 30, generator=generator), torch.randn(5, 12, generator=generator)
    f, k = torch.randn(5, 30, generator=generator), torch.randn(5, 12, generator=generator)
    exact = float(((e.t() @ h) * (f.t() @ k)).sum())
    found = []
    for seed in range(400):
        sketch = TensorSketch(30, 12, 128, seed)
        found.append(float(sketch(e, h) @ sketch(f, k)))
    found = torch.tensor(found)
    assert abs(float(found.mean()) - exact) < 3 * float(found.std()) / 20


@pytest.mark.parametrize("drift", [0.0, 0.01, -0.01])
@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.7])
def test_the_rate_is_held(rate, drift):
    generator, gate = torch.Generator().manual_seed(0), SkipBatches(rate, "loss")
    accepted = [gate.decide(float(torch.randn((), generator=generator)) + drift * step) for step in range(400)]
    assert sum(accepted[200:]) / 200 == pytest.approx(rate, abs=0.05)


def test_scores_that_are_all_equal_hold_the_rate_too():
    gate = SkipBatches(0.3, "loss")
    accepted = [gate.decide(1.0) for _ in range(400)]
    assert sum(accepted[200:]) / 200 == pytest.approx(0.3, abs=0.05)


def test_a_score_that_is_not_finite_is_an_error():
    with pytest.raises(FloatingPointError, match="loss is nan"):
        SkipBatches(0.3, "loss").decide(float("nan"))


class Weights(TrainerCallback):
    """Of each step: whether the batch was accepted, and the weights after it."""

    def __init__(self, gate):
        self.gate, self.steps = gate, []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        before = self.steps[-1][1] if self.steps else 0
        weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        self.steps.append((self.gate.accepted, self.gate.accepted if self.gate.accepted != before else before, weights))
        self.optimizer = optimizer


@pytest.mark.parametrize("score", SCORES)
def test_a_rejected_batch_changes_no_weight_and_no_moment(score, trainer_of):
    model, gate = adapted_model("spikegpt-lora"), SkipBatches(0.4, score)
    seen = Weights(gate)
    trainer = trainer_of(model, gate, seen, max_steps=20, weight_decay=0.1)
    trainer.train()
    for before, after in zip(seen.steps, seen.steps[1:]):
        assert torch.equal(before[2], after[2]) == (before[0] == after[0])
    assert 0 < gate.accepted < 20
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {gate.accepted}


@pytest.mark.parametrize("score", SCORES)
def test_all_accepted_is_the_training_without_a_gate(score, trainer_of):
    losses = []
    for callbacks in ((), (SkipBatches(1.0, score),)):
        torch.manual_seed(0)
        trainer = trainer_of(adapted_model("spikegpt-spikelora"), *callbacks)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["integer-spikelora", "llama", "bert", "gpt2"])
def test_every_kind_of_classifier_has_a_gradient_to_look_at(name, trainer_of):
    model, gate = adapted_model(name), SkipBatches(0.5)
    trainer = trainer_of(model, gate)
    trainer.train()
    assert gate.seen == 8 and "accepted" in trainer.state.log_history[-2]


def test_the_gradient_of_a_classifier_is_its_own(batch):
    model = adapted_model("spikegpt-lora")
    gate = SkipBatches(1.0, "norm")
    gate.begin(model)
    with gate:
        model(**batch).loss.backward()
    weight = next(p for name, p in model.named_parameters() if "score" in name and p.requires_grad)
    assert gate._gradient_now == pytest.approx(weight.grad.float().flatten())


def test_a_language_models_sketch_is_that_of_its_heads_gradient():
    torch.manual_seed(0)
    model = SpikeGPTForCausalLM(SpikeGPTConfig(**SIZES, dropout=0.0)).double()
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    ids = torch.randint(1, 37, (3, 8))
    labels = ids.clone()
    labels[0, 5:] = -100
    output = model(input_ids=ids, labels=labels)
    (exact,) = torch.autograd.grad(output.loss, model.head.weight, retain_graph=True)
    errors = []
    for size in (64, 4096):
        gate = SkipBatches(1.0, "norm")
        gate.head, gate.read = model.head, model.spikegpt(ids).last_hidden_state.detach()
        gate.vocabulary = TensorSketch(37, 12, size)
        found = gate._gradient(output.loss, output, {"labels": labels})
        errors.append(abs(float(found.norm()) / float(exact.norm()) - 1))
    assert errors[1] < 0.05 and errors[1] < errors[0]


@pytest.mark.parametrize("spikes", [{}, {"matrix_spikes": "integer"}])
def test_a_language_model_is_trained_with_a_gate(spikes, rows, trainer_of):
    torch.manual_seed(0)
    model = SpikeGPTForCausalLM(SpikeGPTConfig(**SIZES, **spikes))
    data = rows.map(lambda row: {"labels": row["input_ids"]})
    gate = SkipBatches(0.4)
    trainer_of(model, gate, data=data, max_steps=12).train()
    assert 0 < gate.accepted < 12 and nothing_left(model)


def test_a_training_that_goes_on_decides_as_if_it_had_not_stopped(rows, trainer_of, tmp_path):
    accepted = []
    for stop in (None, 5):
        torch.manual_seed(0)
        gate = SkipBatches(0.4)
        more = {"restore_callback_states_from_checkpoint": True, "max_steps": 12}
        model = adapted_model("spikegpt-lora")
        if stop is not None:
            first = trainer_of(model, gate, **more)
            first.add_callback(Stopping(stop))
            first.train()
            first._save_checkpoint(model, None)
            torch.manual_seed(0)
            model = adapted_model("spikegpt-lora")
        trainer = trainer_of(model, SkipBatches(0.4), **more)
        trainer.train(resume_from_checkpoint=None if stop is None else str(tmp_path / "trainer" / f"checkpoint-{stop}"))
        gate = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SkipBatches))
        accepted.append((gate.seen, gate.accepted, gate.offset))
    assert accepted[0] == accepted[1] and accepted[0][0] == 12


class Stopping(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize(
    "values, said",
    [
        ({"rate": 0.0}, "rate must be in"),
        ({"rate": 0.5, "score": "surprise"}, "score must be one of novelty, loss"),
        ({"rate": 0.5, "decay": 0.0, "directions": 0}, "decay must be in .* directions must be >= 1"),
    ],
)
def test_settings_out_of_range(values, said):
    with pytest.raises(ValueError, match=said):
        SkipBatches(**values)


def test_several_processes_are_refused():
    class Two:
        world_size = 2

    with pytest.raises(ValueError, match="train in one process"):
        SkipBatches(0.5).on_train_begin(Two(), None, None, model=adapted_model("llama"))


def test_a_model_without_a_head_that_is_known_is_told_what_remains():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match='use score="loss" or "random"'):
        SkipBatches(0.5).begin(model)
