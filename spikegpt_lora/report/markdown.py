"""Results as Markdown tables."""

from itertools import zip_longest

from .paired import PairedDifference
from .results import of_today, title_of, titles


def markdown(results: dict) -> str:
    """The tables of results.json, of any schema, as Markdown; the task's and the model's name stand on top."""
    results = of_today(results)
    data = results["data"]
    counts = " / ".join(f"{data[split]:,} {split}" for split in ("train", "validation", "test") if split in data)
    parts = [
        f"# {results['task']}: {results['model']}" + ("" if results["complete"] else " (incomplete: runs are missing)"),
        f"Sentences: {counts}. "
        + (f"{split} " if (split := results.get("split")) else "")  # since 0.3.0
        + ("The epoch was picked on validation, the" if "validation" in data else "The last epoch counts; the")
        + " test split was read once a run."
        + (f" Trained and tested in {results['precision']}." if "precision" in results else "")  # since 0.3.0
        + "".join(f"\n\n{text}" for text in learnt_before(results)),
        _methods_table(results),
        f"Mean ± standard deviation over seeds {_seeds(results['summary'])}.\n{_LEGEND}{_READS * _has_reads(results)}",
    ]
    if results["comparisons"]:
        parts.append(_comparisons_table(results))
    return "\n\n".join(parts) + "\n"


def learnt_before(results: dict) -> list[str]:
    """What methods learn from beside the task's own sentences, a paragraph each; none where it is a language model
    alone."""
    first, said = results.get("first") or {}, []
    if task := first.get("intermediate"):
        said.append(
            f"**Every method was trained on the intermediate task {task['task']} first** ({task['sentences']:,} "
            f"sentences, without {task['left_out']:,} that share 8 words in a row with a sentence of this task)."
        )
        if task["task"] == "film":
            said[0] += (
                " Its labels, critic's snippet or plot, are what Subj's own labels are made of: the same question on "
                "other sentences. Compare these figures with those of models that were taught it too."
            )
    if teacher := first.get("teacher"):
        accuracy = teacher["validation_accuracy"]  # None: it was not judged
        judged = "" if accuracy is None else f" (validation {100 * accuracy:.2f} %)"
        said.append(
            f"**And from the answers of a teacher**, {teacher['name']}, fine-tuned on the same training sentences"
            f"{judged}."
        )
    return said


def _methods_table(results: dict) -> str:
    names, rows = methods_rows(results)
    return table(["method", *names], rows)


def methods_rows(results: dict) -> tuple[list[str], list[list[str | None]]]:
    """Names of the columns after the method, and a row a method, baseline and published figure (between asterisks)."""
    names = ["trained parameters", "test accuracy %", "validation %", "seconds", "sparsity %", "dead ranks %"]
    names += ["adapter / W0x", "adapters off %"]
    rows = [_row(row) for row in results["summary"]]
    for row in results["baselines"]:
        accuracy = [percent(row, f"accuracy_{split}") for split in ("test", "validation")]
        rows.append([row["method"], f"{row['parameters']:,}", *accuracy, f"{row['seconds']:.1f}", *["–"] * 4])
    for row in results["published"]:
        rows.append([f"*published, 216M model: {row['method']}*", None, f"*{row['accuracy']:.2f}*", *[None] * 6])
    more = {}
    if results.get("metric") == "MCC":
        more["MCC x 100"] = [percent(row, "test_mcc") for row in results["summary"]]
        more["MCC x 100"] += [percent(row, "mcc_test") for row in results["baselines"]]
    if _has_reads(results):
        reads = [row["weight_reads"] for row in results["summary"]]
        more["weight reads %"] = ["–" if share is None else f"{100 * share:.1f}" for share in reads]
    for name, cells in more.items():
        names.append(name)
        rows = [[*row, cell] for row, cell in zip_longest(rows, cells)]
    return names, rows


