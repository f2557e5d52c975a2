"""What the CUDA kernels take on every GPU generation, as nvcc says; written to cuda/registers.md."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

NAMES = {"c10::Half": "float16", "c10::BFloat16": "bfloat16", "double": "float64", "float": "float32"}


def kernel_resources(log: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(kernel, GPU generation) -> (registers a thread, bytes spilled), from the log of `nvcc -Xptxas -v`."""
    found = {}
    for entry in re.split(r"Compiling entry function ", log)[1:]:
        name, generation = re.match(r"'(\w+)' for '(\w+)'", entry).groups()
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", entry)))
        registers = int(re.search(r"Used (\d+) registers", entry).group(1))
        found[kernel_name(name), generation] = registers, spilled
    return found


def kernel_name(mangled: str) -> str:
    """The kernel's struct and what it is made for: "ShiftForward<float32, 2, bfloat16>". The second dtype, in which all
    of them compute, is left out."""
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    name = re.sub("|".join(NAMES), lambda found: NAMES[found[0]], name)
    kernel, given = re.search(r"each_channel<\w+, spikegpt::(\w+)<(.*)> ?>\(", name).groups()
    dtype, _, *others = re.sub(r"spikegpt::|\(int\)", "", given).split(", ")
    return f"{kernel}<{', '.join([dtype, *others])}>".replace(" >", ">")


def register_table(resources: dict[tuple[str, str], tuple[int, int]]) -> str:
    generations = sorted({generation for _, generation in resources}, key=lambda name: int(name.removeprefix("sm_")))
    lines = [
        "# What the CUDA kernels take",
        "",
        "Registers a thread, and in brackets bytes spilled to memory, as `nvcc -Xptxas -v` reports them. Made by",
        "",
        "```bash",
        "python -m pytest -m slow tests/ops/test_registers.py",
        "```",
        "",
        f"| kernel | {' | '.join(generations)} |",
        f"| --- |{' ---: |' * len(generations)}",
    ]
    for kernel in sorted({kernel for kernel, _ in resources}):
        cells = [resources[kernel, generation] for generation in generations]
        shown = [f"{registers} ({spilled})" if spilled else str(registers) for registers, spilled in cells]
        lines.append(f"| `{kernel}` | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


@pytest.mark.slow
def test_nvcc_compiles_for_every_gpu_generation_without_spills_in_the_forward_kernels(tmp_path):
    if shutil.which("nvcc") is None or torch.version.cuda is None:
        pytest.skip("no nvcc, or torch without CUDA")
    environment = {
        **os.environ,
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
        "TORCH_CUDA_ARCH_LIST": "7.5;8.0;8.6;8.9;9.0;10.0;12.0",
    }
    code = """
import torch
from spikegpt_lora.ops.backend import load
from spikegpt_lora.ops.build import build_library
load("cuda")
for name in ("wkv", "lif_add", "lif_backward", "token_shift3", "dropout", "integer_spikes", "integer_rows"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"spikegpt_lora::{name}", "CUDA"), name
print(build_library("cuda").with_name("build.log"))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    resources = kernel_resources(Path(done.stdout.split("\n")[-2]).read_text(encoding="utf-8"))
    forward = [spilled for (kernel, _), (_, spilled) in resources.items() if "Backward" not in kernel]
    assert len(resources) == 7 * 84 and len(forward) == 7 * 46 and sum(forward) == 0
    table = Path(__file__).parents[2] / "cuda" / "registers.md"
    table.write_text(register_table(resources), encoding="utf-8")
