"""The methods of fine-tuning, one row each; a method of your own is a row in `METHODS` and what it prepares.

full        everything is trained
lora        h = W0 x + s B A x: adapters and `score` (Hu et al. 2021)
spikelora   h = W0 x + s B (SN(A x) * A x): the same with a spiking gate (`adapters`)
head        `score` alone; the rest stays frozen
scratch     everything, from new initial values but for `score`'s
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback

from ..adapters import SparsityCallback, SpikeLoraConfig, fused
from ..adapters.config import PRESETS
from ..model import SpikeGPTConfig, SpikeGPTForSequenceClassification
from .options import PARITY, PROTOCOL, FinetuneOptions

# Kinds of model that a method has settings for: the package's own, a random one, larger ones (216M).
MODELS = ("embedded", "random", "other")


def unchanged(model: SpikeGPTForSequenceClassification) -> nn.Module:
    return model


def frozen(model: SpikeGPTForSequenceClassification) -> nn.Module:
    model.spikegpt.requires_grad_(False)
    return model


def with_new_weights(model: SpikeGPTForSequenceClassification) -> nn.Module:
    new = SpikeGPTForSequenceClassification(model.config)
    new.score.load_state_dict(model.score.state_dict())
    return new


def lora(options: FinetuneOptions, **more) -> LoraConfig:
    return fused(LoraConfig(**_adapter(options) | more))


def spikelora(options: FinetuneOptions, **more) -> LoraConfig:
    """Raises ValueError for settings that the gate does not have."""
    names = ("v_threshold", "time", "gate", "learn", "target_sparsity")
    gate = {f"spikelora_{name}": getattr(options, name) for name in names}
    return SpikeLoraConfig(**_adapter(options) | gate | more)


def _adapter(options: FinetuneOptions) -> dict:
    return {
        "task_type": "SEQ_CLS",
        "r": options.rank,
        "lora_alpha": options.rank,
        "target_modules": PRESETS.get(options.targets, options.targets),
    }


def held_sparsity(options: FinetuneOptions) -> list[TrainerCallback]:
    return [SparsityCallback()] if options.target_sparsity else []


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    name, title: in commands and folders; in tables.
    settings: by kind of model (`MODELS`), what differs from the defaults of `FinetuneOptions`.
    prepare: the model that is trained, made from the one that all methods start from.
    adapter: the peft configuration that `options` ask for (`more` of its fields beside), where the method has adapters.
    callbacks: what its training calls beside the usual.
    record: what its record says beside the usual; "start" is how its card names what it began with.
    """

    name: str
    title: str
    settings: dict[str, dict]
    prepare: Callable[[SpikeGPTForSequenceClassification], nn.Module] = unchanged
    adapter: Callable[..., LoraConfig] | None = None
    callbacks: Callable[[FinetuneOptions], list[TrainerCallback]] = lambda options: []
    record: dict = field(default_factory=dict)

    def ready(self, model: SpikeGPTForSequenceClassification, options: FinetuneOptions) -> nn.Module:
        """`model` as the method trains it; raises ValueError where it takes no such adapter."""
        self.require(model.config, options)
        model = self.prepare(model)
        return model if self.adapter is None else get_peft_model(model, self.adapter(options))

    def require(self, config: SpikeGPTConfig, options: FinetuneOptions) -> None:
        """Raise ValueError where an adapter's rank exceeds both sides of every matrix that it could stand beside."""
        most = max(config.n_embd, config.n_ffn)
        if self.adapter is not None and options.rank > most:
            raise ValueError(f"rank must be <= {most}, the longest side of the model's matrices, got {options.rank}")


# Of the embedded model: the best of three trials a method on Subj's validation split, of the embedded model before
# (recipes/results/subj-reviews.md), V_theta so that 70 % of its graded gates were silent. Of a random one: the best of
# three rates, likewise. Of "other", larger models (216M): untested, no such model was available.
_ROWS = [
    Method(
        "full",
        "full fine-tuning",
        settings={
            "embedded": {"learning_rate": 1e-3, "word_dropout": 0.1, "warmup": 0.2},
            "random": {"learning_rate": 1e-2, "dropout": 0.2},
            "other": {"learning_rate": 5e-5, "dropout": 0.03},
        },
    ),
    Method(
        "lora",
        "LoRA",
        settings={
            "embedded": {"learning_rate": 3e-3},
            "random": {"learning_rate": 3e-3, "dropout": 0.2},
            "other": {"learning_rate": 3e-4, "dropout": 0.03},
        },
        adapter=lora,
    ),
    Method(
        "spikelora",
        "SpikeLoRA",
        settings={
            "embedded": {"learning_rate": 3e-3, "v_threshold": 0.65},
            "random": {"learning_rate": 3e-3, "dropout": 0.2},
            "other": {"learning_rate": 3e-4, "dropout": 0.03},
        },
        adapter=spikelora,
        callbacks=held_sparsity,
    ),
    Method(
        "head",
        "head only (frozen model)",
        settings={
            "embedded": {"learning_rate": 1e-2, "word_dropout": 0.1, "warmup": 0.2},
            "random": {"learning_rate": 3e-3, "dropout": 0.2},
            "other": {"learning_rate": 1e-3, "dropout": 0.03},
        },
        prepare=frozen,
    ),
    Method(
        "scratch",
        "full, from scratch",
        settings={
            "embedded": {"learning_rate": 3e-3, "word_dropout": 0.1, "warmup": 0.2},
            "random": {"learning_rate": 1e-2, "dropout": 0.2},
            "other": {"learning_rate": 1e-4, "dropout": 0.03},
        },
        prepare=with_new_weights,
        record={"start": "new weights in the shape of"},
    ),
]
METHODS = {method.name: method for method in _ROWS}


def resolve_options(
    model: str,
    parity: str | None = None,
    bf16: bool = False,
    changes: dict[str, list[dict]] | None = None,
    intermediate: bool = False,
) -> dict[str, FinetuneOptions]:
    """Of each method: its settings for `model` (one of `MODELS`), then what `parity` sets, then `changes`.

    Args:
        changes: by the option's name, values by method; where two name a method, that for fewer methods counts.
        intermediate: whether another task is trained on first, after which each method takes two epochs at half its
            rate.
    """
    authors = PARITY.get(parity, {})
    protocol = {key: value for key, value in authors.items() if key in PROTOCOL}
    resolved = {}
    for name, method in METHODS.items():
        values = {"bf16": bf16} | method.settings[model]
        if intermediate:
            values |= {"epochs": 2, "learning_rate": 0.5 * values["learning_rate"]}
        values |= protocol if method.adapter is None else authors
        for option, given in (changes or {}).items():
            for of_methods in sorted(given, key=len, reverse=True):
                if name in of_methods:
                    values[option] = of_methods[name]
        resolved[name] = FinetuneOptions(**values)
    return resolved