def _comparisons_table(results: dict) -> str:
    title, rows = titles(results["summary"]), []
    for row in results["comparisons"]:
        intervals = [interval(row[key]) for key in ("seeds", "sentences")]
        difference = f"{100 * row['difference']:+.2f}"
        rows.append([f"{title[row['a']]} − {title[row['b']]}", difference, *intervals, row["words"]])
    names = ["paired difference on the test split, points", "mean", "95 % over seeds", "95 % over sentences", None]
    return f"{table(names, rows, text=(0, 4))}\n\n{_NOISE}"


def intervals(difference: PairedDifference) -> str:
    """Both, named."""
    return f"seeds {interval(difference.seeds)}; sentences {interval(difference.sentences)}"


def interval(ends: tuple[float, float] | None) -> str:
    """In percent."""
    return "–" if ends is None else f"{100 * ends[0]:+.2f} … {100 * ends[1]:+.2f}"


def trials_table(records: list[dict]) -> str:
    """What tuning tried, as Markdown: the best trial of each method first."""
    names = ["learning_rate", "epochs", "dropout", "word_dropout", "warmup", "rank", "v_threshold"]
    head = ["method", *names, "best epoch", "validation %", "sparsity %"]
    rows = []
    for method, title in titles(records).items():
        of_method = [record for record in records if record["method"] == method]
        for record in sorted(of_method, key=lambda record: -record["validation_accuracy"]):
            values = [f"{record['settings'][name]:g}" for name in names]
            accuracy = f"{100 * record['validation_accuracy']:.2f}"
            gates = (record["adapters"] or {}).get("sparsity")
            sparsity = "–" if gates is None else f"{100 * gates:.1f}"
            rows.append([title, *values, str(record["best_epoch"]), accuracy, sparsity])
    return table(head, rows) + "\n"


def table(names: list[str | None], rows: list[list[str | None]], text: tuple[int, ...] = (0,)) -> str:
    """A Markdown table: columns `text` to the left, the others (numbers) to the right; None is a cell of nothing."""
    rule = ["---" if column in text else "---:" for column in range(len(names))]
    lines = [["" if cell is None else f" {cell}" for cell in line] for line in [names, rule, *rows]]
    return "\n".join("|" + "".join(f"{cell} |" for cell in line) for line in lines)


_LEGEND = (
    "Sparsity: silent share of the gate's outputs over all real tokens of the test split; dead ranks: units that never "
    "fired there; adapter / W0x: norm of what the adapters add over the norm of what the frozen weights give; "
    "adapters off: test accuracy with the trained `score` alone. "
    "Methods of one seed start from the same model and read the sentences in the same order."
)

_NOISE = (
    "Over seeds (t): would other seeds show it? Over sentences (bootstrap): would other test sentences? A difference "
    "is found where both do, corrected for the number of comparisons (Holm); what would have been seen is what 80 of "
    "100 such comparisons find."
)

_READS = " Weight reads: share of the blocks' weights that a token of the validation split reads."


def _has_reads(results: dict) -> bool:
    return any(row.get("weight_reads") is not None for row in results["summary"])


def _seeds(summary: list[dict]) -> str:
    by_method = {title_of(row): ", ".join(map(str, row["seeds"])) for row in summary}
    if len(set(by_method.values())) <= 1:
        return next(iter(by_method.values()), "(none yet)")
    return "that differ: " + "; ".join(f"{name} {seeds}" for name, seeds in by_method.items())


def _row(row: dict) -> list[str]:
    accuracy = [percent(row, "test_accuracy"), percent(row, "validation_accuracy"), f"{row['seconds']:.0f}"]
    contribution = "–" if row["contribution"] is None else f"{row['contribution']:.3f}"
    gates = [percent(row, "sparsity"), percent(row, "dead_ranks"), contribution, percent(row, "accuracy_without")]
    return [title_of(row), f"{row['trainable_parameters']:,}", *accuracy, *gates]


def percent(row: dict, key: str, digits: int = 2) -> str:
    """A fraction of 1 in a summary's `row`, with its spread, in percent; a dash where there is none."""
    if row.get(key) is None:
        return "–"
    spread = row.get(f"{key}_spread")
    return f"{100 * row[key]:.{digits}f}" + ("" if spread is None else f" ± {100 * spread:.{digits}f}")
