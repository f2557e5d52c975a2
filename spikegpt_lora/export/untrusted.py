"""Reads untrusted files: their kind and size are checked before anything is read.

Every function raises `errors.DamagedFile`, which names the file and the reason, for whatever is wrong with one. So does
`npz.read_npz`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from ..utils.errors import DamagedFile, sentence

ROOM = 1 << 28  # bytes that any file may take up in memory; a larger file
TIMES = 50  # may take up so many times its own size: zeros are compressed a thousandfold
DEPTH = 8  # groups inside groups
OBJECTS = 100_000  # groups and data sets
PLAIN = (1, 2, 3)  # HDF5's filters deflate, shuffle, fletcher32: what every reader has


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever happens while `path` is read ends as a DamagedFile: readers of damaged files raise anything."""
    try:
        yield
    except DamagedFile:
        raise
    except Exception as error:
        raise DamagedFile(f"{path.name} cannot be read ({reason_of(error)})") from error


def reason_of(error: Exception) -> str:
    """An exception in words, with its kind where it is none of those that users meet."""
    return sentence(error) or f"{type(error).__name__}: {error}"


def require(path: Path, holds: bool, reason: str) -> None:
    """Raise DamagedFile with the reason unless `holds`."""
    if not holds:
        raise DamagedFile(f"{path.name} {reason}")


def room(path: Path) -> int:
    """Bytes that `path` may take up in memory: what it says beyond that is not believed."""
    return max(ROOM, TIMES * path.stat().st_size)


def require_room(path: Path, size: int) -> None:
    """Raise DamagedFile where `path` would take up `size` bytes in memory and that is too much."""
    most = room(path)
    require(path, size <= most, f"would take up {size:,} bytes in memory, at most {most:,} is believed")


def require_plain_hdf5(path: Path) -> None:
    """Raise unless an HDF5 file holds nothing but groups and data sets, each once, inside it, and of a size to be read.

    Refused: links other than hard ones, an object that is reached twice (so also one that holds itself), storage in
    other files, virtual data sets, other filters than `PLAIN`, types that are neither numbers nor text.
    """
    size, seen = 0, set()
    with reading(path), h5py.File(path, "r") as file:
        groups = [(file, 0)]
        while groups:
            group, depth = groups.pop()
            require(path, depth <= DEPTH, f"has groups more than {DEPTH} deep")
            _require_new(path, group, seen)
            for name in group:
                link = group.get(name, getlink=True)
                require(path, isinstance(link, h5py.HardLink), f"holds a link, {name}, to somewhere else")
                item = group[name]
                if isinstance(item, h5py.Group):
                    groups.append((item, depth + 1))
                else:
                    _require_new(path, item, seen)
                    size += _size_of(path, item)
                require_room(path, size)


def _require_new(path: Path, item, seen: set) -> None:
    address = h5py.h5o.get_info(item.id).addr
    require(path, address not in seen, f"holds {item.name} twice, or inside itself")
    seen.add(address)
    require(path, len(seen) <= OBJECTS, f"holds more than {OBJECTS:,} objects")
    for name in item.attrs:
        require(
            path, item.attrs.get_id(name).shape == (), f"has an attribute, {name} of {item.name}, that is no scalar"
        )


def _size_of(path: Path, item) -> int:
    """Bytes that a data set takes up when it is read, and its largest chunk beside it."""
    name = item.name
    require(path, isinstance(item, h5py.Dataset), f"holds {name}, which is no data set")
    created = item.id.get_create_plist()
    filters = {created.get_filter(i)[0] for i in range(created.get_nfilters())}
    require(path, not item.external and not item.is_virtual, f"keeps {name} in another file")
    require(path, filters <= set(PLAIN), f"holds {name} in a compression that not every reader has")
    text = h5py.check_string_dtype(item.dtype) is not None
    require(path, text or item.dtype.kind in "biuf", f"holds {name} of type {item.dtype}, neither numbers nor text")
    values = math.prod(item.shape or ())
    if text:
        return values * path.stat().st_size  # each may be as long as the file
    return (values + math.prod(item.chunks or ())) * item.dtype.itemsize
