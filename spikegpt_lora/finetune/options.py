"""Settings of fine-tuning: the defaults by model and method, the SpikeLoRA authors', and trials around them."""

import math
import random
from dataclasses import dataclass, replace

from ..utils.checks import check

METHODS = ("full", "lora", "spikelora", "head", "scratch")


@dataclass
class FinetuneOptions:
    """Settings of one run of one method.

    Raises:
        ValueError: values out of range; one message lists them all.
    """

    learning_rate: float
    epochs: int = 4
    batch_size: int = 32
    warmup: float = 0.06  # share of all steps
    schedule: str = "linear"  # down to 0, or "constant_with_warmup"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    dropout: float = 0.1  # after each block
    word_dropout: float = 0.0  # share of the tokens that do not exist in a training step
    rank: int = 16  # of adapters; the scaling alpha / rank is 1
    targets: str = "rkv+srffn"  # or "all-linear", which adds att.output
    v_threshold: float = 0.1  # of SpikeLoRA's gate, and the next four: see `SpikeLoraConfig`
    time: str = "pointwise"
    gate: str = "graded"
    learn: str = "none"
    target_sparsity: float | None = None
    bf16: bool = False
    keep: str = "best"  # epoch on the validation split, or "last"
    group_by_length: bool = True  # batches of sentences of similar length
    read_padding: bool = False  # as if it were text

    def __post_init__(self):
        rules = [
            ("learning_rate", "> 0 and finite", 0 < self.learning_rate < math.inf),
            *((name, ">= 1", getattr(self, name) >= 1) for name in ("epochs", "batch_size", "rank")),
            *((name, "in [0, 1)", 0 <= getattr(self, name) < 1) for name in ("warmup", "dropout", "word_dropout")),
            ("v_threshold", ">= 0 and finite", 0 <= self.v_threshold < math.inf),
            ("keep", "'best' or 'last'", self.keep in ("best", "last")),
        ]
        check(self, rules)


# What the SpikeLoRA authors' library does with adapters on Subj, and what their paper says (the rest is ours).
# Both scale adapters by 1: alpha 16 at rank 16, and rank-stabilised with alpha sqrt(8) at rank 8.
_AUTHORS = {"batch_size": 32, "weight_decay": 0.01, "max_grad_norm": 1.0, "dropout": 0.03, "word_dropout": 0.0}
PARITY = {
    "library": _AUTHORS
    | {
        "learning_rate": 1e-4,
        "schedule": "constant_with_warmup",
        "warmup": 0.0,
        "epochs": 20,
        "rank": 16,
        "targets": "rkv+srffn",
        "v_threshold": 0.25,
        "keep": "last",
        "group_by_length": False,
        "read_padding": True,
    },
    "paper": _AUTHORS | {"warmup": 0.06, "rank": 8, "targets": "all-linear", "v_threshold": 0.1},
}
PROTOCOL = ("keep", "group_by_length", "read_padding")  # of these, what holds for every method of a comparison

# Of the embedded model: the best of three trials a method on Subj's validation split (recipes/results/subj.md), V_theta
# so that 70 % of the gates are silent. Of a random one: the best of three rates, likewise. Of "other", larger models
# (216M): untested, no such model was available.
SETTINGS = {
    "embedded": {
        "full": {"learning_rate": 1e-3, "word_dropout": 0.1, "warmup": 0.2},
        "lora": {"learning_rate": 3e-3},
        "spikelora": {"learning_rate": 3e-3, "v_threshold": 0.65},
        "head": {"learning_rate": 1e-2, "word_dropout": 0.1, "warmup": 0.2},
        "scratch": {"learning_rate": 3e-3, "word_dropout": 0.1, "warmup": 0.2},
    },
    "random": {
        "full": {"learning_rate": 1e-2, "dropout": 0.2},
        "lora": {"learning_rate": 3e-3, "dropout": 0.2},
        "spikelora": {"learning_rate": 3e-3, "dropout": 0.2},
        "head": {"learning_rate": 3e-3, "dropout": 0.2},
        "scratch": {"learning_rate": 1e-2, "dropout": 0.2},
    },
    "other": {
        "full": {"learning_rate": 5e-5, "dropout": 0.03},
        "lora": {"learning_rate": 3e-4, "dropout": 0.03},
        "spikelora": {"learning_rate": 3e-4, "dropout": 0.03},
        "head": {"learning_rate": 1e-3, "dropout": 0.03},
        "scratch": {"learning_rate": 1e-4, "dropout": 0.03},
    },
}


def choose(
    model: str, parity: str | None = None, bf16: bool = False, changes: dict[str, list[dict]] | None = None
) -> dict[str, FinetuneOptions]:
    """Of each method: `SETTINGS[model]`, then what `parity` sets, then `changes`.

    Args:
        changes: by the option's name, values by method; where two name a method, that for fewer methods counts.
    """
    authors = PARITY.get(parity, {})
    protocol = {key: value for key, value in authors.items() if key in PROTOCOL}
    chosen = {}
    for method in METHODS:
        chosen[method] = {"bf16": bf16} | SETTINGS[model][method] | (authors if "lora" in method else protocol)
        for name, given in (changes or {}).items():
            for values in sorted(given, key=len, reverse=True):
                if method in values:
                    chosen[method][name] = values[method]
    return {method: FinetuneOptions(**values) for method, values in chosen.items()}


# What trials draw from; learning rates as factors.
DRAWN = {
    "learning_rate": (1 / 3, 1 / 2, 1, 2),
    "epochs": (3, 4, 5),
    "dropout": (0.1, 0.2, 0.3),
    "word_dropout": (0.0, 0.1, 0.2),
    "warmup": (0.06, 0.2),
    "rank": (8, 16, 32),
}


def drawn(options: FinetuneOptions, trial: int) -> FinetuneOptions:
    """Trial 0 is `options` themselves. The others are spread evenly: of each setting, every value of `DRAWN` once, in
    an order of its own, before one comes again; the same for every method."""
    if trial == 0:
        return options
    values = {}
    for name, choices in DRAWN.items():
        cycle, place = divmod(trial - 1, len(choices))
        order = random.Random(f"{name} {3 * cycle}")  # with this seed the first 30 trials all differ
        values[name] = order.sample(choices, len(choices))[place]
    return replace(options, **values | {"learning_rate": options.learning_rate * values["learning_rate"]})
