"""Integer spikes before the linear layers of any transformers model: SpikeLLM's own setting.

    rows = calibration_rows(model, batches)                  what each linear layer reads of some text
    put_neurons(model, rows, Spiking(levels=15))             a SpikingLinear in the place of each of them
    round_weights(model, bits=4)                             or learn_clipping (convert/clipping.py)

Classes stay stock ones and nothing in transformers is patched: modules are replaced by name. What a model multiplies
outside of its linear layers (queries by keys, attention by values) stays as it is.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..forward import evaluating, hooked
from ..neurons.multilevel import MOST, IntegerSpikes
from .int_weights import round_to_grid
from .salient_channels import salient, scores_of
from .spiking_linear import SMALLEST, SpikingLinear, matrix_of

WHICH = ("blocks", "all")
STEPS = ("token", "tensor", "channel")
MOST_LEVELS = 512
RATIOS = [0.85**i for i in range(20)]  # of the largest value, at which static steps are tried: 1 ... 0.046
SHIFTS = (-2, 8)  # a channel's step is their median times 2^-2 ... 2^8: what calibration hardly saw keeps a step


@dataclass(frozen=True)
class Spiking:
    """The spikes before a linear layer.

    levels: of a channel that is not salient: 15 is -7 ... 7; what is never negative, and all with a zero point, has
        0 ... levels - 1.
    steps: "token", the largest value of each token is the largest spike; "tensor", one step a layer, "channel", one
        an input channel, all powers of two of one another (spikes are then shifted, and weights stay on their grid):
        both by least squares over the calibration rows.
    zero_point: see `SpikingLinear`; static steps then span the smallest to the largest value.
    share, times, score, seed: `times` as many levels for this share of the channels, chosen by `score` (one of
        `salient_channels.SCORES`; seed of "random").
    """

    levels: int
    steps: str = "token"
    zero_point: bool = False
    share: float = 0.0
    times: int = 1
    score: str = "first-order"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps not in STEPS:
            raise ValueError(f"steps must be one of {', '.join(STEPS)}, got {self.steps!r}")
        if not (self.zero_point or self.levels % 2) or not 3 <= self.levels <= MOST_LEVELS:
            raise ValueError(
                f"levels must be in 3 ... {MOST_LEVELS}, and odd without a zero point, got {self.levels}: "
                "-K ... K are 2 K + 1 levels"
            )
        if not 0 <= self.share <= 1 or self.times < 1:
            raise ValueError(f"share must be in 0 ... 1 and times >= 1, got {self.share} and {self.times}")


def linears_of(model: nn.Module, which: str = "blocks") -> dict[str, nn.Module]:
    """The linear layers (nn.Linear, Conv1D) of `model` by name, in their order.

    Args:
        which: "blocks", those in a list of blocks, so neither embeddings nor heads or poolers; "all", the latter too.

    Raises:
        ValueError: another `which`, or a model without any.
    """
    if which not in WHICH:
        raise ValueError(f"which must be one of {', '.join(WHICH)}, got {which!r}")
    lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    found = {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and (which == "all" or name.startswith(lists))
    }
    if not found:
        raise ValueError(f"{type(model).__name__} has no nn.Linear or Conv1D in {which}: name another model")
    return found


def spiking_linears(model: nn.Module) -> Iterator[tuple[str, SpikingLinear]]:
    """Those that `put_neurons` made, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SpikingLinear))


