"""Language-model pre-training on a row of tokens: warm-up, a stable stretch, decay; resumable to the step.

The text is cut into `batch_size` streams that are read side by side, `length` tokens a step. The model is recurrent, so
its state goes on from step to step: it sees contexts longer than the gradient does. Several texts are read side by side
too, each by streams of its own: how many is its weight.

The rate is constant for most of the way (warm-up/stable/decay, Hu et al. 2024, arXiv 2404.06395). So a finished run can
be made longer: what `stable.safetensors` holds is from just before the decay, and a longer run starts from there.
"""

import copy
import csv
import hashlib
import io
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..config import SPIKING
from ..model import SpikeGPTForCausalLM, SpikeGPTState
from ..utils.checks import check
from ..utils.errors import DamagedFile
from ..utils.files import whole_file, write_text
from ..utils.inputs import require_finite
from ..utils.saved import weights_digest
from .perplexity import divergence, next_token_loss
from .sentence_pairs import SentencePairs

LOG_EVERY = 50  # steps
NEWEST, STABLE = FILES = ("training.safetensors", "stable.safetensors")  # STABLE: from just before the decay
FACTS = {"step", "seconds", "log", "losses", "options", "identity"}  # beside the tensors in both


@dataclass
class PretrainOptions:
    """Settings of one run; the same ones, and the same tokens, give the same curve on one CPU.

    Raises:
        ValueError: values out of range; one message lists them all.
    """

    steps: int
    batch_size: int = 16  # streams
    length: int = 128  # tokens that a gradient reaches back
    learning_rate: float = 3e-3
    warmup: int = 100  # steps
    decay: float = 0.2  # share of the steps
    weight_decay: float = 0.1  # of the matrices
    max_grad_norm: float = 1.0
    bf16: bool = False
    seed: int = 0
    pairs: int = 0  # of neighbouring sentences that a step compares, see `sentence_pairs`

    def __post_init__(self):
        rules = [(name, ">= 1", getattr(self, name) >= 1) for name in ("steps", "batch_size", "length", "warmup")]
        rules += [
            ("pairs", "0 or >= 2", self.pairs == 0 or self.pairs >= 2),
            ("learning_rate", "> 0 and finite", 0 < self.learning_rate < math.inf),
            ("decay", "in [0, 1]", 0 <= self.decay <= 1),
        ]
        check(self, rules)

    @property
    def decay_start(self) -> int:
        """The first step of the decay: up to it, runs of different `steps` are one."""
        return self.steps - round(self.decay * self.steps)

    def rate(self, step: int) -> float:
        """Learning rate at `step`, 0 <= step < steps."""
        left = (self.steps - step) / max(1, self.steps - self.decay_start)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, left)


