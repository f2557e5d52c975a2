"""python -m spikegpt_lora.export check BUNDLE: exit status 0 for a right one, 1 for a wrong one, 2 if it is none."""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from .check import check_bundle


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m spikegpt_lora.export", description="Neuromorphic bundles.")
    check = parser.add_subparsers(dest="command", required=True).add_parser(
        "check",
        help="whether a bundle is what it says",
        description="Compare hashes, let the interpreter read the sentences, and run every island in the simulators "
        "that are installed (snnTorch, Norse: pip install 'spikegpt_lora[export]'). Results go into its manifest.",
    )
    check.add_argument("bundle", type=Path, help="folder that export_bundle wrote")
    args = parser.parse_args()
    try:
        results = check_bundle(args.bundle, lambda rounds, text: tqdm(rounds, desc=text, leave=False))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(results))
    return 0 if results["passed"] else 1


def summary(results: dict) -> str:
    """A check's results as text."""
    lines = []
    if "files" in results:
        lines.append(f"files: {results['files']} with the right hashes")
        lines.append("neurons: {steps:,} steps of {populations} populations recomputed".format(**results["neurons"]))
        lines.append(
            "interpreter (float32): {sentences} sentences, {sentences_with_a_flip} with a spike flipped by rounding\n"
            "    (the first of each at most {farthest_first_flip:.1e} from its threshold); {different_predictions} "
            "predictions differ".format(**results["interpreter"])
        )
        lines += [_simulator(name, result) for name, result in results["simulators"].items()]
    lines += [f"WRONG  {problem}" for problem in results["problems"]]
    return "\n".join([*lines, "the bundle is right" if results["passed"] else "the bundle is NOT right"])


def _simulator(name: str, result: dict | str) -> str:
    if isinstance(result, str):
        return f"{name}: {result}, so not asked (pip install 'spikegpt_lora[export]')"
    neurons, weights = result["neurons"], result["with_weights"]
    left_out = (
        f"; left out: {', '.join(f'{n} ({why})' for n, why in result['left_out'].items())}"
        if result["left_out"]
        else ""
    )
    return (
        f"{name} {result['version']}: {neurons['wrong']} wrong of {neurons['steps']:,} neuron steps in "
        f"{neurons['islands']} islands\n"
        f"    {weights['wrong']} wrong, {weights['rounding']} rounded of {weights['steps']:,} in {weights['islands']} "
        f"islands with weights\n"
        f"    of an island that is wrong on purpose it got {result['control']['wrong_if_not_lowered']} wrong{left_out}"
    )


if __name__ == "__main__":
    sys.exit(main())
