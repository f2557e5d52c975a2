"""Accuracy against weight reads: what fewer integer spikes cost, over several comparisons by subj_finetune.py.

    python recipes/subj_finetune.py --output-dir runs/float
    python recipes/subj_finetune.py --output-dir runs/k3 --matrix-spikes integer
    python recipes/subj_finetune.py --output-dir runs/cheap --matrix-spikes integer --spike-penalty 1
    python recipes/reads.py runs/float runs/k3 runs/cheap

A row a folder and method. Differences are from the row of the same method in the first folder, paired on the seeds that
both have. Leaves reads.md and reads.png in --output-dir.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: see "A busy machine" in README.md

from spikegpt_lora.report.markdown import intervals, table
from spikegpt_lora.report.plots import draw_reads
from spikegpt_lora.report.results import accuracy_and_reads
from spikegpt_lora.utils import command_line
from spikegpt_lora.utils.errors import read_json
from spikegpt_lora.utils.files import write_text

HEAD = ["", "seeds", "validation %", "minus the first", "test %", "minus the first, 95 % interval", "weight reads %"]


def main() -> int:
    args = parse_arguments()
    comparisons = {folder.name: read(folder) for folder in args.folders}
    if len(tasks := {one["task"] for one in comparisons.values()}) > 1:
        raise ValueError(f"all folders must be of one task, got {', '.join(sorted(tasks))}")
    points = accuracy_and_reads({name: one["runs"] for name, one in comparisons.items()})
    text = table(HEAD, [row(point) for point in points]) + "\n"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(args.output_dir / "reads.md", text)
    draw_reads(points, args.output_dir / "reads.png")
    print(f"{text}\n{args.output_dir / 'reads.png'}")
    return 0


def read(folder: Path) -> dict:
    if not (file := folder / "results.json").is_file():
        raise ValueError(f"a folder must hold the results.json of a comparison by subj_finetune.py, {folder} does not")
    results = read_json(file, keys=("runs", "task", "data"))
    if "validation" not in results["data"]:
        raise ValueError(f"accuracy is compared on a validation split, which the runs in {folder} did not have")
    return results


def parse_arguments() -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of comparisons; the first is the base")
    parser.add_argument("--output-dir", default=Path("runs/reads"), type=Path, help="table and picture go here")
    args = parser.parse_args()
    if repeated := {folder.name for folder in args.folders if [f.name for f in args.folders].count(folder.name) > 1}:
        parser.error(f"folders must have different names, {', '.join(sorted(repeated))} stands twice")
    return args


def row(point: dict) -> list[str]:
    def percent(value: float, sign: str = "") -> str:
        return f"{100 * value:{sign}.2f}"

    name = f"{point['folder']}: {point['title']}"
    reads = "100 (real)" if point["weight_reads"] is None else f"{100 * point['weight_reads']:.1f}"
    of_test, of_validation = point["test_difference"], point["validation_difference"]
    if of_test is None:
        differences = ["–", "–"]
    else:
        differences = [percent(of_validation, "+"), f"{percent(of_test.difference, '+')} ({intervals(of_test)})"]
    accuracy = [percent(point[f"{split}_accuracy"]) for split in ("validation", "test")]
    return [name, str(point["seeds"]), accuracy[0], differences[0], accuracy[1], differences[1], reads]


if __name__ == "__main__":
    sys.exit(command_line.run(main))
