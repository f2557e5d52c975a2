"""A comparison of methods: a plan, a folder for each run so that it can be taken up again, and the results.

FOLDER/options.json                             the settings that results depend on
FOLDER/METHOD/seed0/run.json                    the record of a finished run, written last
FOLDER/results.json, results.md, results.csv    of every finished run (schema: report/results.py)
"""

import hashlib
import importlib.metadata
import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from time import perf_counter

from accelerate import PartialState
from datasets import Dataset, DatasetDict
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..report.markdown import markdown, trials_table
from ..report.page import write_page
from ..report.plots import draw_accuracy
from ..report.results import SCHEMA, TRIAL_KEYS, compare, folder_of, mean_and_spread, read_runs, summarize
from ..report.spreadsheet import write_spreadsheet
from ..tasks.baselines import bag_of_words_baselines
from ..tasks.registry import TASKS, labels_of
from ..tasks.splits import ONE_SPLIT, Protocol, folds
from ..utils.errors import DamagedFile, read_json
from ..utils.files import write_json, write_text
from ..utils.precision import name_of
from .intermediate import Source
from .methods import METHODS
from .options import FinetuneOptions, sample_trial
from .run import adapt, finetune, tokenize
from .teacher import Teacher
from .trainer import ANSWERS
from .workers import side_by_side

PACKAGES = ("spikegpt_lora", "torch", "transformers", "peft", "spikingjelly")


def aside(default=MISSING):
    """A field of a plan that results do not depend on; on every other one they do."""
    return field(default=default, metadata={"results": False})


def counted(plan) -> dict:
    """The fields of `plan`, a dataclass, that results depend on, as JSON holds them."""
    values = asdict(plan)
    return {one.name: values[one.name] for one in _counted_fields(plan)}


def _counted_fields(plan) -> list[Field]:
    return [one for one in fields(plan) if one.metadata.get("results", True)]


@dataclass(frozen=True)
class Plan:
    """What a comparison of fine-tuning methods does. `settings`: of every method; `source`: where `model` is read."""

    task: str
    model: str
    tokenizer: str | None
    pooling: str
    n_layer: int  # these three of a random model
    n_embd: int
    vocab_size: int
    parity: str | None
    max_length: int  # tokens a sentence
    max_train_samples: int | None
    settings: dict[str, FinetuneOptions]
    model_sha256: str | None  # of the weights that a run starts from
    text_sha256: str
    source: str = aside()
    output_dir: Path = aside()
    methods: list[str] = aside()
    seeds: list[int] = aside()
    trace_sentences: int = aside(32)
    protocol: Protocol = aside(ONE_SPLIT)  # `parity`, `folds` and `by_seed` say which
    matrix_spikes: str | None = None  # None: as the model has it
    spike_levels: int | None = None
    folds: int | None = None
    intermediate: str | None = None  # a task that is trained on first
    intermediate_sha256: str | None = None
    teacher: str | None = None
    by_seed: bool | None = None  # split as by parity "library", without its settings
    labels_sha256: str | None = None  # of a task of one's own
    report_to: list[str] = aside(())  # what the Trainer reports to, by transformers' names: tensorboard, say

    @property
    def bf16(self) -> bool:
        """Of all methods: runs of one folder are compared."""
        return any(options.bf16 for options in self.settings.values())


@dataclass(frozen=True)
class Comparison:
    """What all runs of a plan share. `results`: what is known before the first run (see report/results.py)."""

    plan: Plan
    data: DatasetDict
    tokens: DatasetDict
    tokenizer: PreTrainedTokenizerBase
    results: dict
    source: Source | None = None  # the sentences of the intermediate task
    teacher: Teacher | None = None

    def data_of(self, seed: int) -> tuple[DatasetDict, DatasetDict]:
        """Text and tokens as `seed` reads them."""
        if self.plan.protocol.one_split:
            return self.data, self._answered(self.data, self.tokens)
        data = self.plan.protocol.split(self.data, seed)
        return data, self._answered(data, tokenize(data, self.tokenizer, self.plan.max_length)[0])

    @cached_property
    def first(self) -> Dataset:
        """Tokens of the intermediate task, with what a teacher answers."""
        assert self.source is not None
        data = DatasetDict(train=self.source.text)
        return self._answered(data, tokenize(data, self.tokenizer, self.plan.max_length)[0])["train"]

    def _answered(self, data: DatasetDict, tokens: DatasetDict) -> DatasetDict:
        """`tokens` of `data`, and of the training sentences what the teacher answers, where there is one."""
        if self.teacher is None:
            return tokens
        answers = self.teacher.of(data["train"]["text"])
        return DatasetDict({**tokens, "train": tokens["train"].add_column(ANSWERS, answers)})


