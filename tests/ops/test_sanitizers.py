"""The kernels under sanitizers, without torch: sanitized.cpp runs them on buffers of exactly their size.

AddressSanitizer sees what is read or written outside a buffer, UndefinedBehaviorSanitizer what C++ does not define
(also with NaN, infinities, 1e30), ThreadSanitizer what two threads touch that have blocks of their own. Of each it is
shown that it sees such a thing.
"""

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from spikegpt_lora.ops import build

DRIVER = Path(__file__).with_name("sanitized.cpp")
MEMORY = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
THREADS = ["-fsanitize=thread"]


@pytest.fixture(scope="module", params=["g++", "clang++"])
def program(request, tmp_path_factory):
    """program(*sanitizers): the driver, built with them."""
    folder = tmp_path_factory.mktemp(request.param)
    return functools.cache(lambda *sanitizers: built(request.param, sanitizers, folder / f"driver{len(sanitizers)}"))


def built(compiler, sanitizers, target):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    command = [compiler, *build.cpp_compiler()[1], "-g1", "-pthread", *sanitizers, "-x", "c++", "-o", str(target)]
    trial = subprocess.run([*command, "-"], input="int main() {}", capture_output=True, text=True)
    trial = trial if trial.returncode else subprocess.run([target], capture_output=True, text=True)
    if trial.returncode:
        pytest.skip(f"{compiler} {' '.join(sanitizers)} does not work here: {trial.stderr.strip()[-300:]}")
    block = dict(re.findall(r"constexpr \w+ (LANES|VECTORS) = (\d+);", (build.sources() / "ops.cpp").read_text()))
    sizes = [f"-DWIDEST={block['LANES']}", f"-DNARROWEST={block['VECTORS']}"]
    done = subprocess.run([*command, *sizes, f"-I{build.sources()}", str(DRIVER)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def run(program, *arguments, symbols=0):
    """The driver's end; a report without symbols takes no time. Leaks are not looked for: no kernel allocates."""
    options = {"ASAN_OPTIONS": f"detect_leaks=0:symbolize={symbols}", "TSAN_OPTIONS": f"symbolize={symbols}"}
    command = [program, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | options, capture_output=True, text=True)


def kernels(program):
    """(name, number of buffers) of every kernel that the driver knows."""
    lines = run(program, "buffers").stdout.splitlines()
    assert len(lines) > 10
    return [(name, int(count)) for name, count in map(str.split, lines)]


def test_the_driver_runs_every_kernel():
    structs = "".join(file.read_text() for file in build.sources().glob("*.h")).split("\nstruct ")
    called = {re.match(r"\w+", text)[0] for text in structs if re.search(r"operator\(\)\(int64_t\b.*, int n\b", text)}
    assert len(called) > 10 and called <= set(re.findall(r"(\w+)<(?:scalar, real|weight)", DRIVER.read_text()))


@pytest.mark.slow
def test_no_kernel_leaves_its_memory_or_what_is_defined(program):
    done = run(program(*MEMORY), symbols=1)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_threads_with_other_blocks_touch_nothing_in_common(program):
    done = run(program(*THREADS), symbols=1)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_every_buffer_one_element_too_small_is_seen(program):
    driver = program(*MEMORY)
    for kernel, buffers in kernels(driver):
        for i in range(buffers):
            assert "heap-buffer-overflow" in run(driver, "short", kernel, i).stderr, (kernel, i)


@pytest.mark.slow
def test_a_block_that_two_threads_write_is_seen(program):
    driver = program(*THREADS)
    for kernel, _ in kernels(driver):
        assert "data race" in run(driver, "overlap", kernel).stderr, kernel


@pytest.mark.slow
def test_a_conversion_without_a_result_is_seen(program):
    assert "outside the range" in run(program(*MEMORY), "undefined").stderr
