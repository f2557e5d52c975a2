"""The documents: their figures are those of recipes/results, their links and names exist, their code runs."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

from spikegpt_lora.report.markdown import interval, markdown, table
from spikegpt_lora.report.results import title_of
from spikegpt_lora.utils.precision import TABLE

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "recipes" / "results"
FOLDERS = ("spikegpt_lora", "recipes", "cuda", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
NOW = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which names what there was
PATH = re.compile(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w/.-]+\.(?:cpp|cu|h|json|md|png|py)\b")
MODULE = re.compile(r"\bspikegpt_lora(?:\.\w+)+")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def figures(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


# ---- figures


def title(method):
    return title_of({"method": method})


def percent(value, spread=None, digits=2):
    """A fraction as the tables write it: in percent, with its spread; a dash where there is none."""
    if value is None:
        return "–"
    return f"{100 * value:.{digits}f}" + ("" if spread is None else f" ± {100 * spread:.{digits}f}")


def points(values):
    return ", ".join(f"{100 * value:+.2f}" for value in values or [])


def subj_tables(name):
    """The tables of what the report writes; what it says around them is the page's own."""
    blocks = markdown(figures(name)).split("\n\n")
    return [block.strip() for block in blocks if block.startswith("|")]


def first_page_table():
    results = figures("subj.json")
    rows = [
        [
            title(row["method"]),
            f"{row['trainable_parameters']:,}",
            percent(row["test_accuracy"], row["test_accuracy_spread"]),
            percent(row["sparsity"]),
        ]
        for row in results["summary"]
        if row["method"] != "scratch"
    ]
    bayes = results["baselines"][0]
    rows.append([bayes["method"], f"{bayes['parameters']:,}", percent(bayes["accuracy_test"]), "–"])
    return table(["method", "trained parameters", "test accuracy %", "sparsity %"], rows)


def trials_table():
    trials = figures("subj-reviews-trials.json")["trials"]
    methods = list(trials[0]["validation_accuracy"])
    best = {method: max(trial["validation_accuracy"][method] for trial in trials) for method in methods}
    settings = ("epochs", "dropout", "word_dropout", "warmup", "rank")
    rows = []
    for trial in trials:
        row = [f"x {trial['learning_rate_factor']}", *(f"{trial[name]:g}" for name in settings)]
        for method, accuracy in trial["validation_accuracy"].items():
            row.append(f"**{percent(accuracy)}**" if accuracy == best[method] else percent(accuracy))
        rows.append(row)
    names = ["learning rate", "epochs", "dropout", "word dropout", "warm-up", "rank"]
    return table([*names, *map(title, methods)], rows)


def gates_table():
    head = ["gate", "validation accuracy %", "by seed, minus the default's", "test %", "sparsity %", "dead ranks %"]
    rows = [
        [
            row["gate"],
            percent(row["validation_accuracy"], row["validation_accuracy_spread"]),
            points(row["validation_difference_by_seed"]),
            percent(row["test_accuracy"], row["test_accuracy_spread"]),
            percent(row["sparsity"], digits=1),
            percent(row["dead_ranks"], digits=1),
        ]
        for row in figures("gates.json")["gates"]
    ]
    return table(head, rows)


def cola_table():
    head = ["method", "rank", "trained parameters", "MCC x 100", "minus LoRA, by seed", "train MCC - MCC", "sparsity %"]
    rows = [
        [
            row["method"],
            str(row["rank"]),
            f"{row['trainable']:,}",
            percent(row["mcc"], row["mcc_spread"]),
            points(row["minus_lora_by_seed"]),
            percent(row["train_mcc_minus_mcc"], digits=1),
            percent(row["sparsity"], digits=1),
            percent(row["dead_ranks"], digits=1),
            str(row["step_ms"] or ""),
        ]
        for row in figures("cola.json")["runs"]
    ]
    return table([*head, "dead ranks %", "step ms"], rows)


def precision_table():
    rows = []
    for row in TABLE:
        times = [row.float32_ms, row.bfloat16_ms]
        shown = ["–"] * 3 if None in times else [f"{time:,}" for time in times] + [f"{times[0] / times[1]:.3g}"]
        rows.append([row.name, row.auto, *shown])
    return table(
        ["processor", "`auto`", "a LoRA training step in float32, ms", "in bfloat16, ms", "gain"], rows, (0, 1)
    )


TIMED = ("kernels", "step", "encoder", "large_step", "pretrain", "streaming", "rwkv")  # of the parts of bench.py


def speed_table():
    """A column a processor kind, a row for everything that was timed on one of them."""
    runs = figures("bench.json")["runs"]
    timed = [{(row["group"], row["what"]): row for row in run["rows"] if row["part"] in TIMED} for run in runs]
    keys = list(dict.fromkeys(key for rows in timed for key in rows))
    groups = list(dict.fromkeys(group for group, _ in keys))
    lines, titled = [], set()
    for group, what in sorted(keys, key=lambda key: groups.index(key[0])):
        title = what if group in titled else f"**{group}**: {what}"
        lines.append([title, *(milliseconds(rows.get((group, what))) for rows in timed)])
        titled.add(group)
    return table(["median ms (ratio to the group's first row)", *map(machine, runs)], lines)


