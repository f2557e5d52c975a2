"""A gate before the backward pass: of all batches, some are worth one.

    accept a batch where its score > mean + offset;    after each one  offset += gain * spread * (accepted - rate)

mean, spread: of the scores so far, the older the less; the mean distance from the mean. Scores: "novelty", the share of
the head's gradient that lies outside what the accepted ones span so far; its "norm"; the "loss"; or "random". Source:
SLoRA (2025; a gradient-novelty gate), with its controller's sign put right and Frequent Directions as published
(Ghashami et al. 2016, arXiv 1501.01711). For a vocabulary the gradient is a TensorSketch (Pham & Pagh 2013) of some
tokens'.

A rejected batch costs a forward, an accepted one a forward and a backward: at a share a of accepted batches a step
costs (1 + a) / 2 of what it did. A schedule of the same time has (1 + a) / (2 a) times as many updates: compare with
that.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.trainer_callback import ExportableState

from ...forward import hooked, token_model
from ...model import SpikeGPTModel
from ...utils.checks import check
from .step_change import StepChange

SCORES = ("novelty", "loss", "norm", "random")
GAIN, MEMORY = 0.2, 0.95  # of the controller; of the running mean and spread of scores
HEADS = ("score", "classifier")


class FrequentDirections:
    """A sketch B `(size, d)` of all rows a that were added: ||A'A - B'B|| <= ||A||_F^2 / (size + 1).

    Args:
        size: rows that are kept.
        decay: what the energy of older rows is multiplied by when one is added; 1: nothing is forgotten.
    """

    def __init__(self, size: int, decay: float = 1.0) -> None:
        self.size, self.decay = size, decay
        self.rows = torch.empty(0, 0)  # B's that are not 0, orthogonal to each other, largest first

    def novelty(self, row: Tensor) -> float:
        """Share of `row`'s norm that lies outside the span of B, in [0, 1]; 1 where B is empty, 0 for a row of 0."""
        norm = float(row.norm())
        if norm == 0:
            return 0.0
        if not len(self.rows):
            return 1.0
        basis = F.normalize(self.rows, dim=1)
        return min(1.0, float((row - (basis @ row) @ basis).norm()) / norm)

    def add(self, row: Tensor) -> None:
        rows = row[None] if not len(self.rows) else torch.cat([self.rows * math.sqrt(self.decay), row[None]])
        energy, vectors = torch.linalg.eigh((rows @ rows.t()).double())  # of (size + 1)^2 numbers; smallest first
        energy, vectors = energy.flip(0).clamp(min=0), vectors.flip(1)
        kept = energy - (energy[self.size] if len(energy) > self.size else 0)
        real = kept > 1e-12 * energy[0]
        scale = (kept[real] / energy[real]).sqrt()
        self.rows = (scale[:, None] * (vectors[:, real].t() @ rows.double())).to(row.dtype)


