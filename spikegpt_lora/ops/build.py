"""Builds the kernels of `cuda/` with ninja and keeps them in a cache.

A library is kept under the hash of its sources, torch's version, the instruction set and the compiler (its command, and
path, size and date of its programs), so that a cache on a shared home directory serves machines that differ, and that
what is there is found without running anything. It appears there whole or not at all, under a lock that the operating
system takes back when its holder dies: processes may start together, and builds may be killed.

Environment: `TORCH_EXTENSIONS_DIR` (the cache, default ~/.cache), `CXX` (a command as a shell reads it: "ccache g++"),
`CUDA_HOME`, `TORCH_CUDA_ARCH_LIST` (default: the GPUs that are here).
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
SOURCES = {"cpu": ["ops.cpp", "autograd.cpp"], "cuda": ["ops_cuda.cu"]}  # in the folder that `sources` gives
INSTRUCTION_SETS = {  # torch's names of what the processor has
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
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
    cache, name = _cache(device, flags), f"spikegpt_lora_{device}.so"
    try:
        if not compiler:
            return _built_earlier(cache, name)
        library = cache / _hash(*map(_identity, compiler)) / name
        if not library.is_file():
            library.parent.mkdir(parents=True, exist_ok=True)
            with _lock(library.with_name("lock")):
                if not library.is_file():  # while we waited another process may have built it
                    _compile(device, compiler, flags, library)
    except OSError as error:
        raise ExtensionError(f"cannot build in {cache}: {error}; TORCH_EXTENSIONS_DIR names another place") from error
    return library


def _built_earlier(cache: Path, name: str) -> Path:
    """A library for a machine without compiler, built where there was one."""
    for library in sorted(cache.glob(f"*/{name}")):
        return library
    looked_for = f"CXX is {os.environ['CXX']!r}" if os.environ.get("CXX") else "looked for c++, g++, clang++"
    raise ExtensionError(f"no C++ compiler found ({looked_for}): install one, e.g. g++, or let CXX name one")


def _compile(device: str, compiler: list[str], flags: list[str], library: Path):
    """Build beside `library` and rename; what killed builds left there goes first (we hold the lock)."""
    for left_over in library.parent.glob("build-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    command = shlex.join(compiler)
    logger.info("building the kernels with %s, once (under a minute): %s", command, library)
    files = [sources() / name for name in SOURCES[device]]
    with tempfile.TemporaryDirectory(prefix="build-", dir=library.parent, ignore_cleanup_errors=True) as folder:
        if device == "cpu":
            flags = flags + optional_flags(compiler)
        else:
            _require_the_release_of_torch(compiler)
        rules = _ninja_rules(device, compiler, flags, files, library.name)
        (Path(folder) / "build.ninja").write_text(rules, encoding="utf-8")
        done = _run([_ninja(), "-C", folder])
        log = done.stdout + done.stderr
        if done.returncode != 0:
            raise ExtensionError(f"{command} failed on {', '.join(map(str, files))}:\n{log[-4000:].strip()}")
        (library.parent / "build.log").write_text(log, encoding="utf-8")
        os.replace(Path(folder) / library.name, library)


def _run(command: list[str], given: str = "") -> subprocess.CompletedProcess:
    """Run a program to its end, `given` being its input, and keep what it says."""
    try:
        return subprocess.run(command, input=given, capture_output=True, encoding="utf-8", errors="replace")
    except OSError as error:
        raise ExtensionError(f"cannot run {command[0]}: {error.strerror}; install it anew, or name another") from error


def _ninja_rules(device: str, compiler: list[str], flags: list[str], files: list[Path], name: str) -> str:
    torch_folder = Path(torch.__file__).parent
    objects = {f"{file.stem}.o": re.sub("[$: ]", r"$\g<0>", str(file)) for file in files}  # ninja quotes $in itself
    compiled = "\n".join(f"build {made}: compile {escaped}" for made, escaped in objects.items())
    libraries = [f"-L{_quoted(torch_folder / 'lib')}", "-lc10", "-ltorch", "-ltorch_cpu"]
    if device == "cuda":
        libraries.append("-lc10_cuda")
    if sys.platform == "darwin":
        libraries.append("-undefined dynamic_lookup")
    command = " ".join(map(_quoted, compiler))
    return f"""\
