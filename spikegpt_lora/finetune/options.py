"""Settings of one fine-tuning, those of the SpikeLoRA authors, and trials around them."""

import math
import random
from dataclasses import dataclass, replace

from ..utils.checks import check


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
    spike_penalty: float | None = None  # price of what matrices read, see `spike_penalty`
    teacher_share: float = 0.5  # of the loss, where sentences have a teacher's answers; the rest is of their labels
    temperature: float = 2.0  # of these answers, see `teacher`
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
            ("spike_penalty", ">= 0 and finite", 0 <= (self.spike_penalty or 0) < math.inf),
            ("temperature", "> 0 and finite", 0 < self.temperature < math.inf),
            ("teacher_share", "in [0, 1]", 0 <= self.teacher_share <= 1),
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

# Of each setting, what trials take; learning rates as factors.
TRIAL_VALUES = {
    "learning_rate": (1 / 3, 1 / 2, 1, 2),
    "epochs": (3, 4, 5),
    "dropout": (0.1, 0.2, 0.3),
    "word_dropout": (0.0, 0.1, 0.2),
    "warmup": (0.06, 0.2),
    "rank": (8, 16, 32),
}


def sample_trial(options: FinetuneOptions, trial: int) -> FinetuneOptions:
    """Trial 0 is `options` themselves. The others are spread evenly: of each setting, every value of `TRIAL_VALUES`
    once, in an order of its own, before one comes again; the same for every method."""
    if trial == 0:
        return options
    values = {}
    for name, choices in TRIAL_VALUES.items():
        cycle, place = divmod(trial - 1, len(choices))
        order = random.Random(f"{name} {3 * cycle}")  # with this seed the first 30 trials all differ
        values[name] = order.sample(choices, len(choices))[place]
    return replace(options, **values | {"learning_rate": options.learning_rate * values["learning_rate"]})
