"""How long something takes beside something else that gives the same, and beside its matrix products alone."""

import ctypes
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm


class Disagreement(Exception):
    """Two ways to the same result gave different ones: no time of theirs means anything."""


def agree(name: str, ways: dict[str, Callable], tolerance: float) -> None:
    """Raises Disagreement unless all ways return tensors that are near the first's."""
    (first, expected), *others = ((way, run()) for way, run in ways.items())
    for way, found in others:
        for i, (a, b) in enumerate(zip(expected, found, strict=True)):
            difference = (a - b).abs().max().item() / max(a.abs().max().item(), 1e-12)
            if not difference <= tolerance:
                raise Disagreement(f"{name}: tensor {i} of {first!r} and {way!r} differ by {difference:.2g} (relative)")


def compare(group: str, ways: dict[str, Callable], repeats: int) -> list[dict]:
    """Time all ways in turns, in a new order each round; ratios are to the first."""
    times = {name: [] for name in ways}
    order = list(ways)
    for name in order:
        ways[name]()
    for _ in tqdm(range(repeats), desc=group, leave=False):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            ways[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
    rows = []
    for name, measured in times.items():
        quartile1, median, quartile3 = statistics.quantiles(measured * 2 if len(measured) == 1 else measured, n=4)
        rows.append(
            {
                "group": group,
                "what": name,
                "median_ms": round(median, 3),
                "quartile1_ms": round(quartile1, 3),
                "quartile3_ms": round(quartile3, 3),
                "ratio": round(median / rows[0]["median_ms"], 3) if rows else 1.0,
                "note": "",
            }
        )
    return rows


def peak_memory(function: Callable) -> float:
    """Bytes that a call holds at most, above what was held before it (Linux: high-water mark of resident memory)."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = _high_water(status)
    function()
    return _high_water(status) - before


def _high_water(status: Path) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def inside(context: Callable, function: Callable) -> Callable:
    def run():
        with context():
            return function()

    return run


class Recorder(TorchDispatchMode):
    """Notes every matrix product; `replay()` makes them again on random inputs of the same shapes and strides.

    What is added to a product, and where it is written, is left out: `addmm` and `addmm_` are made again as `mm`. Seen
    are products that torch dispatches one by one, not those inside another operator (attention, an operator in C++).
    """

    # Under inference_mode linear and matmul come whole, else as one of the others. Where the factors stand.
    PRODUCTS = {
        "aten::linear": (torch.nn.functional.linear, 0),
        "aten::matmul": (torch.matmul, 0),
        "aten::mm": (torch.mm, 0),
        "aten::addmm": (torch.mm, 1),
        "aten::addmm_": (torch.mm, 1),
        "aten::bmm": (torch.bmm, 0),
        "aten::baddbmm": (torch.bmm, 1),
        "aten::baddbmm_": (torch.bmm, 1),
        "aten::mv": (torch.mv, 0),
        "aten::addmv": (torch.mv, 1),
        "aten::addmv_": (torch.mv, 1),
    }

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in self.PRODUCTS:
            product, first = self.PRODUCTS[function._schema.name]
            self.calls.append((product, [(x.shape, x.stride(), x.dtype) for x in args[first : first + 2]]))
        return function(*args, **kwargs or {})

    def replay(self) -> Callable:
        calls = [(product, [_like(*described) for described in factors]) for product, factors in self.calls]

        def run():
            for product, factors in calls:
                product(*factors)

        return run


def _like(shape, stride, dtype) -> torch.Tensor:
    size = 1 + sum((n - 1) * step for n, step in zip(shape, stride))
    return torch.randn(size).to(dtype).as_strided(shape, stride)


def table(rows: list[dict]) -> str:
    lines, group = [], None
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            lines += ["", f"| {group} | median ms | quartiles | ratio | |", "| --- | ---: | ---: | ---: | --- |"]
        spread = f"{row['quartile1_ms']:.2f} … {row['quartile3_ms']:.2f}"
        lines.append(f"| {row['what']} | {row['median_ms']:.2f} | {spread} | {row['ratio']:.2f} | {row['note']} |")
    return "\n".join(lines).strip()
