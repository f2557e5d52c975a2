"""python -m spikegpt_lora.report FOLDER: report.html of a comparison's results.json, in that folder."""

import argparse
import sys
from pathlib import Path

from ..utils.command_line import run
from .page import write_page


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m spikegpt_lora.report", description=__doc__.partition(": ")[2])
    parser.add_argument("folder", type=Path, help="what subj_finetune.py left in its --output-dir")
    args = parser.parse_args()
    return run(lambda: _write(args.folder))


def _write(folder: Path) -> int:
    print(f"Written to {write_page(folder)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
