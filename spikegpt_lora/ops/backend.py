"""Chooses and loads the compiled kernels of `cuda/`; build.py builds them on first use.

`python -m spikegpt_lora.ops` builds ahead of first use. Environment: `SPIKEGPT_LORA_BACKEND` says what
backend="auto" means (auto, extension, reference); `TORCH_EXTENSIONS_DIR` where libraries are kept (default ~/.cache).
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from .build import ExtensionError, build_library

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "extension", "reference")

_loaded: set[str] = set()
_failed: dict[str, str] = {}  # device -> why
_bindings: list[Callable[[], None]] = []
_loading = threading.Lock()
_default = os.environ.get("SPIKEGPT_LORA_BACKEND", "auto")


def bind(function: Callable[[], None]) -> Callable[[], None]:
    """Decorator: `function` registers fake kernels of operators once the library is loaded."""
    _bindings.append(function)
    return function


def use_extension(backend: str, device: torch.device) -> bool:
    """Whether an operator is to run in the extension (built and loaded at the first call) or in plain torch.

    Raises:
        ValueError: `backend` is none of BACKENDS.
        ExtensionError: backend is "extension" and there is none for this device.
    """
    if backend == "auto":
        backend = _default
    if backend == "reference":
        return False
    if backend == "auto":
        return _available(device.type)
    if backend != "extension":
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    load(device.type)
    return True


def untouched(module: nn.Module, kind: type) -> bool:
    """Whether an operator may do what `module` does: it is a `kind` and no subclass of it, nobody has hooks on it or a
    forward of their own, and its weights are plain tensors (not sharded, not packed)."""
    return (
        type(module) is kind
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
        and all(type(p) in (nn.Parameter, Tensor) for p in module._parameters.values() if p is not None)
    )


def product_dtype(x: Tensor) -> torch.dtype:
    """What x is multiplied in: its own dtype, or that of autocast where it is on."""
    kind = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def in_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x.to(dtype)`, which takes as long as a small operator even where there is nothing to do: here it does not."""
    return x if x.dtype == dtype else x.to(dtype)


@contextlib.contextmanager
def default_backend(backend: str) -> Iterator[None]:
    """Within this context backend="auto" means `backend`, everywhere in this process.

    Raises:
        ValueError: `backend` is none of BACKENDS.
    """
    global _default
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    before, _default = _default, backend
    try:
        yield
    finally:
        _default = before


def load(device: str = "cpu") -> None:
    """Make the operators `torch.ops.spikegpt_lora` ready for `device` ("cpu" or "cuda"): build, load, register.

    Raises:
        ExtensionError: it cannot be done; at once if it was tried before.
    """
    with _loading:
        if device in _loaded:
            return
        if device in _failed:
            raise ExtensionError(_failed[device])
        try:
            for part in dict.fromkeys(("cpu", device)):  # the schemas are in the CPU library
                if part not in _loaded:
                    _load(build_library(part), part)
        except ExtensionError as error:
            _failed[device] = str(error)
            raise


@torch.compiler.assume_constant_result
def _available(device: str) -> bool:
    if device in _loaded:
        return True
    if device in _failed or device == "meta":
        return False
    try:
        load(device)
    except ExtensionError as error:
        logger.warning(
            "no compiled kernels for %s, plain torch is used instead (same results, slower): %s", device, error
        )
    return device in _loaded


def _load(library: Path, device: str) -> None:
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ExtensionError(f"{library} does not load ({error}); delete it to have it built anew") from error
    if device == "cpu":
        for function in _bindings:
            function()
    _loaded.add(device)