class Streams:
    """`batch_size` streams through `tokens`, from a place that differs by epoch; a function of the step alone."""

    def __init__(self, tokens: np.ndarray, batch_size: int, length: int, seed: int):
        self.tokens, self.batch_size, self.length, self.seed = tokens, batch_size, length, seed
        self.per_epoch = (len(tokens) // batch_size - 1) // length
        if self.per_epoch < 1:
            raise ValueError(
                f"{batch_size} streams of {length} tokens need {batch_size * (length + 1):,} tokens, "
                f"got {len(tokens):,}"
            )

    def __getitem__(self, step: int) -> Tensor:
        """Ids `(batch_size, length + 1)`, the last one to be predicted only."""
        epoch, position = divmod(step, self.per_epoch)
        start = int(np.random.default_rng((self.seed, epoch)).integers(len(self.tokens)))
        stream = len(self.tokens) // self.batch_size
        first = start + np.arange(self.batch_size)[:, None] * stream + position * self.length
        where = (first + np.arange(self.length + 1)) % len(self.tokens)
        return torch.from_numpy(self.tokens[where].astype(np.int64))


class Pretraining:
    """One run: model, optimizer, streams, and how far it is.

    Args:
        model: as it is initialised, or trained already; trained in place.
        tokens: token ids `(N,)`; or several texts, each with the number of streams that read it, `batch_size` in all.
        options: see `PretrainOptions`.
        tokenizer: the one that made the tokens; needed where sentences are compared (`options.pairs`).
        teacher: a language model to be imitated: then the loss is `perplexity.divergence` from it.

    Raises:
        ValueError: too few tokens, or pairs of sentences, for one step.
    """

    def __init__(
        self,
        model: SpikeGPTForCausalLM,
        tokens: np.ndarray | Sequence[tuple[np.ndarray, int]],
        options: PretrainOptions,
        tokenizer: PreTrainedTokenizerBase | None = None,
        teacher: SpikeGPTForCausalLM | None = None,
    ):
        torch.manual_seed(options.seed)
        texts = [(tokens, options.batch_size)] if isinstance(tokens, np.ndarray) else tokens
        if (streams := sum(number for _, number in texts)) != options.batch_size:
            raise ValueError(f"the texts must be read by {options.batch_size} streams in all, got {streams}")
        self.pairs = None
        if options.pairs:
            everything = np.concatenate([text for text, _ in texts])
            self.pairs = SentencePairs(everything, tokenizer, options.pairs, model.config.n_embd, options.seed)
            self.pairs.to(model.device)
        self.model, self.options = model, options
        self.identity = {
            "tokens": _digest(texts[0][0]) if len(texts) == 1 else [[_digest(text), number] for text, number in texts],
            **{name: getattr(model.config, name) for name in ("vocab_size", "n_layer", "n_embd", "n_ffn", "dropout")},
            **{name: getattr(model.config, name) for name in SPIKING},
            "teacher": None if teacher is None else weights_digest(teacher),
        }
        self.teacher = None if teacher is None else teacher.eval()
        self.streams = [Streams(text, number, options.length, options.seed) for text, number in texts]
        self.trained = {f"model.{name}": p for name, p in model.named_parameters()}
        if self.pairs is not None:
            self.trained |= {f"pairs.{name}": p for name, p in self.pairs.named_parameters()}
        self.optimizer = _optimizer(self.trained, options)
        self.step, self.seconds, self.log = 0, 0.0, []  # log: [step, mean loss(es) since the entry before, seconds]
        self.state: SpikeGPTState | None = None
        self.teachers_state: SpikeGPTState | None = None
        self._losses = []

    def train(self, directory: str | Path, save_seconds: float = 300.0) -> Iterator[float]:
        """Go on to the last step; yields the loss (nats a token, that of pairs not counted) after each. Saved to
        `directory` about every `save_seconds`, before the decay, and at the end.

        Raises:
            FloatingPointError: loss or gradient is not finite; what was saved before is still there.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".*.safetensors"):  # of a save that was killed
            leftover.unlink()
        self.model.train()
        saved = time.perf_counter()
        while self.step < self.options.steps:
            if self.step == self.options.decay_start:
                self.save(directory / STABLE)
            yield self._one_step()
            if time.perf_counter() - saved > save_seconds or self.step == self.options.steps:
                self.save(directory / NEWEST)
                saved = time.perf_counter()

    def _one_step(self) -> float:
        started = time.perf_counter()
        loss = self._loss(self.batch(self.step).to(self.model.device))
        loss.backward()
        losses = [loss.item()]
        if self.pairs is not None:
            pair_loss = self.pairs.loss(self.model, self.step, self.options.bf16)
            pair_loss.backward()
            losses.append(pair_loss.item())
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.options.max_grad_norm)
        if not (all(map(math.isfinite, losses)) and norm.isfinite()):
            raise FloatingPointError(
                f"loss {losses}, gradient norm {norm.item()} at step {self.step}: try a lower learning rate"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.seconds += time.perf_counter() - started
        self._losses.append(losses)
        if self.step % LOG_EVERY == 0:
            self.log.append([self.step, *(sum(column) / LOG_EVERY for column in zip(*self._losses)), self.seconds])
            self._losses = []
        return losses[0]

    def batch(self, step: int) -> Tensor:
        """Ids `(batch_size, length + 1)` of a step."""
        return torch.cat([streams[step] for streams in self.streams])

    def _loss(self, ids: Tensor) -> Tensor:
        if self.teacher is None:
            loss, self.state = next_token_loss(self.model, ids, self.state, self.options.bf16)
            return loss
        states = self.state, self.teachers_state
        loss, self.state, self.teachers_state = divergence(self.model, self.teacher, ids, *states, self.options.bf16)
        return loss

    def save(self, path: str | Path) -> None:
        """Everything that the rest of the run depends on, in one safetensors file."""
        tensors = {name: p.detach() for name, p in self.trained.items()}
        for index, entries in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in entries.items()}
        for part, state in (("state", self.state), ("teacher", self.teachers_state)):
            tensors |= {f"{part}.{name}": value for name, value in (state or {}).items()}
        tensors["rng"] = torch.get_rng_state()
        facts = {"step": self.step, "seconds": self.seconds, "log": self.log, "losses": self._losses}
        facts |= {"options": asdict(self.options), "identity": self.identity}
        with whole_file(path) as temporary:
            save_file(tensors, temporary, {"run": json.dumps(facts)})

    def resume(self, directory: str | Path) -> bool:
        """Go on from what `directory` holds of this run, or of a shorter one; False if it holds nothing.

        Raises:
            ValueError: it holds a run of other options, model or tokens, one that decayed before this one would, a
                longer one, or a damaged file.
        """
        held = [path for name in FILES if (path := Path(directory) / name).is_file()]
        for path in held:
            if self._goes_on_from(path):
                self._load(path)
                return True
        if held:
            raise ValueError(
                f"{directory} holds a shorter run whose decay begins before {self.options.decay_start} of these "
                f"{self.options.steps} steps: give more steps, or another directory"
            )
        return False

    def _goes_on_from(self, path: Path) -> bool:
        held = _facts(path)
        steps = held["options"].pop("steps")
        old, new = {"teacher": None} | held["options"] | held["identity"], asdict(self.options) | self.identity
        if changes := "; ".join(f"{key} was {old[key]}, is {new.get(key)}" for key in old if old[key] != new.get(key)):
            raise ValueError(f"{path.parent} holds a run of other settings ({changes}): give another directory")
        if steps > self.options.steps and held["step"] > self.options.decay_start:
            raise ValueError(
                f"{path.parent} holds a run of {steps} steps, {held['step']} of them done: ask for at least as many, "
                "or give another directory"
            )
        return steps == self.options.steps or held["step"] <= self._decay_start(steps)

    def _decay_start(self, steps: int) -> int:
        return min(replace(self.options, steps=steps).decay_start, self.options.decay_start)

    def _load(self, path: Path) -> None:
        facts, tensors = _facts(path), load_file(path, device=str(self.model.device))
        if missing := sorted({*self.trained, "rng"} - tensors.keys()):
            raise DamagedFile(f"{path} has no {', '.join(missing[:3])}: delete it, and the run begins anew")
        require_finite(tensors, f"{path}: what was trained")
        parts = {"optimizer": {}, "state": {}, "teacher": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if part in parts:
                parts[part][rest] = tensor
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(tensors[name])
        moments = {}
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        states = [SpikeGPTState(**parts[name]) if parts[name] else None for name in ("state", "teacher")]
        self.state, self.teachers_state = states
        torch.set_rng_state(tensors["rng"].cpu())
        self.step, self.seconds, self.log = facts["step"], facts["seconds"], facts["log"]
        self._losses = facts["losses"]


def _digest(tokens: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(tokens).data).hexdigest()


def bf16_of(directory: str | Path) -> bool | None:
    """Whether the run that `directory` holds computes in bfloat16; None where it holds none.

    Raises:
        ValueError: a damaged file.
    """
    held = [path for name in FILES if (path := Path(directory) / name).is_file()]
    return bool(_facts(held[0])["options"].get("bf16")) if held else None


def _facts(path: Path) -> dict:
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["run"])
        if missing := FACTS - facts.keys():
            raise KeyError(", ".join(sorted(missing)))
    except (SafetensorError, AttributeError, TypeError, KeyError, ValueError) as error:
        raise DamagedFile(f"{path} is no whole file of a training run ({error}): delete it") from error
    return facts


def _optimizer(parameters: dict[str, nn.Parameter], options: PretrainOptions) -> torch.optim.Optimizer:
    """AdamW that decays the blocks' matrices, and neither embedding, head nor vectors."""
    names = {name for name, p in parameters.items() if ".blocks." in name and p.ndim == 2}
    matrices = [p for name, p in parameters.items() if name in names]
    others = [p for name, p in parameters.items() if name not in names]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98), fused=True)


def save_rounded(model: SpikeGPTForCausalLM, directory: str | Path) -> SpikeGPTForCausalLM:
    """Write `model` in bfloat16, half the size; returns it as it will be read again: rounded, in float32.

    A config of float32 stays with the file, so that from_pretrained computes in float32 unless told otherwise.
    """
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    emb = rounded.spikegpt.emb.weight.data
    emb[(model.spikegpt.emb.weight < 0) & (emb == 0)] = -1e-30  # rounded to -0, it would fire: -0 >= 0
    rounded.save_pretrained(directory)
    rounded = rounded.float()
    rounded.config.dtype = torch.float32
    rounded.config.save_pretrained(directory)
    return rounded.eval()


def write_log(log: list[list[float]], path: str | Path) -> None:
    """The loss curve as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["step", "loss", "pair_loss", "seconds"] if log and len(log[0]) == 4 else ["step", "loss", "seconds"]
    writer.writerow(names)
    writer.writerows([step, *(f"{loss:.4f}" for loss in losses), f"{seconds:.0f}"] for step, *losses, seconds in log)
    write_text(path, text.getvalue())
