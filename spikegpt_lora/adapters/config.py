"""SpikeLoraConfig: LoraConfig plus the spiking gate's settings, saved in adapter_config.json."""

import logging
import re
from dataclasses import dataclass, field, fields
from typing import get_type_hints

from peft import LoraConfig
from peft.utils import PeftType

from ..neurons.lif import NeuronParameters
from ..utils.checks import check, kinds
from .fingerprint import FORM
from .gate import KINDS as GATES
from .gate import SpikeGate

logger = logging.getLogger(__name__)

# peft matches a regular expression against the whole module name. "all-linear" needs no entry: it is peft's own word,
# and on SpikeGPT adds att.output to these.
PRESETS = {"rkv+srffn": r"(.*\.)?blocks\.\d+\.(att|ffn)\.(receptance|key|value)"}


LEARN = ("none", "threshold", "tau", "both")
# Of init_lora_weights. PiSSA, OLoRA and the like take B A out of W0; through a gate, nothing puts it back.
KEEP_BASE = (True, False, "gaussian")

# Where peft takes something else than what it annotates.
KINDS = {
    "lora_alpha": float,
    "rank_pattern": dict,
    "alpha_pattern": dict[str, float],
    "init_lora_weights": bool | str,
}


def add_peft_type(name: str) -> PeftType:
    """Add a member to peft's enumeration of methods, which peft offers no call for; done once a process."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


SPIKELORA = add_peft_type("SPIKELORA")


@dataclass
class SpikeLoraConfig(LoraConfig):
    """Configuration of SpikeLoRA: h = W0 x + s B (SN(A x) * A x), SN a spiking gate (`gate.SpikeGate`).

    Every field of `peft.LoraConfig` keeps its meaning; s = lora_alpha / r. `target_modules` defaults to R/K/V of
    SRWKV and SRFFN on a SpikeGPT ("rkv+srffn"); "all-linear" adds att.output.

    Raises:
        ValueError: a setting of another type or out of range, DoRA or initial values that change W0 together with the
            gate, or target_parameters; one message lists every problem.
    """

    use_spikelora: bool = field(
        default=True,
        metadata={"help": "Gate A x with spikes; False is stock LoRA, bit for bit.", "is_lora_variant": True},
    )
    spikelora_time: str = field(
        default="pointwise",
        metadata={
            "help": '"pointwise": one step from rest at each token (the authors\' code); "token": the membrane leaks '
            "and integrates along the sequence."
        },
    )
    spikelora_gate: str = field(
        default="graded",
        metadata={
            "help": '"graded": spike times activation goes to B (the paper); "binary": the spike alone, so that B x is '
            'a sum of columns; "integer": 0 ... 3 spikes a unit and token, in pointwise time.'
        },
    )
    spikelora_v_threshold: float = field(
        default=0.1,
        metadata={"help": "Threshold V_theta of the membrane: from rest, a unit fires at A x >= tau * V_theta."},
    )
    spikelora_tau: float = field(default=2.0, metadata={"help": "Membrane time constant in tokens, > 1."})
    spikelora_v_reset: float | None = field(
        default=0.0, metadata={"help": "Membrane after a spike, and at rest; None: a spike subtracts the threshold."}
    )
    spikelora_surrogate_alpha: float = field(default=2.0, metadata={"help": "Sharpness of the ATan surrogate."})
    spikelora_detach_reset: bool = field(default=True, metadata={"help": "No gradient through the reset."})
    spikelora_learn: str = field(
        default="none", metadata={"help": 'What of the gate is trained: "none", "threshold", "tau" or "both".'}
    )
    spikelora_per_rank: bool = field(
        default=False, metadata={"help": "Learn a threshold and a tau for each unit, not for each module."}
    )
    spikelora_target_sparsity: float | None = field(
        default=None,
        metadata={"help": "Share of silent gate outputs that `SparsityController` holds by moving the thresholds."},
    )
    spikelora_base_fingerprint: str | None = field(
        default=None,
        metadata={
            "help": "Weights of the base model, written when the adapter is saved and compared when it is loaded (see "
            "`fingerprint`); None: not compared."
        },
    )

    def __post_init__(self) -> None:
        check(self, self._types())
        if isinstance(self.target_modules, str):
            self.target_modules = PRESETS.get(self.target_modules, self.target_modules)
        super().__post_init__()
        self.peft_type = SPIKELORA
        check(self, self._ranges())

    def _types(self) -> list[tuple[str, str, bool]]:
        saved = self.spikelora_base_fingerprint
        return kinds(self, get_type_hints(type(self)) | KINDS) + [
            (
                "spikelora_base_fingerprint",
                "as saving writes it",
                not isinstance(saved, str) or bool(re.fullmatch(FORM, saved)),
            ),
            (
                "target_parameters",
                "None (parameters have no gate: name layers in target_modules)",
                not self.target_parameters,
            ),
        ]

    def _ranges(self) -> list[tuple[str, str, bool]]:
        plain, rest = not self.use_spikelora, self.neuron.rest
        learned, target = self.spikelora_learn, self.spikelora_target_sparsity
        integer = self.spikelora_gate == "integer"
        return [
            ("r", ">= 1", self.r >= 1),
            ("lora_alpha", "> 0", self.lora_alpha > 0),
            ("alpha_pattern", "> 0 everywhere", all(alpha > 0 for alpha in (self.alpha_pattern or {}).values())),
            ("lora_dropout", "in [0, 1)", 0 <= self.lora_dropout < 1),
            *self.neuron.rules("spikelora_", fires_at_rest=True),
            ("spikelora_time", "'pointwise' or 'token'", self.spikelora_time in ("pointwise", "token")),
            ("spikelora_gate", f"one of {', '.join(GATES)}", self.spikelora_gate in GATES),
            ("spikelora_time", "'pointwise' with an integer gate", not integer or self.spikelora_time == "pointwise"),
            (
                "spikelora_v_threshold",
                "above spikelora_v_reset with an integer gate",
                not integer or self.spikelora_v_threshold > rest,
            ),
            ("spikelora_learn", f"one of {', '.join(LEARN)}", learned in LEARN),
            (
                "spikelora_v_threshold",
                "above spikelora_v_reset to be learned",
                learned not in ("threshold", "both") or self.spikelora_v_threshold > rest,
            ),
            ("spikelora_target_sparsity", "in (0, 1), or None", target is None or 0 < target < 1),
            (
                "spikelora_target_sparsity",
                "None where the threshold is learned",
                target is None or learned not in ("threshold", "both"),
            ),
            ("use_dora", "False with the gate", plain or not self.use_dora),
            (
                "init_lora_weights",
                "True, False or 'gaussian' with the gate",
                plain or self.init_lora_weights in KEEP_BASE,
            ),
        ]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As peft's; what is wrong in a file is said with its folder."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except ValueError as error:
            raise ValueError(f"the adapter in {pretrained_model_name_or_path}: {error}") from error

    @classmethod
    def from_peft_type(cls, **kwargs) -> LoraConfig:
        """A configuration from what a file holds. Called on this class, a file of peft_type LORA will do: one that the
        SpikeLoRA authors' fork wrote, or stock LoRA's, which is use_spikelora=False."""
        if kwargs.get("peft_type") == "LORA":
            kwargs.pop("peft_type")
            kwargs.setdefault("use_spikelora", False)
            kind = "of the authors' fork" if kwargs["use_spikelora"] else "of stock LoRA"
            logger.warning("read an adapter %s (peft_type LORA) as SPIKELORA; saving it writes the new type", kind)
        return super().from_peft_type(**kwargs)

    @property
    def neuron(self) -> NeuronParameters:
        """The settings of its gates' neurons; they always divide their input by tau."""
        names = [one.name for one in fields(NeuronParameters) if one.name != "decay_input"]
        return NeuronParameters(**{name: getattr(self, f"spikelora_{name}") for name in names})

    def gate(self, units: int, adapter: str) -> SpikeGate:
        """The gate of one module's adapter of rank `units`."""
        return SpikeGate(
            units,
            adapter,
            kind=self.spikelora_gate,
            time=self.spikelora_time,
            learn=self.spikelora_learn,
            per_rank=self.spikelora_per_rank,
            settings=self.neuron,
        )

    def leaves_base_alone(self) -> bool:
        """Whether putting the adapter in leaves W0 what it was."""
        return self.init_lora_weights in KEEP_BASE and self.kasa_config is None
