"""Building the kernels: what is cached, what happens to two builds at once, to a killed one, and without a compiler.

Most tests put a script in the compiler's place, so that they take seconds and see exactly one thing.
"""

import logging
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import need_extension
from running import started

from spikegpt_lora import wkv_reference
from spikegpt_lora.ops import backend
from spikegpt_lora.ops.__main__ import main
from spikegpt_lora.ops.backend import load, use_extension
from spikegpt_lora.ops.build import SOURCES, ExtensionError, build_library
from spikegpt_lora.ops.wkv import wkv

COMPILER = """#!{python}
import pathlib, sys, time
if "--version" in sys.argv:
    print("scripted compiler 1.0")
elif "-c" in sys.argv or "-shared" in sys.argv:
    {action}
    pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_text("made by " + sys.argv[0])
"""

BUILD = "from spikegpt_lora.ops.build import build_library; print(build_library())"


def scripted_compiler(folder: Path, action: str = "pass", name: str = "cxx") -> Path:
    script = folder / name
    script.write_text(COMPILER.format(python=sys.executable, action=action))
    script.chmod(0o755)
    return script


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def start(code: str, **environment):
    return started([sys.executable, "-c", code], os.environ | {key: str(value) for key, value in environment.items()})


def test_a_library_is_built_once_and_then_found(cache, tmp_path, monkeypatch):
    log = tmp_path / "calls"
    action = f"open({str(log)!r}, 'a').write('x')"
    monkeypatch.setenv("CXX", str(scripted_compiler(tmp_path, action)))
    library = build_library()
    assert library.is_relative_to(cache) and library.read_text().startswith("made by")
    calls = len(log.read_text())
    assert build_library() == library
    assert len(log.read_text()) == calls
    assert [file.name for file in library.parent.iterdir() if file.name.startswith("build-")] == []


def test_processor_features_compiler_and_sources_have_libraries_of_their_own(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(scripted_compiler(tmp_path)))
    libraries = {build_library()}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    libraries.add(build_library())
    other = scripted_compiler(tmp_path, name="other")
    other.write_text(other.read_text().replace("1.0", "2.0"))
    monkeypatch.setenv("CXX", str(other))
    libraries.add(build_library())
    sources = tmp_path / "$my: cuda"  # what ninja and the shell would read as something else
    shutil.copytree(Path(__file__).parents[2] / "cuda", sources)
    (sources / "wkv.h").write_text("// changed\n")
    monkeypatch.setattr("spikegpt_lora.ops.build.sources", lambda: sources)
    libraries.add(build_library())
    assert len(libraries) == 4


def test_a_library_that_is_there_is_found_without_starting_a_process(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(scripted_compiler(tmp_path)))
    library = build_library()
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail(f"started {args}"))
    assert build_library() == library


def test_a_compiler_that_was_replaced_builds_anew(cache, tmp_path, monkeypatch):
    compiler = scripted_compiler(tmp_path)
    monkeypatch.setenv("CXX", str(compiler))
    before = build_library()
    os.utime(compiler, ns=(0, 0))
    assert build_library() != before


@pytest.mark.parametrize("command", ["{compiler} -O2 '-DA=b c'", "{wrapper} {compiler}", "  {compiler}  "])
def test_cxx_is_a_command_as_a_shell_reads_it(cache, tmp_path, monkeypatch, command):
    compiler, wrapper = scripted_compiler(tmp_path, "assert 'c' not in sys.argv"), tmp_path / "ccache"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", command.format(compiler=compiler, wrapper=wrapper))
    assert build_library().read_text() == f"made by {compiler}"


def no_ninja_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ninja", None)
    monkeypatch.setenv("PATH", str(tmp_path))


def no_ninja_program(monkeypatch, tmp_path):
    monkeypatch.setattr("ninja.BIN_DIR", "")
    monkeypatch.setenv("PATH", str(tmp_path))


