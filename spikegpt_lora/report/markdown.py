"""Results as Markdown tables."""

from .results import title_of, titles


def markdown(results: dict) -> str:
    """The tables of results.json as Markdown; the task's and the model's name stand on top."""
    data = results["data"]
    counts = " / ".join(f"{data[split]:,} {split}" for split in ("train", "validation", "test") if split in data)
    lines = [
        f"# {results['task']}: {results['model']}" + ("" if results["complete"] else " (incomplete: runs are missing)"),
        "",
        f"Sentences: {counts}. "
        + ("The epoch was picked on validation, the" if "validation" in data else "The last epoch counts; the")
        + " test split was read once a run.",
        "",
        "| method | trained parameters | test accuracy % | validation % | seconds | sparsity % | dead ranks % "
        "| adapter / W0x | adapters off % |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [_row(row) for row in results["summary"]]
    for row in results["baselines"]:
        lines.append(
            f"| {row['method']} | {row['parameters']:,} | {100 * row['accuracy_test']:.2f} | "
            f"{100 * row['accuracy_validation']:.2f} | {row['seconds']:.1f} | – | – | – | – |"
        )
    for row in results["published"]:
        lines.append(f"| *published, 216M model: {row['method']}* | | *{row['accuracy']:.2f}* | | | | | | |")
    lines += ["", f"Mean ± standard deviation over seeds {_seeds(results['summary'])}.", _LEGEND]
    if results["comparisons"]:
        lines += [
            "",
            "| paired difference on the test split, points | mean | 95 % interval over sentences and seeds | |",
        ]
        of_method = titles(results["summary"])
        lines += ["| --- | ---: | ---: | --- |"] + [_comparison(row, of_method) for row in results["comparisons"]]
    return "\n".join(lines) + "\n"


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


def table(names: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: the first column to the left, the others (numbers) to the right."""
    lines = [names, ["---"] + ["---:"] * (len(names) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


_LEGEND = (
    "Sparsity: silent share of the gate's outputs over all real tokens of the test split; dead ranks: units that never "
    "fired there; adapter / W0x: norm of what the adapters add over the norm of what the frozen weights give; "
    "adapters off: test accuracy with the trained `score` alone. "
    "Methods of one seed start from the same model and read the sentences in the same order."
)


def _seeds(summary: list[dict]) -> str:
    by_method = {title_of(row): ", ".join(map(str, row["seeds"])) for row in summary}
    if len(set(by_method.values())) <= 1:
        return next(iter(by_method.values()), "(none yet)")
    return "that differ: " + "; ".join(f"{name} {seeds}" for name, seeds in by_method.items())


def _row(row: dict) -> str:
    def percent(key):
        if row[key] is None:
            return "–"
        spread = row.get(f"{key}_spread")
        return f"{100 * row[key]:.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")

    contribution = "–" if row["contribution"] is None else f"{row['contribution']:.3f}"
    return (
        f"| {title_of(row)} | {row['trainable_parameters']:,} | {percent('test_accuracy')} | "
        f"{percent('validation_accuracy')} | {row['seconds']:.0f} | {percent('sparsity')} | {percent('dead_ranks')} | "
        f"{contribution} | {percent('accuracy_without')} |"
    )


def _comparison(row: dict, titles: dict[str, str]) -> str:
    verdict = "noise: the interval holds 0" if row["is_noise"] else ""
    return (
        f"| {titles[row['a']]} − {titles[row['b']]} | {100 * row['difference']:+.2f} | "
        f"{100 * row['low']:+.2f} … {100 * row['high']:+.2f} | {verdict} |"
    )
