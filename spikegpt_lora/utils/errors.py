"""Errors as one sentence: the rule, the value, the file, and the next step.

`sentence` is the one place where an exception becomes what a user reads; `command_line.run` prints it. What it does not
know is a defect, and it says so instead of showing where in our code it happened.
"""

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

TRACEBACK = "SPIKEGPT_LORA_TRACEBACK"  # environment: 1 shows where in the code it happened

_OF_SYSTEM = {
    errno.ENOSPC: "the disk is full: make room, then give the same command again",
    errno.EDQUOT: "the disk quota is used up: make room, then give the same command again",
    errno.EROFS: "the file system is read-only: name another folder",
    errno.EACCES: "it belongs to somebody else: name another folder, or change its permissions",
    errno.EPERM: "it belongs to somebody else: name another folder, or change its permissions",
    errno.EEXIST: "a file stands where a folder should be: name another folder",
    errno.ENOTDIR: "a file stands where a folder should be: name another folder",
    errno.ENAMETOOLONG: "the name is too long: name another folder",
}
_NO_ROOM = re.compile("No space left on device|unexpected pos|PytorchStreamWriter failed|file write failed")
_NO_MEMORY = re.compile("can't allocate memory|[Oo]ut of memory|not enough memory")


class Stopped(KeyboardInterrupt):
    """SIGTERM: whoever runs this wants it to end, as with Ctrl-C."""


class DamagedFile(ValueError):
    """A file that cannot be what it should be; the message names it."""


def sentence(error: BaseException) -> str | None:
    """What a user should read of `error`; None for one that nobody foresaw."""
    text = str(error).strip()
    if (isinstance(error, SafetensorError | RuntimeError) or type(error) is Exception) and _NO_ROOM.search(text):
        return f"a file could not be written ({first_line(error)}): {_OF_SYSTEM[errno.ENOSPC]}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_MEMORY.search(text):
        return f"the memory does not suffice ({first_line(error) or 'MemoryError'}): take smaller sizes or batches"
    if isinstance(error, SafetensorError):
        return f"a .safetensors file is damaged or cut short ({text}): fetch or write it again"
    if isinstance(error, OSError) and error.errno in _OF_SYSTEM and error.filename:
        return f"{error.filename}: {error.strerror}; {_OF_SYSTEM[error.errno]}"
    if isinstance(error, OSError | ValueError | FloatingPointError) and not isinstance(error, UnicodeError):
        return text or type(error).__name__
    return None


def unforeseen(error: BaseException) -> str:
    """What a user should read of an exception that `sentence` does not know."""
    return (
        f"{type(error).__name__}: {first_line(error)}\nThis was not foreseen: a defect of spikegpt_lora or of a "
        f"package below it. {TRACEBACK}=1 with the same command shows where; please report it."
    )


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Within it, what says in its writer's own words that there is no room becomes an OSError that names `path`."""
    try:
        yield
    except Exception as error:  # tokenizers has no kind of its own
        number = error.errno if isinstance(error, OSError) else _NO_ROOM.search(str(error)) and errno.ENOSPC
        if number not in (errno.ENOSPC, errno.EDQUOT) or getattr(error, "filename", None):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def read_json(path: str | Path, most: int = 1 << 26, keys: tuple[str, ...] = ()) -> dict:
    """The object in a JSON file.

    Args:
        most: bytes that are read; a larger file is refused unread.
        keys: what it must hold.

    Raises:
        DamagedFile: too large, no UTF-8, no JSON, nested too deeply, something else than an object, or one without a
            key of `keys`.
        OSError: it cannot be opened.
    """
    path = Path(path)
    if (size := path.stat().st_size) > most:
        raise DamagedFile(f"{path} must be at most {most:,} bytes, has {size:,}: it is no file of ours")
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DamagedFile(f"{path} is no whole JSON file ({reason}): delete it, or write it again") from error
    if not isinstance(content, dict):
        raise DamagedFile(f"{path} must hold a JSON object, got a {type(content).__name__}: it is no file of ours")
    if missing := [key for key in keys if key not in content]:
        raise DamagedFile(
            f"{path} must hold {', '.join(keys)}, has no {', '.join(missing)}: delete it if it is not yours"
        )
    return content


def first_line(error: BaseException) -> str:
    """What an exception says first; readers of files go on with lists."""
    return str(error).strip().split("\n")[0]
