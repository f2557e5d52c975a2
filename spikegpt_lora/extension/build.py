"""Builds the kernels of `cuda/` with ninja and keeps them in a cache.

A library is kept under the hash of its sources, torch's version, the instruction set and the compiler, so that a cache
on a shared home directory serves machines that differ. It appears there whole or not at all, under a lock that the
operating system takes back when its holder dies: processes may start together, and builds may be killed.

Environment: `TORCH_EXTENSIONS_DIR` (the cache, default ~/.cache), `CXX`, `CUDA_HOME`, `TORCH_CUDA_ARCH_LIST` (default:
the GPUs that are here).
"""

import contextlib
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import torch

logger = logging.getLogger(__name__)

FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-ffp-contract=off",  # rounding is written down in the sources: see cuda/arithmetic.h
    "-fno-math-errno",
    "-fno-trapping-math",
]
INSTRUCTION_SETS = {  # torch's names of what the processor has
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
FLAGS_OF_SOME_COMPILERS = ("-fopenmp", "-Wno-pass-failed")
CUDA_FLAGS = ["-std=c++20", "-O3", "--fmad=false", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-Xcompiler", "-fPIC"]


class ExtensionError(RuntimeError):
    """The kernels cannot be built or loaded here; the message says why, in the compiler's own words."""


def build_library(device: str = "cpu") -> Path:
    """The library of `device` ("cpu" or "cuda"), from the cache or built now.

    Raises:
        ExtensionError: no compiler, no ninja, no place to write, or the compiler's complaint.
    """
    if device not in ("cpu", "cuda"):
        raise ExtensionError(f"there are kernels for cpu and cuda, not for {device}")
    compiler, flags = cpp_compiler() if device == "cpu" else _nvcc()
    name = f"spikegpt_lora_{device}.so"
    if compiler is None:
        for library in sorted(_cache(device, flags).glob(f"*/{name}")):  # built where there was one
            return library
        raise ExtensionError("no C++ compiler found (looked for $CXX, c++, g++, clang++); install one, e.g. g++")
    folder = _cache(device, flags) / _hash(compiler, _version(compiler), *flags)
    library = folder / name
    if library.is_file():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / "lock"):
            if not library.is_file():  # while we waited another process may have built it
                _compile(device, compiler, flags, library)
    except OSError as error:
        raise ExtensionError(f"cannot build in {folder}: {error}; TORCH_EXTENSIONS_DIR names another place") from error
    return library


def _compile(device: str, compiler: str, flags: list[str], library: Path):
    """Build beside `library` and rename; what killed builds left there goes first (we hold the lock)."""
    for left_over in library.parent.glob("build-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    logger.info("building the kernels with %s, once (about half a minute): %s", compiler, library)
    source = sources() / ("ops.cpp" if device == "cpu" else "ops_cuda.cu")
    with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent, ignore_cleanup_errors=True) as folder:
        rules = _ninja_rules(device, compiler, flags, source, library.name)
        (Path(folder) / "build.ninja").write_text(rules, encoding="utf-8")
        done = subprocess.run([_ninja(), "-C", folder], capture_output=True, text=True)
        log = done.stdout + done.stderr
        if done.returncode != 0:
            raise ExtensionError(f"{compiler} failed on {source}:\n{log[-4000:].strip()}")
        (library.parent / "build.log").write_text(log, encoding="utf-8")
        os.replace(Path(folder) / library.name, library)


def _ninja_rules(device: str, compiler: str, flags: list[str], source: Path, name: str) -> str:
    torch_folder = Path(torch.__file__).parent
    escaped_source = re.sub("[$: ]", r"$\g<0>", str(source))  # ninja's own way; it quotes $in for the shell
    libraries = [f"-L{_quoted(torch_folder / 'lib')}", "-lc10", "-ltorch", "-ltorch_cpu"]
    if device == "cuda":
        libraries.append("-lc10_cuda")
    if sys.platform == "darwin":
        libraries.append("-undefined dynamic_lookup")
    return f"""\
flags = {" ".join(flags)} -I{_quoted(torch_folder / "include")}
rule compile
  command = {_quoted(compiler)} $flags -c $in -o $out
rule link
  command = {_quoted(compiler)} $flags -shared $in -o $out {" ".join(libraries)}
build ops.o: compile {escaped_source}
build {name}: link ops.o
"""


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    try:
        with filelock.FileLock(file):
            yield
    except NotImplementedError:  # a file system without locks: two builds at once are wasteful, not wrong
        yield


def cpp_compiler() -> tuple[str | None, list[str]]:
    flags = FLAGS + INSTRUCTION_SETS.get(torch.backends.cpu.get_cpu_capability(), [])
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, candidates)), None)
    if compiler is not None and "clang" in _version(compiler):
        flags = [*flags, "-Wno-pass-failed"]
    if compiler is not None and _has_openmp(compiler):
        flags = [*flags, "-fopenmp"]
    return compiler, flags


def _has_openmp(compiler: str) -> bool:
    """Whether programs with OpenMP compile and link: without it at::parallel_for uses one thread."""
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-x", "c++", "-fopenmp", "-shared", "-fPIC", "-", "-o", f"{folder}/probe.so"]
        return subprocess.run(command, input="#include <omp.h>\n", capture_output=True, text=True).returncode == 0


def _nvcc() -> tuple[str, list[str]]:
    if torch.version.cuda is None:
        raise ExtensionError("this torch is built without CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None:
        raise ExtensionError("nvcc not found: install the CUDA toolkit and set CUDA_HOME, or put nvcc on the PATH")
    if f"release {torch.version.cuda.split('.')[0]}." not in _version(nvcc):
        raise ExtensionError(f"torch is built for CUDA {torch.version.cuda}, {nvcc} is: {_version(nvcc)}")
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    here = [".".join(map(str, torch.cuda.get_device_capability(i))) for i in range(torch.cuda.device_count())]
    numbers = sorted({name.removesuffix("+PTX").replace(".", "") for name in named or here})
    if not numbers:
        raise ExtensionError("no GPU here and TORCH_CUDA_ARCH_LIST is not set (e.g. TORCH_CUDA_ARCH_LIST='8.0;9.0')")
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return nvcc, [*CUDA_FLAGS, *targets]


def sources() -> Path:
    """`cuda/`: inside the package where it was installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "cuda"
    return inside if (inside / "ops.cpp").is_file() else package.parent / "cuda"


def _cache(device: str, flags: list[str]) -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    texts = [file.read_text(encoding="utf-8") for file in sorted(sources().glob("*.[hc]*"))]
    instructions = torch.backends.cpu.get_cpu_capability() if device == "cpu" else "cuda"
    flags = [flag for flag in flags if flag not in FLAGS_OF_SOME_COMPILERS]  # one folder, with and without a compiler
    key = _hash(torch.__version__, platform.machine(), sys.platform, *texts, *flags)
    return Path(root) / "spikegpt_lora" / f"torch{torch.__version__}-{instructions.lower()}-{key}"


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    return done.stdout.strip()


def _ninja() -> str:
    """ninja where its wheel keeps it: that it is installed does not mean that it is on the PATH."""
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


def _quoted(path: Path | str) -> str:
    """For the shell, inside a ninja file."""
    return shlex.quote(str(path)).replace("$", "$$")