class TensorSketch:
    """Sums of outer products e (x) h as `size` numbers, without forming them: inner products stay as they are, in the
    mean over the hash functions.

    Args:
        left, right: lengths of e and of h.
    """

    def __init__(self, left: int, right: int, size: int = 512, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.size, self.tables = size, []
        for length in (left, right):
            bucket = torch.randint(size, (length,), generator=generator)
            sign = torch.randint(2, (length,), generator=generator).float() * 2 - 1
            self.tables.append((bucket, sign))

    def __call__(self, e: Tensor, h: Tensor) -> Tensor:
        """e `(N, left)`, h `(N, right)` -> the sketch of the sum over N, `(size,)`."""
        spectra = []
        for x, (bucket, sign) in zip((e, h), self.tables):
            counted = x.new_zeros(self.size, len(x)).index_add_(0, bucket.to(x.device), (x * sign.to(x)).t())
            spectra.append(torch.fft.rfft(counted, dim=0))
        return torch.fft.irfft((spectra[0] * spectra[1]).sum(dim=1), n=self.size)


class SkipBatches(StepChange, ExportableState):
    """A Trainer's callback, see the top of this file. Batches are judged as they come, each micro-batch of a step too;
    the learning rate falls with the steps seen.

    Args:
        rate: share of the batches that are to be accepted, in (0, 1].
        score: what they are chosen by, one of SCORES.
        directions, decay: of `FrequentDirections`.
        tokens: of a language model's batch, how many the sketch reads, evenly spread.

    Raises:
        ValueError: values out of range. When the training begins: no head whose gradient is known; several processes,
            where one would wait for another's gradients.
        FloatingPointError: a score that is not finite.
    """

    def __init__(
        self, rate: float, score: str = "novelty", directions: int = 32, decay: float = 0.98, tokens: int = 128
    ) -> None:
        super().__init__()
        self.rate, self.score, self.directions, self.decay, self.tokens = rate, score, directions, decay, tokens
        rules = [
            ("rate", "in (0, 1]", 0 < rate <= 1),
            ("score", f"one of {', '.join(SCORES)}", score in SCORES),
            ("decay", "in (0, 1]", 0 < decay <= 1),
            *((name, ">= 1", getattr(self, name) >= 1) for name in ("directions", "tokens")),
        ]
        check(self, rules)
        self.seen, self.accepted = 0, 0
        self.offset, self.mean, self.spread = 0.0, 0.0, 0.0
        self.known: list[list[float]] = []  # the sketch's rows, where a checkpoint keeps them
        self.last_score = self.last_norm = math.nan  # of the newest batch; the norm of its head's gradient
        self.sketch = FrequentDirections(directions, decay)

    def state(self) -> dict:
        names = ("rate", "score", "directions", "decay", "tokens")
        kept = {name: getattr(self, name) for name in ("seen", "accepted", "offset", "mean", "spread")}
        return {
            "args": {name: getattr(self, name) for name in names},
            "attributes": kept | {"known": self.sketch.rows.tolist()},
        }

    def begin(self, model, seed=0, batches=None):
        if self.known:
            self.sketch.rows = torch.tensor(self.known)
        self.seed = seed
        self.head = None if self.score in ("loss", "random") else _head(model)
        self.vocabulary: TensorSketch | None = None
        self.read: Tensor | None = None  # by the head
        self.opened.enter_context(hooked(self._hooks(model)))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.seen and "loss" in (logs or {}):
            state.log_history[-1]["accepted"] = self.accepted / self.seen

    def decide(self, score: float) -> bool:
        """Whether a batch of this score is accepted; the threshold moves.

        Raises:
            FloatingPointError: it is not finite.
        """
        if not math.isfinite(score):
            raise FloatingPointError(f"the batch's {self.score} is {score}: the training has diverged")
        first = self.seen == 0
        self.mean = score if first else self.mean
        accepted = score > self.mean + self.offset or self.rate == 1 or first
        self.mean += (1 - MEMORY) * (score - self.mean)
        self.spread += (1 - MEMORY) * (abs(score - self.mean) - self.spread)
        self.offset += GAIN * (self.spread or abs(score)) * (accepted - self.rate)
        self.seen, self.accepted = self.seen + 1, self.accepted + accepted
        return accepted

    def _hooks(self, model: nn.Module):
        if isinstance(self.head, nn.Module):
            inner = token_model(model)
            if isinstance(inner, SpikeGPTModel):  # whose head is not always called
                yield inner.register_forward_hook(self._see_hidden)
            else:
                yield self.head.register_forward_pre_hook(self._see_input)
        yield model.register_forward_hook(self._gate, with_kwargs=True)

    def _see_hidden(self, module, args, output) -> None:
        self.read = output.last_hidden_state.detach()

    def _see_input(self, module, args) -> None:
        self.read = args[0].detach()

    def _gate(self, model: nn.Module, args: tuple, given: dict, output: Any):
        """What `model` gave, its loss cut off from the graph where the batch is rejected."""
        if not (model.training and torch.is_grad_enabled()):
            return None
        loss = output["loss"] if isinstance(output, dict) else output[0]
        if loss is None or loss.dim():
            raise ValueError("SkipBatches reads the loss that the model gives for labels, and got none")
        self.last_score = self._score_of(loss, output, given)
        if self.decide(self.last_score):
            if self.score == "novelty":
                self.sketch.add(self._gradient_now)
            return None
        loss = loss.detach().requires_grad_() * 1.0  # a leaf could not be scaled in place
        if not isinstance(output, dict):
            return (loss, *output[1:])
        output["loss"] = loss
        return output

    def _score_of(self, loss: Tensor, output: Any, given: dict) -> float:
        if self.score == "random":
            drawn = torch.Generator().manual_seed(1_000_003 * self.seed + self.seen)
            return float(torch.rand((), generator=drawn))
        if self.score == "loss":
            return float(loss.detach())
        self._gradient_now = gradient = self._gradient(loss, output, given)
        self.last_norm = float(gradient.norm())
        return self.last_norm if self.score == "norm" else self.sketch.novelty(gradient)

    def _gradient(self, loss: Tensor, output: Any, given: dict) -> Tensor:
        """Of the head's weight: exact where it is trained, else a sketch; flat, on the CPU."""
        if isinstance(self.head, nn.Parameter):
            (gradient,) = torch.autograd.grad(loss, self.head, retain_graph=True)
            return gradient.detach().float().flatten().cpu()
        logits = (output["logits"] if isinstance(output, dict) else output[1]).detach()
        return self._sketched(logits[:, :-1], self.read[:, :-1], given["labels"][:, 1:])

    def _sketched(self, logits: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
        places = (labels != -100).nonzero()
        some = places[torch.linspace(0, len(places) - 1, min(self.tokens, len(places))).long()].unbind(dim=1)
        e = logits[some].float().softmax(dim=-1)
        e[torch.arange(len(e)), labels[some]] -= 1
        h = hidden[some].float()
        if self.vocabulary is None:
            self.vocabulary = TensorSketch(e.shape[1], h.shape[1])
        return self.vocabulary(e, h).cpu() / len(e)


def _head(model: nn.Module) -> nn.Parameter | nn.Module:
    """The weight of a trained classifier, or the module that gives a language model's logits."""
    for path, module in reversed(list(model.named_modules())):
        if isinstance(module, nn.Linear) and module.weight.requires_grad and set(HEADS) & set(path.split(".")):
            return module.weight
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no trained {' or '.join(HEADS)}, nor a language model's head, whose gradient "
            'could be looked at: use score="loss" or "random"'
        )
    return head
