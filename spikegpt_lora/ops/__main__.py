"""`python -m spikegpt_lora.ops`: build the kernels ahead of first use, and say what was built and where."""

import argparse
import sys
import time

import torch

from .build import ExtensionError, build_library


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m spikegpt_lora.ops", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu, and cuda where there is a GPU")
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