def begin(
    plan: Plan,
    data: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    baselines: bool = True,
    source: Source | None = None,
    teacher: Teacher | None = None,
) -> Comparison:
    """The comparison that `plan` describes, before its first run; `baselines`: whether to fit them."""
    tokens, cut = tokenize(data, tokenizer, plan.max_length)
    sizes = {split: len(rows) for split, rows in plan.protocol.split(data, plan.seeds[0]).items()}
    more = {} if source is None else {source.name: source.text}
    known = TASKS.get(plan.task)  # no task of one's own is called as one of these
    results = {
        **header(SCHEMA, plan.task, plan.model, plan.bf16, counted(plan)),
        "data": sizes | {"cut_short": cut},
        "split": data["test"].info.description if plan.protocol.one_split else "",
        "baselines": _baselines(plan, data, more) if baselines else [],
        "first": _first(source, teacher),
        "published": list(known.published) if known else [],
        "metric": known.metric if known else "accuracy",
    }
    return Comparison(plan, data, tokens, tokenizer, results, source, teacher)


def _baselines(plan: Plan, data: DatasetDict, more: dict[str, Dataset]) -> list[dict]:
    """Bags of words, fitted on what methods learn from; where seeds have splits of their own their mean over these."""
    if plan.protocol.one_split:
        return bag_of_words_baselines(data, more)
    rows = []
    for of_seeds in zip(*(bag_of_words_baselines(plan.protocol.split(data, seed), more) for seed in plan.seeds)):
        row = {"method": of_seeds[0]["method"]}
        for key in of_seeds[0].keys() - row.keys():
            row[key], row[f"{key}_spread"] = mean_and_spread([one[key] for one in of_seeds])
        rows.append(row | {"parameters": round(row["parameters"])})
    return rows


def _first(source: Source | None, teacher: Teacher | None) -> dict:
    """What methods learn from beside the task: see report/results.py."""
    task = None if source is None else {"task": source.name, "sentences": len(source.text), "left_out": source.left_out}
    return {"intermediate": task, "teacher": None if teacher is None else teacher.record}


def header(schema: str, task: str, model: str, bf16: bool, options: dict) -> dict:
    """What every results.json begins with."""
    named = {"schema": schema, "task": task, "model": model, "complete": False, "precision": name_of(bf16)}
    return named | {"options": options, "versions": {name: importlib.metadata.version(name) for name in PACKAGES}}


def sha256_of_text(data: DatasetDict) -> str:
    texts = "\n".join(text for split in data.values() for text in split["text"])
    return hashlib.sha256(texts.encode()).hexdigest()


def sha256_of_labels(data: DatasetDict) -> str:
    said = [labels_of(data), *(list(split["label"]) for split in data.values())]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def sha256_of_weights(source: Path) -> str | None:
    """Of the file that a run starts from; None for random weights and for a hub id."""
    file = source / "model.safetensors" if source.is_dir() else source
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def take_up(out: Path, options: dict, runs: list[dict]) -> None:
    """Make `out` the folder of a comparison with `options` (see `counted`), begun or new; `runs`: its finished ones.

    Raises:
        ValueError: it holds results of other settings. A method that has nothing there yet may have any.
    """
    if _begun(out):
        refuse_other_settings(out, options, runs)
    else:  # a false start, which is forgotten
        shutil.rmtree(out / "tokenizer", ignore_errors=True)
    write_json(out / "options.json", options)


def bf16_of(out: Path) -> bool | None:
    """Whether what was begun in a comparison's folder computes in bfloat16; None where nothing was."""
    before = _flat(_options_of(out) or {}) if _begun(out) else {}
    return next((bool(value) for key, value in before.items() if key.split(".")[-1] == "bf16"), None)


