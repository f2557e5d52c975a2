"""python -m spikegpt_lora.export check BUNDLE: exit status 0 for a right one, 1 for a wrong one, 2 if it is none."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from ..utils.command_line import run
from ..utils.files import locked
from .check import NOT_PROVEN, check_bundle, require_outside, write_results


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


def summary(results: dict) -> str:
    """A check's results as text, of the parts that could be done."""
    lines = []
    if "files" in results:
        lines.append(f"files: {results['files']} with the right hashes")
    if "neurons" in results:
        lines.append("neurons: {steps:,} steps of {populations} populations recomputed".format(**results["neurons"]))
    if "interpreter" in results:
        lines.append(
            "interpreter (float32): {sentences} sentences, {sentences_with_a_flip} with a spike flipped by rounding\n"
            "    (the first of each at most {farthest_first_flip:.1e} from its threshold); {different_predictions} "
            "predictions differ".format(**results["interpreter"])
        )
    lines += [_simulator(name, result) for name, result in results.get("simulators", {}).items()]
    lines += [f"WRONG  {problem}" for problem in results["problems"]]
    right = f"the bundle is right\n{NOT_PROVEN}"
    return "\n".join([*lines, right if results["passed"] else "the bundle is NOT right"])


def _simulator(name: str, result: dict | str) -> str:
    if isinstance(result, str):
        return f"{name}: {result}, so not asked (pip install 'spikegpt_lora[export]')"
    neurons, weights = result["neurons"], result["with_weights"]
    left_out = (
        f"; left out: {', '.join(f'{n} ({why})' for n, why in result['left_out'].items())}"
        if result["left_out"]
        else ""
    )
    rounded = f" ({neurons['rounding']} rounded: it fires at the file's threshold)" if neurons["rounding"] else ""
    return (
        f"{name} {result['version']}: {neurons['wrong']} wrong{rounded} of {neurons['steps']:,} neuron steps in "
        f"{neurons['islands']} islands\n"
        f"    {weights['wrong']} wrong, {weights['rounding']} rounded of {weights['steps']:,} in {weights['islands']} "
        f"islands with weights\n"
        f"    of an island that is wrong on purpose it got {result['control']['wrong_on_purpose']} wrong{left_out}"
    )


if __name__ == "__main__":
    sys.exit(main())
