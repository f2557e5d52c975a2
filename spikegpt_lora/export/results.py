"""What a check found, in words and as files beside the bundle."""

from pathlib import Path

from ..utils.files import write_json, write_text

NOT_PROVEN = (
    "That means: its files are whole and agree with one another. It says nothing about which model they are of, nor "
    "about labels, texts and class names as such: for those compare manifest.json.sha256 with the author's."
)


def require_outside(folder: str | Path, bundle: str | Path) -> None:
    """Raise ValueError if `folder` is the bundle or lies in it."""
    folder, bundle = Path(folder).resolve(), Path(bundle).resolve()
    if bundle in (folder, *folder.parents):
        raise ValueError(f"{folder} lies in the bundle, which a check only reads: name a folder beside it")


def write_results(results: dict, text: str, folder: str | Path) -> None:
    """check.json and, as a user reads them, check.txt into `folder`."""
    write_json(Path(folder) / "check.json", results)
    write_text(Path(folder) / "check.txt", text + "\n")


def summary(results: dict) -> str:
    """A check's results as text, of the parts that could be done."""
    lines = []
    if "files" in results:
        lines.append(f"files: {results['files']} with the right hashes")
    if "costs" in results:
        parts = " and ".join(results["costs"]["not_recomputed"])
        lines.append(f"costs: {parts} of an earlier version, no longer recomputed: nothing is known of them")
    if "neurons" in results:
        lines.append("neurons: {steps:,} steps of {populations} populations recomputed".format(**results["neurons"]))
    if "interpreter" in results:
        lines.append(
            "interpreter (float32): {sentences} sentences, {sentences_with_a_flip} with a spike flipped by rounding\n"
            "    (the first of each at most {farthest_first_flip:.1e} from its threshold); {different_predictions} "
            "predictions differ".format(**results["interpreter"])
        )
        if count := results["interpreter"].get("sentences_with_a_rounded_exponent"):
            lines.append(f"    {count} with other spikes behind an exponent of WKV that lies at a rounding")
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
        f"islands with weights{_integers(result)}\n"
        f"    of an island that is wrong on purpose it got {result['control']['wrong_on_purpose']} wrong{left_out}"
    )


def _integers(result: dict) -> str:
    """Of a bundle with integer neurons their populations, and the paths through a matrix; else nothing."""
    if "integers" not in result:
        return ""
    integers, paths, control = result["integers"], result["paths"], result["control_of_integers"]
    return (
        f"\n    {integers['wrong']} wrong of {integers['steps']:,} integers in {integers['islands']} populations\n"
        f"    {paths['wrong']} wrong, {paths['rounding']} rounded of {paths['steps']:,} spikes in {paths['islands']} "
        f"paths of neurons, matrix and neurons; of what is wrong on purpose at least {control['wrong_on_purpose']}"
    )
