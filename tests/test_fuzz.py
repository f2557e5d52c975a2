"""No spoilt file runs code, hangs, fills the memory, ends in a traceback or passes as right: see fuzz.py."""

import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fuzz import TARGETS

SECONDS, MEGABYTES = 10, 2000  # that one mutant may take


def mutants(target, seed, count):
    """How each mutant ended; the process is killed when a line takes too long to come."""
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), target, str(seed), str(count)]
    quiet = os.environ | {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet)
    lines: queue.Queue = queue.Queue()
    threading.Thread(target=lambda: [lines.put(line) for line in process.stdout] and None, daemon=True).start()
    errors = threading.Thread(target=lambda: errors_seen.append(process.stderr.read()), daemon=True)
    errors_seen: list[str] = []
    errors.start()
    try:
        for number in range(count):
            try:
                yield json.loads(lines.get(timeout=SECONDS if number else 120))  # the first has to import everything
            except queue.Empty:
                process.kill()
                errors.join()
                died = f"ended with {process.wait()}: {errors_seen[0][-2000:]}"
                pytest.fail(f"{target}, seed {seed}: mutant {number} gave no answer within {SECONDS} s or {died}")
    finally:
        process.kill()


def assert_harmless(target, seed, count):
    for mutant in mutants(target, seed, count):
        where = f"python tests/fuzz.py {target} {seed}, mutant {mutant['number']} ({mutant['file']})"
        assert mutant["ended"] in ("read", "sentence"), f"{where}: {mutant['text']}"
        assert mutant["megabytes"] < MEGABYTES and not mutant["dangerous"], f"{where}: {mutant}"


@pytest.mark.parametrize("target", TARGETS)
def test_spoilt_files_end_in_a_sentence(target):
    assert_harmless(target, seed=0, count=30)


@pytest.mark.attack
@pytest.mark.parametrize("target", TARGETS)
def test_many_spoilt_files_end_in_a_sentence(target):
    assert_harmless(target, seed=1, count=500)
