"""python -m spikegpt_lora.export check BUNDLE: exit status 0 for a right one, 1 for a wrong one, 2 if it is none."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from ..utils.command_line import run
from ..utils.files import locked
from .check import check_bundle
from .summary import require_outside, summary, write_results


def main() -> int:
    args = parse_arguments()
    return run(lambda: check(args), stopped="stopped; the bundle is as it was")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m spikegpt_lora.export", description="Neuromorphic bundles.")
    check = parser.add_subparsers(dest="command", required=True).add_parser(
        "check",
        help="whether a bundle is what it says",
        description="Compare hashes, let the interpreter read the sentences, and run every island in the simulators "
        "that are installed (snnTorch, Norse, spikingjelly: pip install 'spikegpt_lora[export]'). The bundle is only "
        "read.",
    )
    check.add_argument("bundle", type=Path, help="folder that export_bundle wrote")
    check.add_argument("--write", type=Path, metavar="FOLDER", help="check.json and check.txt go here, beside a bundle")
    return parser.parse_args()


def check(args: argparse.Namespace) -> int:
    if args.write:
        require_outside(args.write, args.bundle)
    results = check_bundle(args.bundle, lambda rounds, text: tqdm(rounds, desc=text, leave=False, disable=None))
    text = summary(results)
    print(text)
    if args.write:
        with locked(args.write):
            write_results(results, text, args.write)
    return 0 if results["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