def milliseconds(row):
    if row is None:
        return "–"
    median, ratio = row["median_ms"], row["ratio"]
    digits = 2 if median < 10 else 1 if median < 100 else 0
    return f"{median:,.{digits}f} ({ratio:.{2 if ratio < 10 else 1}f})"


def machine(run):
    return f"{run['kind']}: {run['processor']}, {run['threads']} threads, {run['versions']['spikegpt_lora']}"


TABLES = [
    ("recipes/README.md", precision_table()),
    *(("recipes/results/subj.md", one) for one in [*subj_tables("subj.json"), subj_tables("subj-float.json")[0]]),
    *(
        ("recipes/results/subj.md", one)
        for name in ("film", "teacher", "folds")
        for one in subj_tables(f"subj-{name}.json")
    ),
    *(("recipes/results/subj-reviews.md", one) for one in subj_tables("subj-reviews.json")),
    ("recipes/results/subj-reviews.md", trials_table()),
    ("recipes/results/gates.md", gates_table()),
    ("recipes/results/cola.md", cola_table()),
    ("cuda/README.md", speed_table()),
    ("README.md", first_page_table()),
]


def normal(text):
    """`text` without the spaces that Markdown does not show, every column set to the same side."""
    return re.sub(r"-+:?", "-", re.sub(r" *\| *", "|", text))


@pytest.mark.parametrize("page, made", TABLES, ids=lambda value: value if value.endswith(".md") else "table")
def test_a_table_is_the_one_that_its_figures_give(page, made):
    assert normal(f"\n\n{made}\n\n") in normal(text_of(page)), f"{page} must hold this table:\n\n{made}"


def test_the_verdict_and_the_claims_of_the_first_page_are_those_of_the_results():
    text = text_of("README.md")
    pairs = {(row["a"], row["b"]): row for row in figures("subj.json")["comparisons"]}
    for pair in (("lora", "spikelora"), ("full", "spikelora")):
        assert f"{100 * pairs[pair]['difference']:+.2f}" in text
        assert all(interval(pairs[pair][key]) in text for key in ("seeds", "sentences"))
    gate = next(row for row in figures("gates.json")["gates"] if row["gate"] == "target sparsity 97 %")
    assert f"target 97 %: {percent(gate['sparsity'], digits=1)} % without" in text
    assert f"and {percent(gate['dead_ranks'], digits=0)} % of the ranks dead" in text
    low, spiking_low, high, tuned, spiking_high, few, spiking_few = figures("cola.json")["runs"]
    gap = [percent(row["train_mcc_minus_mcc"], digits=1) for row in (spiking_low, low, spiking_high, tuned)]
    assert "{} against LoRA's {} at rank 8".format(*gap[:2]) in text
    assert "{} against {} at rank 64".format(*gap[2:]) in text
    lead, tuned_lead, few_lead = (
        100 * (spiking["mcc"] - lora["mcc"])
        for spiking, lora in ((spiking_high, high), (spiking_high, tuned), (spiking_few, few))
    )
    assert f"{lead:+.0f} MCC at LoRA's rate" in text and f"{tuned_lead:+.1f} (noise)" in text
    assert f"{few_lead:+.1f} MCC, by seed {points(spiking_few['minus_lora_by_seed'])}" in text


# ---- names and links


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        assert target.exists(), f"{page} links to {path}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{page}: {target} has no heading #{anchor}"


@pytest.mark.parametrize("page", NOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_modules_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    assert not [path for path in PATH.findall(text) if not (ROOT / path).exists() and not (page.parent / path).exists()]
    assert not [name for name in MODULE.findall(text) if not exists(name)]


def exists(name):
    """Whether a dotted name is a module, or something inside one."""
    try:
        importlib.import_module(name)
        return True
    except ModuleNotFoundError:
        parent, _, last = name.rpartition(".")
        return bool(parent) and exists(parent) and hasattr(importlib.import_module(parent), last)


# ---- code


def python_of(page):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@every_page
def test_what_the_python_of_a_page_imports_of_us_exists(page):
    for code in python_of(page):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("spikegpt_lora"):
                assert all(exists(f"{node.module}.{alias.name}") for alias in node.names), ast.unparse(node)


def test_the_python_of_the_first_page_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in python_of(ROOT / "README.md"):
        exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "spikes.npz").is_file()


def test_the_first_page_is_a_door():
    text = text_of("README.md")
    assert len(text.splitlines()) <= 150
    assert re.search(r"<!-- test command -->\n```bash\n.*pytest.*\n```\n", text)  # what .ci/run runs
