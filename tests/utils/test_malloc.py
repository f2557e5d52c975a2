"""keep_freed_memory: afterwards a process that frees and allocates again touches no new pages."""

import subprocess
import sys

import pytest

CODE = """
import ctypes, resource, sys, torch
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of one size, whatever the system's default
from spikegpt_lora.utils.malloc import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    raise SystemExit(3)
def use():
    a = [torch.ones(10_000_000) for _ in range(2)]  # 40 MB each: above what glibc ever learns to keep by itself
for _ in range(3):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode):
    done = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_memory_that_was_freed_is_used_again():
    assert faults("keep") < 1000 < faults("default")
