"""One comparison out of several folders: of shards, or of other machines."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..report.results import RUN_KEYS, folder_of, read_runs
from ..utils.errors import read_json
from ..utils.files import whole_files, write_json
from .experiment import refuse_other_settings, sha256_of_weights


def take_runs(
    out: Path, folder: Path, options: dict, keys: Sequence[str] = RUN_KEYS, answers: str = "test_correct"
) -> int:
    """Copy into `out` the finished runs of another folder of the same comparison, with what they started from and their
    traces: of a shard, of another machine. Adapters name the base model in `out` from then on.

    Args:
        options: of the comparison (see `counted`).
        keys: what each record must hold; answers: which of them tells different runs apart.

    Returns:
        How many were copied; those that `out` has already are not.

    Raises:
        ValueError: no runs, results of other settings, or others than `out` has of the same method and seed.
    """
    if not (runs := read_runs(folder, keys)):
        raise ValueError(f"{folder} holds no finished run (METHOD/seed0/run.json): give output folders of this recipe")
    refuse_other_settings(folder, options, runs)
    known, copied = {folder_of(run): run for run in read_runs(out, keys)}, 0
    for run in runs:
        place, base = folder_of(run), f"base/seed{run['seed']}"
        if place in known:
            if known[place][answers] != run[answers]:
                raise ValueError(f"{out} and {folder} hold different runs of {place}: move one of them away")
            continue
        if (folder / base).is_dir():
            _copy(folder, out, base, last="config.json")
        for trace in folder.glob(f"traces/{place.replace('/', '-')}.*"):
            (out / "traces").mkdir(exist_ok=True)
            shutil.copyfile(trace, out / "traces" / trace.name)
        _copy(folder, out, place, last="run.json")
        copied += 1
    return copied


def _copy(folder: Path, out: Path, place: str, last: str) -> None:
    """The files of `folder`/`place` into `out`/`place`, `last` last; of a base model only where there is none."""
    if last == "config.json" and (out / place / last).is_file():
        if sha256_of_weights(out / place) != sha256_of_weights(folder / place):
            raise ValueError(
                f"{out} and {folder} hold different models in {place}: their runs are not of one comparison"
            )
        return
    with whole_files(out / place, last=last) as temporary:
        for file in (folder / place).iterdir():
            if file.is_file():
                shutil.copyfile(file, temporary / file.name)
        if (adapter := temporary / "adapter_config.json").is_file():
            base = str((out / "base" / Path(place).name).resolve())
            write_json(adapter, read_json(adapter) | {"base_model_name_or_path": base})
