"""Where and by what a run was made: command, processor, commit."""

import json
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch

CHECKOUT = Path(__file__).parents[2]  # of a package that is installed: the folder of all packages


def made_by(device: torch.device) -> dict[str, str | int | None]:
    """What a record keeps of the process that made it and of `device`; see report/results.py."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.system(),
        "commit": commit(),
    }


def processor_name(file: Path = Path("/proc/cpuinfo")) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def commit(checkout: Path = CHECKOUT) -> str | None:
    """The commit that the package is of, with "-dirty" where files were changed since; None where nothing says it."""
    if not (checkout / ".git").exists():
        return _installed_commit()
    # Without locks: it only looks.
    command = ["git", "--no-optional-locks", "-C", checkout, "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run([*command, "--abbrev=40"], capture_output=True, text=True)
    except OSError:  # no git here
        return None
    return done.stdout.strip() or None


def _installed_commit() -> str | None:
    """Of what `pip install git+https://...` left (PEP 610)."""
    try:
        origin = distribution("spikegpt_lora").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    return json.loads(origin or "{}").get("vcs_info", {}).get("commit_id")