def no_home(monkeypatch, tmp_path):
    for name in ("HOME", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where the user has no passwd entry


def no_command(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "g++ '-DA")


def no_program(monkeypatch, tmp_path):
    (tmp_path / "cxx").write_bytes(b"\x7fELF, but not quite")


def no_text(monkeypatch, tmp_path):
    scripted_compiler(tmp_path, r"sys.stderr.buffer.write(b'erreur \xe9'), sys.exit(1)")


def a_cache_that_is_a_file(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")


def a_cache_that_nobody_may_write(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/1")  # not even root


HOLES = {
    no_ninja_package: "ninja is missing.*pip install ninja",
    no_ninja_program: "ninja is missing.*pip install ninja",
    no_home: "no home directory.*TORCH_EXTENSIONS_DIR",
    no_command: "CXX must be a command .*got .*: No closing quotation",
    no_program: "cannot run .*cxx: Exec format error",
    no_text: "cxx failed on .*ops.cpp(.|\n)*erreur",
    a_cache_that_is_a_file: "cannot build in .*cache.*TORCH_EXTENSIONS_DIR names another place",
    a_cache_that_nobody_may_write: "cannot build in /proc/1.*TORCH_EXTENSIONS_DIR names another place",
}


@pytest.mark.skipif(not Path("/proc/1").is_dir(), reason="a system without /proc")
@pytest.mark.parametrize("hole", HOLES, ids=lambda hole: hole.__name__)
def test_where_it_cannot_be_built_one_warning_says_why_and_plain_torch_runs(cache, tmp_path, monkeypatch, caplog, hole):
    monkeypatch.setenv("CXX", str(scripted_compiler(tmp_path)))
    monkeypatch.setattr(backend, "_loaded", set())
    monkeypatch.setattr(backend, "_failed", {})
    hole(monkeypatch, tmp_path)
    x = torch.randn(2, 5, 3)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(wkv(x[0, 0], x[0, 1], x, x)[0], wkv_reference(x[0, 0], x[0, 1], x, x)[0])
    (record,) = caplog.records
    assert re.search(f"plain torch is used instead.*{HOLES[hole]}", record.message)
    with pytest.raises(ExtensionError, match=HOLES[hole]):
        wkv(x[0, 0], x[0, 1], x, x, backend="extension")


def test_two_processes_that_build_at_once_both_succeed(cache, tmp_path):
    log = tmp_path / "calls"
    action = f"time.sleep(1.0 if '-c' in sys.argv else 0); '-c' in sys.argv and open({str(log)!r}, 'a').write('x')"
    compiler = scripted_compiler(tmp_path, action)
    with start(BUILD, CXX=compiler) as first, start(BUILD, CXX=compiler) as second:
        processes = (first, second)
        outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    assert log.read_text() == "x" * len(SOURCES["cpu"])  # the second waited for the first


def test_a_killed_build_neither_blocks_nor_litters_the_next(cache, tmp_path, monkeypatch):
    begun = tmp_path / "begun"
    first = f"'-c' in sys.argv and not (begun := pathlib.Path({str(begun)!r})).exists()"
    compiler = scripted_compiler(tmp_path, f"{first} and (begun.touch(), time.sleep(100))")
    with start(BUILD, CXX=compiler) as process:
        while not begun.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
    assert list(cache.glob("**/build-*"))
    monkeypatch.setenv("CXX", str(compiler))
    begin = time.monotonic()
    assert build_library().is_file()
    assert time.monotonic() - begin < 20
    assert not list(cache.glob("**/build-*"))


def test_a_failed_build_says_why_in_the_compilers_words(cache, tmp_path, monkeypatch):
    action = "'-c' in sys.argv and sys.exit('wkv.h:1: error: this compiler is having a bad day')"
    monkeypatch.setenv("CXX", str(scripted_compiler(tmp_path, action)))
    with pytest.raises(ExtensionError, match=r"cxx failed on .*ops.cpp(.|\n)*having a bad day"):
        build_library()


def test_without_a_compiler_everything_works_after_one_warning(cache, tmp_path):
    code = """
import logging, torch
from spikegpt_lora import wkv, wkv_reference
from spikegpt_lora.neurons.lif import LIF
logging.basicConfig(format="%(levelname)s %(message)s")
x = torch.randn(2, 5, 3)
for _ in range(2):
    assert torch.equal(wkv(x[0, 0], x[0, 1], x, x)[0], wkv_reference(x[0, 0], x[0, 1], x, x)[0])
    LIF()(x)
try:
    wkv(x[0, 0], x[0, 1], x, x, backend="extension")
except RuntimeError as error:
    print(error)
"""
    with start(code, PATH=tmp_path, CXX=tmp_path / "missing") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err.count("WARNING no compiled kernels for cpu") == 1
    assert "no C++ compiler found" in err and "no C++ compiler found" in out


def test_a_library_built_earlier_serves_a_machine_without_compiler(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(scripted_compiler(tmp_path)))
    library = build_library()
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert build_library() == library


def test_a_cache_that_cannot_be_written_is_named(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(scripted_compiler(tmp_path)))
    cache.write_text("a file where a folder should be")
    with pytest.raises(ExtensionError, match="cannot build in .*TORCH_EXTENSIONS_DIR"):
        build_library()


def test_cuda_without_nvcc_is_a_cpu_build(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(ExtensionError, match="nvcc not found|built without CUDA"):
        build_library("cuda")
    monkeypatch.setenv("CXX", str(scripted_compiler(tmp_path)))
    assert build_library("cpu").is_file()


def test_other_devices_use_plain_torch_and_say_so_once(caplog, monkeypatch):
    monkeypatch.setattr(backend, "_failed", {})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not use_extension("auto", torch.device("mps"))
    assert caplog.text.count("no compiled kernels for mps") == 1
    with pytest.raises(ExtensionError, match="not for mps"):
        use_extension("extension", torch.device("mps"))


def test_the_default_backend_can_be_set_by_the_environment():
    code = (
        "import torch; from spikegpt_lora.ops import backend as e; print(e.use_extension('auto', torch.device('cpu')))"
    )
    with start(code, SPIKEGPT_LORA_BACKEND="reference", CXX="missing") as process:
        assert process.communicate(timeout=120)[0].strip() == "False"


@pytest.mark.parametrize("action, code", [("pass", 0), ("'-c' in sys.argv and sys.exit('error: no')", 1)])
def test_the_command_reports_what_it_built_and_where(cache, tmp_path, monkeypatch, capsys, action, code):
    monkeypatch.setenv("CXX", str(scripted_compiler(tmp_path, action)))
    assert main(["--device", "cpu"]) == code
    printed = capsys.readouterr()
    assert (f"cpu: {cache}" in printed.out) if code == 0 else ("error: no" in printed.err)


def test_the_kernels_build_wherever_there_is_a_compiler():
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    load("cpu")
    x = torch.randn(2, 5, 3)
    for ours, theirs in zip(wkv(x[0, 0], x[0, 1], x, x, backend="extension"), wkv_reference(x[0, 0], x[0, 1], x, x)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2", None])
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_every_compiler_and_instruction_set_passes_the_kernels_tests(compiler, capability, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    need_extension()
    environment = {**os.environ, "CXX": compiler, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    if capability:
        environment["ATEN_CPU_CAPABILITY"] = capability
    tests = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("kernels", "activations", "token_shift")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "not opcheck and not compiles",
        *tests,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
