"""Files that appear whole or not at all, whatever interrupts the writer; folders that one process writes at a time."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from .errors import writing

UNFINISHED = ".unfinished-"  # how the names of temporary files begin


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it becomes `path` at the end, or is removed on an exception.

    Raises:
        OSError: no such folder, no permission, or no room for it.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{UNFINISHED}{path.stem}-", suffix=path.suffix)
    os.close(handle)
    try:
        with writing(path):
            yield Path(temporary)
        _move(Path(temporary), path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # a signal may come when it is moved already
            os.unlink(temporary)
        raise


@contextmanager
def whole_files(folder: str | os.PathLike, last: str) -> Iterator[Path]:
    """Yield a temporary folder within `folder`, which is made; its files become `folder`'s at the end, each whole and
    `last` last: where that one is, all are. On an exception none does."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as temporary:
        with writing(folder):
            yield Path(temporary)
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == last):
            _move(file, folder / file.name)


def _move(file: Path, place: Path) -> None:
    os.chmod(file, 0o666 & ~_umask())  # mkstemp and safetensors make files that only their owner reads
    os.replace(file, place)


def write_json(path: str | os.PathLike, content) -> None:
    """Write `content` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """For the only writer of `folder`, which is made: whoever else asks meanwhile is refused. What killed writers left
    half-written in it is removed.

    Raises:
        ValueError: another process works in this folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = filelock.FileLock(folder / ".lock", blocking=False), folder / ".lock-holder"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except filelock.Timeout as error:
            pid = holder.read_text(encoding="utf-8").strip() if holder.is_file() else "unknown"
            raise ValueError(
                f"another run (pid {pid}) works in {folder}: wait for it, stop it, or give another --output-dir"
            ) from error
        except NotImplementedError:  # a file system without locks
            pass
        holder.write_text(f"{os.getpid()}\n", encoding="utf-8")
        remove_unfinished(folder)
        yield


def remove_unfinished(folder: Path) -> None:
    """Delete the temporary files below `folder` that `whole_file` leaves where its process is killed."""
    for file in folder.rglob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError):
            shutil.rmtree(file) if file.is_dir() else file.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
