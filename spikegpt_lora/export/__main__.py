"""What can be done with a bundle; exit status 0 for a right one, 1 for a wrong one, 2 if it is none.

python -m spikegpt_lora.export check BUNDLE           whether it is what it says
python -m spikegpt_lora.export event-driven BUNDLE    its sentences again, in the event-driven form
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..utils.command_line import run
from ..utils.files import locked
from .bundle import Bundle
from .check import check_bundle
from .event_driven import EventDriven, counts
from .interpreter import reread
from .results import require_outside, summary, write_results


def main(arguments: list[str] | None = None, prog: str = "python -m spikegpt_lora.export") -> int:
    args = parse_arguments(arguments, prog)
    return run(lambda: args.do(args), stopped="stopped; the bundle is as it was")


def parse_arguments(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description="Neuromorphic bundles.")
    commands = parser.add_subparsers(required=True)
    checking = commands.add_parser(
        "check",
        help="whether a bundle is what it says",
        description="Compare hashes, let the interpreter read the sentences, and run every island in the simulators "
        "that are installed (snnTorch, Norse, spikingjelly: pip install 'spikegpt_lora[export]'). The bundle is only "
        "read.",
    )
    checking.add_argument("--write", type=Path, metavar="FOLDER", help="where check.json and check.txt go")
    checking.set_defaults(do=check)
    event_driven = commands.add_parser(
        "event-driven",
        help="a bundle's sentences again, in the event-driven form",
        description="Let the event-driven form read the sentences in float64; predictions must be the recorded ones.",
    )
    event_driven.set_defaults(do=run_event_driven)
    for command in (checking, event_driven):
        command.add_argument("bundle", type=Path, help="folder that export_bundle wrote")
    return parser.parse_args(arguments)


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


def run_event_driven(args: argparse.Namespace) -> int:
    tokens = int(Bundle(args.bundle).sentences["lengths"].sum())
    program = EventDriven(args.bundle, np.float64)
    right = reread(program, args.bundle)
    made = counts(program, tokens)
    numbers = (made["additions"], made["products"], sum(made["rescaling"].values()))
    print("a token: {:,.0f} additions, {:,.0f} products, {:,.0f} to rescale".format(*numbers))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