def read_options(file: Path) -> dict:
    """What `take_up` wrote to an options.json, `settings` as FinetuneOptions; settings of later versions have their
    defaults.

    Raises:
        OSError: no such file. ValueError: none of a comparison by subj_finetune.py, or values out of range.
    """
    content = read_json(file, keys=tuple(one.name for one in _counted_fields(Plan) if one.default is MISSING))
    try:
        settings = {name: FinetuneOptions(**values) for name, values in content["settings"].items()}
    except (TypeError, AttributeError) as error:
        raise DamagedFile(f"{file} must hold settings of each method as this version knows them ({error})") from error
    if missing := set(METHODS) - set(settings):
        raise DamagedFile(f"{file} must hold settings of every method, has none of {', '.join(sorted(missing))}")
    return content | {"settings": settings}


def require_same(plan: Plan, file: Path, wanted: dict) -> None:
    """Raise ValueError where `plan` is not the one that wrote `file`, whose content is `wanted` (of `read_options`)."""
    wanted = wanted | {"settings": {name: asdict(options) for name, options in wanted["settings"].items()}}
    if changes := differences(wanted, counted(plan)):
        raise ValueError(
            f"--config {file} is of other runs than these would be ({changes}): give the model and the text that they "
            "had, and --intermediate-sentences if they had it"
        )


def _begun(out: Path) -> set[str]:
    """Names of the folders in `out` that hold runs or trials, and of base/."""
    return {file.parents[1].name for file in [*out.glob("*/seed*/*"), *out.glob("trials/*/seed*/*")]}


def _options_of(out: Path) -> dict | None:
    """What `take_up` was called with in `out`, None if nothing says it."""
    if (out / "options.json").is_file():
        return read_json(out / "options.json")
    results = out / "results.json"
    return read_json(results, keys=("options",))["options"] if results.is_file() else None


def refuse_other_settings(out: Path, options: dict, runs: list[dict]) -> None:
    """Raise ValueError where the comparison begun in `out` has other settings; arguments as of `take_up`."""
    before = _options_of(out)
    if before is None:
        if any(out.glob("*/seed*/*.json")):  # something was finished
            raise ValueError(
                f"{out} holds results, but no options.json says of which settings: give another --output-dir"
            )
        return
    settings = before.get("settings")
    finished = {run["method"]: run["settings"] for run in runs if "settings" in run}
    of_methods = (settings if isinstance(settings, dict) else {}) | finished
    # An earlier version had fewer settings: those that it had not were what they are by default now.
    usual = {one.name: one.default for one in fields(FinetuneOptions) if one.default is not MISSING}
    before["settings"] = {name: usual | values for name, values in of_methods.items()}
    if changes := differences(before, options, tuple(f"settings.{method}." for method in set(METHODS) - _begun(out))):
        raise ValueError(
            f"{out} holds results of other settings ({changes}): give another --output-dir, or delete this one"
        )


def differences(before: dict, options: dict, others: tuple[str, ...] = ()) -> str:
    """What is different in `options`, in words; but for keys that begin with one of `others`."""
    old, new = _flat(before), _flat(options)
    differing = [key for key in new if old.get(key) != new[key] and not key.startswith(others)]
    return "; ".join(f"{key} was {old.get(key)!r}, is {new[key]!r}" for key in differing)


def _flat(options: dict, prefix: str = "") -> dict:
    """Nested dicts as one, with dotted keys."""
    pairs = {}
    for key, value in options.items():
        pairs |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return pairs


def run_missing(
    out: Path, runs: list[dict], train: Callable[[dict, str], None], write: Callable[[bool], None], jobs: int = 1
) -> None:
    """Call `train(run, description)` for each of `runs` that has no run.json yet.

    Args:
        runs: what makes each one: method, seed and, where it is compared too, rank; its folder is `folder_of(run)`.
        train: leaves run.json there, last.
        write: of all finished runs, the results; called before each run (False: more are to come) and at the end.
        jobs: how many at a time; with more than one, `train` can be pickled.
    """
    devices = PartialState()
    missing = [run for run in runs if not (out / folder_of(run) / "run.json").is_file()]
    if devices.is_main_process:
        for finished in out.glob("*/seed*/run.json"):  # whose process may have been killed just after it
            shutil.rmtree(finished.with_name("training"), ignore_errors=True)
    named = [" ".join(f"{key} {value}" for key, value in run.items()).removeprefix("method ") for run in missing]
    named = [f"{runs.index(run) + 1}/{len(runs)} {name}" for run, name in zip(missing, named)]
    took: dict[str, list[float]] = defaultdict(list)  # seconds of this call's runs, by method
    if jobs > 1:
        write(False)
        calls = (partial(train, run, named[i] + _to_go(took, missing[i:], jobs)) for i, run in enumerate(missing))
        for number, seconds in side_by_side(calls, jobs):
            took[missing[number]["method"]].append(seconds)
            write(False)
        return write(True)
    for number, run in enumerate(missing):
        if devices.is_main_process:
            write(False)
        started = perf_counter()
        train(run, named[number] + _to_go(took, missing[number:]))
        devices.wait_for_everyone()
        took[run["method"]].append(perf_counter() - started)
    if devices.is_main_process:
        write(True)


