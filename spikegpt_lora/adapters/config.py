"""SpikeLoraConfig: LoraConfig plus the spiking gate's settings, saved in adapter_config.json."""

from dataclasses import dataclass, field

from peft import LoraConfig
from peft.utils import PeftType

from ..rules import check

# peft matches a regular expression against the whole module name. "all-linear" needs no entry: it is peft's own word,
# and on SpikeGPT adds att.output to these.
PRESETS = {"rkv+srffn": r"(.*\.)?blocks\.\d+\.(att|ffn)\.(receptance|key|value)"}


def _add_peft_type(name: str) -> PeftType:
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


SPIKELORA = _add_peft_type("SPIKELORA")


@dataclass
class SpikeLoraConfig(LoraConfig):
    """Configuration of SpikeLoRA: h = W0 x + s B (SN(A x) * A x), SN one LIF step from rest at each token.

    Every field of `peft.LoraConfig` keeps its meaning; s = lora_alpha / r. `target_modules` defaults to R/K/V of
    SRWKV and SRFFN on a SpikeGPT ("rkv+srffn"); "all-linear" adds att.output.

    Raises:
        ValueError: a gate setting out of range, or DoRA or initial values that change W0 together with the gate.
    """

    use_spikelora: bool = field(
        default=True,
        metadata={"help": "Gate A x with spikes; False is stock LoRA, bit for bit.", "is_lora_variant": True},
    )
    spikelora_time: str = field(
        default="pointwise",
        metadata={"help": '"pointwise": one step from rest at each token (the authors\' code). The only one so far.'},
    )
    spikelora_gate: str = field(
        default="graded",
        metadata={"help": '"graded": spike times activation goes to B (the paper). The only one so far.'},
    )
    spikelora_v_threshold: float = field(
        default=0.1,
        metadata={"help": "Threshold V_theta of the membrane: from rest, a unit fires at A x >= tau * V_theta."},
    )
    spikelora_tau: float = field(default=2.0, metadata={"help": "Membrane time constant in tokens, > 1."})
    spikelora_surrogate_alpha: float = field(default=2.0, metadata={"help": "Sharpness of the ATan surrogate."})

    def __post_init__(self):
        if isinstance(self.target_modules, str):
            self.target_modules = PRESETS.get(self.target_modules, self.target_modules)
        super().__post_init__()
        self.peft_type = SPIKELORA
        plain = not self.use_spikelora
        rules = [
            ("spikelora_tau", "> 1", self.spikelora_tau > 1),
            ("spikelora_v_threshold", ">= 0", self.spikelora_v_threshold >= 0),
            ("spikelora_surrogate_alpha", "> 0", self.spikelora_surrogate_alpha > 0),
            ("spikelora_time", "'pointwise'", self.spikelora_time == "pointwise"),
            ("spikelora_gate", "'graded'", self.spikelora_gate == "graded"),
            ("use_dora", "False with the gate", plain or not self.use_dora),
            ("init_lora_weights", "True, False or 'gaussian' with the gate", plain or self._leaves_the_base_alone()),
        ]
        check(self, rules)

    def _leaves_the_base_alone(self) -> bool:
        # PiSSA, OLoRA and the like take B A out of W0 at the start; through a gate, B A does not put it back.
        return isinstance(self.init_lora_weights, bool) or self.init_lora_weights == "gaussian"
