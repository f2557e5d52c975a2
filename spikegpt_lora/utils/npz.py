"""Reads untrusted .npz files: types, shapes and sizes are checked before any array is read."""

import math
import zipfile
from pathlib import Path

import numpy as np

from .errors import DamagedFile

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(path: str | Path, most: int = 1 << 30) -> dict[str, np.ndarray]:
    """All arrays of an .npz file by name; pickled objects are never read.

    Args:
        most: bytes that they may take up in memory together; a file with more is refused unread.

    Raises:
        DamagedFile: more than that, no .npz file, or an array that is not what its header says.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            return _read(file, most)
        except Exception as error:  # readers of damaged files raise anything
            raise DamagedFile(f"{path} is no .npz file to be read: {str(error) or type(error).__name__}") from error


def _read(file, most: int) -> dict[str, np.ndarray]:
    arrays = {}
    with zipfile.ZipFile(file) as archive:
        size = sum(member.file_size for member in archive.infolist())
        if size > most:
            raise DamagedFile(f"its arrays take up {size:,} bytes, at most {most:,} are read; most={size} reads it")
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise DamagedFile(f"it holds {name} twice")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DamagedFile(f"{name} is in a compression that numpy does not write")
            with archive.open(member) as array:
                _require_array(name, array, member.file_size)
                array.seek(0)
                arrays[name] = np.lib.format.read_array(array, allow_pickle=False)
    return arrays


def _require_array(name: str, array, size: int) -> None:
    """Raise where the shape and type in the header of an array of `size` bytes are not those of what is behind it."""
    version = np.lib.format.read_magic(array)
    if version not in _HEADERS:
        raise DamagedFile(f"{name} is in version {version} of numpy's format, which is for other names of fields")
    shape, _, dtype = _HEADERS[version](array)
    declared, there = math.prod(shape) * dtype.itemsize, size - array.tell()
    if dtype.hasobject:
        raise DamagedFile(f"{name} holds pickled objects, which are never read")
    if declared != there:
        raise DamagedFile(f"{name} says that it holds {declared:,} bytes, and holds {there:,}")