flags = {" ".join(flags)} -I{_quoted(torch_folder / "include")}
rule compile
  command = {command} $flags -c $in -o $out
rule link
  command = {command} $flags -shared $in -o $out {" ".join(libraries)}
{compiled}
build {name}: link {" ".join(objects)}
"""


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    try:
        with filelock.FileLock(file):
            yield
    except NotImplementedError:  # a file system without locks: two builds at once are wasteful, not wrong
        yield


def cpp_compiler() -> tuple[list[str], list[str]]:
    """The command of the C++ compiler, empty where there is none, and the flags for this processor.

    Raises:
        ExtensionError: CXX is no command.
    """
    flags = FLAGS + INSTRUCTION_SETS.get(torch.backends.cpu.get_cpu_capability(), [])
    named = os.environ.get("CXX")
    try:
        candidates = [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]
    except ValueError as error:
        raise ExtensionError(f"CXX must be a command as a shell reads it, got {named!r}: {error}") from error
    return next((command for command in candidates if command and shutil.which(command[0])), []), flags


def optional_flags(compiler: list[str]) -> list[str]:
    """What only some compilers take. Without OpenMP at::parallel_for uses one thread."""
    flags = ["-Wno-pass-failed"] if "clang" in _version(compiler) else []
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler, "-x", "c++", "-fopenmp", "-shared", "-fPIC", "-", "-o", f"{folder}/probe.so"]
        return flags + (["-fopenmp"] if _run(command, "#include <omp.h>\n").returncode == 0 else [])


def _nvcc() -> tuple[list[str], list[str]]:
    if torch.version.cuda is None:
        raise ExtensionError("this torch is built without CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None:
        raise ExtensionError("nvcc not found: install the CUDA toolkit and set CUDA_HOME, or put nvcc on the PATH")
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    here = [".".join(map(str, torch.cuda.get_device_capability(i))) for i in range(torch.cuda.device_count())]
    numbers = sorted({name.removesuffix("+PTX").replace(".", "") for name in named or here})
    if not numbers:
        raise ExtensionError("no GPU here and TORCH_CUDA_ARCH_LIST is not set (e.g. TORCH_CUDA_ARCH_LIST='8.0;9.0')")
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return [nvcc], [*CUDA_FLAGS, *targets]


def _require_the_release_of_torch(nvcc: list[str]):
    if f"release {torch.version.cuda.split('.')[0]}." not in (version := _version(nvcc)):
        raise ExtensionError(f"torch is built for CUDA {torch.version.cuda}, {nvcc[0]} is: {version}")


def sources() -> Path:
    """`cuda/`: inside the package where it was installed from a wheel, beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "cuda"
    return inside if (inside / "ops.cpp").is_file() else package.parent / "cuda"


def _cache(device: str, flags: list[str]) -> Path:
    texts = [file.read_text(encoding="utf-8") for file in sorted(sources().glob("*.[hc]*"))]
    instructions = torch.backends.cpu.get_cpu_capability() if device == "cpu" else "cuda"
    key = _hash(torch.__version__, platform.machine(), sys.platform, *texts, *flags)
    return _cache_root() / "spikegpt_lora" / f"torch{torch.__version__}-{instructions.lower()}-{key}"


def _cache_root() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(root) if root else Path.home() / ".cache"
    except RuntimeError as error:
        raise ExtensionError(
            "no home directory to keep the kernels in: let TORCH_EXTENSIONS_DIR name a folder"
        ) from error


def _identity(word: str) -> str:
    """A word of the compiler's command, with path, size and date of the program that it names, if any."""
    program = shutil.which(word)
    if program is None:
        return word
    status = os.stat(program)
    return f"{word} {os.path.realpath(program)} {status.st_size} {status.st_mtime_ns}"


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def _version(compiler: list[str]) -> str:
    return _run([*compiler, "--version"]).stdout.strip()


def _ninja() -> str:
    """ninja where its wheel keeps it: that it is installed does not mean that it is on the PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        BIN_DIR = ""
    program = shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")
    if program is None:
        raise ExtensionError("ninja is missing, which builds the kernels: pip install ninja")
    return program


def _quoted(path: Path | str) -> str:
    """For the shell, inside a ninja file."""
    return shlex.quote(str(path)).replace("$", "$$")