@torch.no_grad()
def calibration_rows(
    model: nn.Module, batches: Iterable[Mapping], which: str = "blocks", most: int = 1024
) -> dict[str, Tensor]:
    """What each of `linears_of(model, which)` reads of `batches`: rows `(N, inputs)` of real tokens.

    Args:
        batches: keyword arguments of the model's forward; `attention_mask` says which tokens are real.
        most: rows that are kept of each layer, evenly drawn from all batches.

    Raises:
        ValueError: no batch, or a layer that is never called.
    """
    batches = list(batches)
    share = -(-most // max(1, len(batches)))
    rows: dict[str, list[Tensor]] = {name: [] for name in linears_of(model, which)}
    real: list[Tensor | None] = [None]

    def keep(name):
        def hook(module, args):
            x = args[0].detach()
            mask = real[0]
            x = x[mask] if mask is not None and mask.shape == x.shape[:-1] else x.flatten(0, -2)
            index = torch.linspace(0, len(x) - 1, min(share, len(x))).round().long()
            rows[name].append(x[index.to(x.device)].float().cpu())

        return hook

    linears = linears_of(model, which)
    with evaluating(model), hooked(linear.register_forward_pre_hook(keep(name)) for name, linear in linears.items()):
        for batch in batches:
            real[0] = batch["attention_mask"].bool() if batch.get("attention_mask") is not None else None
            model(**batch)
    if silent := [name for name, kept in rows.items() if not kept]:
        raise ValueError(f"the calibration text must reach every layer, {silent[0]} was never called: give more text")
    return {name: torch.cat(kept)[:most] for name, kept in rows.items()}


def put_neurons(model: nn.Module, rows: Mapping[str, Tensor], spiking: Spiking) -> nn.Module:
    """Replace the linear layers that `rows` names by neurons and linear layers; `model` is changed in place.

    Args:
        rows: as `calibration_rows` gives them, of the model as it was.

    Raises:
        ValueError: weights that are not float32 or float64; rows of another model.
    """
    generator = torch.Generator().manual_seed(spiking.seed)
    linears = linears_of(model, "all")
    if missing := rows.keys() - linears.keys():
        raise ValueError(f"rows must be of this model's linear layers, it has no {sorted(missing)[0]}")
    for name in rows:
        if (dtype := linears[name].weight.dtype) not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must have float32 weights, has {dtype}: integers need them, call model.float()")
    for name, x in rows.items():
        model.set_submodule(name, _spiking(linears[name], x, spiking, generator))
    return model


def round_weights(model: nn.Module, bits: int, zero_point: bool = False) -> nn.Module:
    """Put the weights of every `SpikingLinear` on a grid, rounded to nearest: see `int_weights.round_to_grid`."""
    for _, module in spiking_linears(model):
        module.linear.weight = nn.Parameter(round_to_grid(module.linear.weight.detach(), bits, zero_point))
    return model


def _spiking(linear: nn.Module, rows: Tensor, spiking: Spiking, generator: torch.Generator) -> SpikingLinear:
    """Of one linear layer, by its rows."""
    weight = matrix_of(linear)
    one_sided = spiking.zero_point or bool(rows.min() >= 0)
    base = spiking.levels - 1 if one_sided else (spiking.levels - 1) // 2
    times = torch.ones(weight.shape[1], dtype=torch.long)
    if spiking.share > 0:
        scores = scores_of(rows, weight.float().cpu(), spiking.score, generator)
        times[salient(scores, spiking.share)] = spiking.times
    neuron = IntegerSpikes(weight.shape[1], min(base, MOST), signed=not one_sided)
    module = SpikingLinear(linear, neuron, base, spiking.steps == "token", spiking.zero_point)
    low = steps = None
    if spiking.steps != "token":
        low, steps = _static(rows, base * times, neuron.signed, spiking)
    with torch.no_grad():
        neuron.most.copy_(base * times)
        neuron.log_scale.copy_((1 / times if steps is None else steps).log())
        if low is not None:
            module.offset.copy_(low)
    return module.to(weight.device, weight.dtype)


def _static(rows: Tensor, most: Tensor, signed: bool, spiking: Spiking) -> tuple[Tensor, Tensor]:
    """o and s_c `(inputs,)` of static steps, for the largest spikes `most` `(inputs,)`."""
    by_channel = spiking.steps == "channel"
    finer = most.min() / most  # 1 / T
    if spiking.zero_point:
        low, high = torch.aminmax(rows, dim=0) if by_channel else torch.aminmax(rows)
        spans = (high - low).expand(rows.shape[1]) / most.min()
        base = _median(spans)
        steps = base * 2 ** (spans / base).log2().ceil().clamp(*SHIFTS) * finer if by_channel else spans * finer
        return -torch.floor(0.5 - low / steps) * steps, steps
    largest = rows.abs().amax(0) if by_channel else rows.abs().max().expand(rows.shape[1])
    steps = _least_squares(rows, [largest * ratio / most for ratio in RATIOS], most, signed, by_channel)
    if by_channel:
        base = _median(steps / finer) * finer
        shifts = sorted(range(SHIFTS[0], SHIFTS[1] + 1), key=abs)
        steps = _least_squares(rows, [base * 2.0**shift for shift in shifts], most, signed, by_channel)
    return torch.zeros(rows.shape[1]), steps


def _median(steps: Tensor) -> Tensor:
    """Of the channels that calibration has seen."""
    seen = steps[steps > SMALLEST]
    return seen.median() if len(seen) else steps.new_tensor(1.0)


def _least_squares(rows: Tensor, candidates: list[Tensor], most: Tensor, signed: bool, by_channel: bool) -> Tensor:
    """Of `candidates`, steps `(inputs,)`, those that leave the smallest squared error of s k, of each channel or of
    all; the first of equals."""
    best = torch.full((rows.shape[1],), torch.inf)
    steps = candidates[0].clamp(min=SMALLEST)
    for candidate in candidates:
        step = candidate.clamp(min=SMALLEST)
        k = torch.floor(rows / step + 0.5).clamp(min=-most if signed else torch.zeros_like(most), max=most)
        error = (k * step - rows).square().sum(0)
        error = error if by_channel else error.sum().expand_as(error)
        steps, best = torch.where(error < best, step, steps), torch.minimum(error, best)
    return steps