def _to_go(took: dict[str, list[float]], runs: list[dict], jobs: int = 1) -> str:
    """How long `runs` will take, `jobs` at a time, by what earlier ones of the same method took, or of any; nothing
    before the first."""
    if not (known := list(chain.from_iterable(took.values()))):
        return ""
    seconds = sum(fmean(took.get(run["method"]) or known) for run in runs) / jobs
    return f" (all: {tqdm.format_interval(seconds)} to go)"


def run_trials(comparison: Comparison, number: int, base: Callable[[], nn.Module]) -> str:
    """`number` trials of each method on the first seed, judged on validation, or with `plan.folds` by the mean over
    folds of train and validation: the test labels are not used.

    Args:
        base: gives the model that all of them start from.

    Returns:
        The table of trials.md.
    """
    plan, seed = comparison.plan, comparison.plan.seeds[0]
    trials = [(trial, method) for trial in range(number) for method in plan.methods]
    records, judged = [], _judged(comparison)
    for done, (trial, method) in enumerate(trials, 1):
        folder = plan.output_dir / "trials" / method / f"seed{seed}-trial{trial}"
        if not (folder / "trial.json").is_file():
            options = sample_trial(plan.settings[method], trial)
            found = []
            for name, tokens in judged.items():
                model, place = adapt(base(), method, options, seed), folder / f"training{name}"
                description = f"{done}/{len(trials)} {method} trial {trial}{name}"
                found.append(
                    finetune(model, method, tokens, comparison.tokenizer, place, seed, options, description)[1]
                )
            write_json(folder / "trial.json", found[0] | _over_folds(found))
        for place in folder.glob("training*"):
            shutil.rmtree(place)
        records.append(read_json(folder / "trial.json", keys=TRIAL_KEYS))
    write_text(plan.output_dir / "trials.md", table := trials_table(records))
    return table


def _judged(comparison: Comparison) -> dict[str, DatasetDict]:
    """What a trial trains on and is judged by, by name; never a test sentence."""
    if (count := comparison.plan.folds) is None:
        return {"": DatasetDict({split: comparison.tokens[split] for split in ("train", "validation")})}
    split = folds(count, with_test=False).split
    return {f" fold {number}": split(comparison.tokens, number) for number in range(count)}


def _over_folds(records: list[dict]) -> dict:
    """What a trial's record says of all its folds; nothing where it has none."""
    if len(records) == 1:
        return {}
    accuracies = [record["test_accuracy"] for record in records]
    return {"validation_accuracy": sum(accuracies) / len(accuracies), "accuracy_by_fold": accuracies}


def write_results(comparison: Comparison, complete: bool) -> None:
    """results.json, results.md, results.csv and accuracy.png from every finished run in the folder; where no more are
    to come report.html too."""
    out = comparison.plan.output_dir
    runs = read_runs(out)
    summary = summarize(runs)
    results = comparison.results | {
        "complete": complete and len({tuple(row["seeds"]) for row in summary}) == 1,
        "runs": runs,
        "summary": summary,
        "comparisons": _comparisons(runs, comparison.plan.protocol),
    }
    write_json(out / "results.json", results)
    write_text(out / "results.md", markdown(results))
    write_spreadsheet(runs, out / "results.csv")
    draw_accuracy(results, out / "accuracy.png")
    if complete:
        write_page(results, out)


def _comparisons(runs: list[dict], protocol: Protocol) -> list[dict]:
    """Intervals are over sentences and seeds that all seeds test; or over sentences, where each is tested once; else
    there are none."""
    return compare(runs, protocol.disjoint) if protocol.one_split or protocol.disjoint else []
