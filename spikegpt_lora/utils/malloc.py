"""A setting of the C library's malloc that makes training on a CPU faster."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for its next tensors; for a program's main, not for a library.

    By default glibc hands large blocks back to the system as soon as they are free. A training step frees and asks for
    the same hundred megabytes again and again, and the system clears every page of them every time.

    Returns:
        Whether it was set: glibc only.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return all(set_option(name, 2**30) == 1 for name in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))
