"""keep_freed_memory: afterwards a process that frees and allocates again touches no new pages."""

import subprocess
import sys

import pytest

from spikegpt_lora.utils import malloc

CODE = """
import ctypes, resource, runpy, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of one size, whatever the system's default
if sys.argv[1] == "keep" and not runpy.run_path(sys.argv[2])["keep_freed_memory"]():
    raise SystemExit(3)
SIZE, ROUNDS = 40_000_000, 5  # bytes: above what glibc ever learns to keep by itself
def use():
    a = [b"1" * SIZE for _ in range(2)]
for _ in range(3):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(ROUNDS):
    use()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults / (2 * ROUNDS * SIZE / resource.getpagesize()))
"""


def share_of_pages_touched_anew(mode):
    command = [sys.executable, "-c", CODE, mode, malloc.__file__]  # alone: nothing else is imported
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("not glibc")
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_memory_that_was_freed_is_used_again():
    assert share_of_pages_touched_anew("keep") < 0.01 < 0.9 < share_of_pages_touched_anew("default")
