"""float32 or bfloat16: which one a training step is faster in, by processor, as far as it was measured.

bfloat16 is mixed precision (`torch.autocast`): matrix products and most of what stands between them round to bfloat16;
weights and the optimizer's state stay float32.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

CHOICES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Processor:
    """A row of the table.

    auto: the precision that is taken there where none is asked for.
    flags: what /proc/cpuinfo must say that a CPU has.
    float32_ms, bfloat16_ms: medians of a LoRA training step (4 layers x 256, batch 32 x 40) on one machine of the kind;
        None: not measured. recipes/README.md says where.
    """

    name: str
    auto: str
    flags: frozenset[str] = frozenset()
    float32_ms: float | None = None
    bfloat16_ms: float | None = None

    def compared(self, precision: str) -> str:
        """How `precision` compares with the other one."""
        if self.float32_ms is None or self.bfloat16_ms is None:
            return "what bfloat16 gains was not measured"
        gain = self.float32_ms / self.bfloat16_ms
        if precision == "bfloat16":
            return f"{gain:.3g} times as fast as float32" if gain > 1 else f"{1 / gain:.3g} times as long as float32"
        return f"bfloat16 would {f'be {gain:.3g} times as fast' if gain > 1 else f'take {1 / gain:.3g} times as long'}"


# The first row whose flags a CPU has is its own.
CPUS = (
    Processor("AMX", "bfloat16", frozenset({"amx_bf16"}), 139, 103),
    Processor("AVX-512 with avx512_bf16", "bfloat16", frozenset({"avx512_bf16"}), 237, 150),
    Processor("AVX-512 without avx512_bf16", "float32", frozenset({"avx512f"})),
    Processor("AVX2", "float32", frozenset({"avx2"}), 228, 8835),
    Processor("another CPU", "float32"),
)
NEW_CUDA = Processor("CUDA, compute capability 8.0 or higher", "bfloat16")  # the first with bfloat16 products
OTHER = Processor("another GPU", "float32")
TABLE = (*CPUS, NEW_CUDA, OTHER)


@dataclass(frozen=True)
class Precision:
    """What a run computes in, and why; as text the line that it prints when it starts."""

    bf16: bool
    why: str

    def __str__(self) -> str:
        return f"precision: {name_of(self.bf16)} ({self.why})"


def resolve(asked: str, device: torch.device, begun: bool | None = None) -> Precision:
    """The precision for `device`, a function of what is asked for, of the folder and of the kind of processor alone.

    Args:
        asked: one of `CHOICES`.
        begun: whether the run that goes on computes in bfloat16, which "auto" then does too; None for a new one.
    """
    row = processor(device)
    if asked != "auto":
        precision, reason = asked, "as asked; "
    elif begun is not None:
        precision, reason = name_of(begun), "as the folder was begun; "
    else:
        precision, reason = row.auto, ""
    return Precision(precision == "bfloat16", f"{reason}{row.name}: {row.compared(precision)}")


def name_of(bf16: bool) -> str:
    return "bfloat16" if bf16 else "float32"


def processor(device: torch.device) -> Processor:
    """The row of `TABLE` that `device` is."""
    if device.type == "cpu":
        held = cpu_flags()
        return next(row for row in CPUS if row.flags <= held)
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0):
        return NEW_CUDA
    return OTHER


def cpu_flags(file: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What Linux says that an x86 processor has; nothing on other systems.

    `torch.cpu.get_capabilities` says the same, and is not in every torch that is supported.
    """
    if not file.is_file():
        return set()
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return set(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())
