"""python -m spikegpt_lora.report FOLDER: report.html and results.csv of a comparison's results.json, in that folder."""

import argparse
import sys
from pathlib import Path

from ..utils.command_line import run, set_up, utf8
from .page import read_results, write_page
from .spreadsheet import write_spreadsheet


def main(arguments: list[str] | None = None, prog: str = "python -m spikegpt_lora.report") -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.partition(": ")[2])
    parser.add_argument("folder", type=Path, help="what subj_finetune.py left in its --output-dir")
    parser.add_argument(
        "--trace-text", type=utf8, metavar="TEXT", help="a sentence of your own, for a raster: a saved model reads it"
    )
    args = parser.parse_args(arguments)
    return run(lambda: _write(args.folder, args.trace_text))


def _write(folder: Path, text: str | None) -> int:
    set_up()
    results, sheet = read_results(folder), folder / "results.csv"
    page = write_page(results, folder, text)
    write_spreadsheet(results["runs"], sheet)
    print(f"Written to {page} and {sheet}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
