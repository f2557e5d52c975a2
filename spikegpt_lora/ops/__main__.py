"""`python -m spikegpt_lora.ops`: build the kernels ahead of first use, and say what was built and where."""

import argparse
import re
import sys
import time
from pathlib import Path

import torch

from .build import ExtensionError, build_library

DTYPES = {"f": "float32", "d": "float64", "N3c104HalfE": "float16", "N3c108BFloat16E": "bfloat16"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m spikegpt_lora.ops", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu, and cuda where there is a GPU")
    parser.add_argument("--registers", type=Path, help="with cuda: write what each kernel takes to this Markdown file")
    options = parser.parse_args(arguments)
    devices = [options.device] if options.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        start = time.perf_counter()
        try:
            library = build_library(device)
        except ExtensionError as error:
            print(f"{device}: {error}", file=sys.stderr)
            return 1
        print(f"{device}: {library} ({library.stat().st_size / 2**20:.1f} MiB, {time.perf_counter() - start:.1f} s)")
        if device == "cuda" and options.registers:
            log = library.with_name("build.log").read_text(encoding="utf-8")
            options.registers.write_text(register_table(kernel_resources(log)), encoding="utf-8")
    return 0


def kernel_resources(log: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(kernel, GPU generation) -> (registers a thread, bytes spilled), from the log of `nvcc -Xptxas -v`."""
    found = {}
    for entry in re.split(r"Compiling entry function ", log)[1:]:
        name, generation = re.match(r"'(\w+)' for '(\w+)'", entry).groups()
        kernel, dtype, count = re.search(rf"\d((?:[A-Z][a-z]+)+)I({'|'.join(DTYPES)})[fd](?:Li(\d)E)?E", name).groups()
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill", entry)))
        registers = int(re.search(r"Used (\d+) registers", entry).group(1))
        found[f"{kernel}{f', {count} mixes' if count else ''}, {DTYPES[dtype]}", generation] = registers, spilled
    return found


def register_table(resources: dict[tuple[str, str], tuple[int, int]]) -> str:
    generations = sorted({generation for _, generation in resources}, key=lambda name: int(name.removeprefix("sm_")))
    lines = [
        "# What the CUDA kernels take",
        "",
        "Registers a thread, and in brackets bytes spilled to memory, as `nvcc -Xptxas -v` reports them. Made by",
        "",
        "```bash",
        "TORCH_CUDA_ARCH_LIST='7.5;8.0;8.6;8.9;9.0;10.0;12.0' \\",
        "    python -m spikegpt_lora.ops --device cuda --registers cuda/registers.md",
        "```",
        "",
        f"| kernel | {' | '.join(generations)} |",
        f"| --- |{' ---: |' * len(generations)}",
    ]
    for kernel in sorted({kernel for kernel, _ in resources}):
        cells = [resources[kernel, generation] for generation in generations]
        shown = [f"{registers} ({spilled})" if spilled else str(registers) for registers, spilled in cells]
        lines.append(f"| {kernel} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
