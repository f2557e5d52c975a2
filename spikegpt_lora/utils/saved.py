"""Reads saved models and tokenizers; names what is wrong with a file before anything is built from it.

transformers fills what a file lacks with random numbers, and says so in a report that nobody has to read.
"""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import DamagedFile, first_line, read_json

FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Sizes of a saved model's tensors by upstream's name, from the heads of its files; nothing where they have other
    names than transformers' usual ones."""
    index, whole, old = (folder / name for name in FILES)
    files = [whole] if whole.is_file() else []
    if not files and index.is_file():
        names = read_json(index, keys=("weight_map",))["weight_map"]
        files = [folder / str(name) for name in (set(names.values()) if isinstance(names, dict) else ())]
    elif not files and old.is_file():
        tensors = read_torch_file(old)
        held = tensors.items() if isinstance(tensors, Mapping) else ()
        return {str(name).removeprefix("spikegpt."): tuple(t.shape) for name, t in held if isinstance(t, Tensor)}
    shapes = {}
    for file in files:
        shapes |= safetensors_shapes(file)
    return {name.removeprefix("spikegpt."): shape for name, shape in shapes.items()}


def safetensors_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Sizes of the tensors in a .safetensors file, whose head must fit its length.

    Raises:
        DamagedFile: it does not.
    """
    try:
        with safe_open(file, "pt") as content:
            return {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}
    except (SafetensorError, OSError) as error:  # it says of neither which file
        raise DamagedFile(f"{file} is damaged or cut short ({error}): fetch or write it again") from error


def some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def read_torch_file(path: Path):
    """What `torch.save` wrote to `path`, if it is tensors and plain containers of them.

    Raises:
        ValueError: something else, a damaged file, or tensors far larger than the file.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was refused: it holds something else than tensors, or is damaged, and nothing in it was executed. "
            f"A SpikeGPT checkpoint is torch.save(model.state_dict(), ...). Reader's words: {first_line(error)}"
        ) from error
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is not a whole PyTorch file, perhaps a broken download: fetch it "
            f"again. Reader's words: {first_line(error)}"
        ) from error
    held = [t for t in tensors.values() if isinstance(t, Tensor)] if isinstance(tensors, Mapping) else []
    if (numbers := sum(t.numel() * t.element_size() for t in held)) > 2 * (size := path.stat().st_size):  # 2: tied ones
        raise ValueError(
            f"{path} must hold its tensors' {numbers:,} bytes, has {size:,}: some repeat one number (stride 0)"
        )
    return tensors


def weights_digest(model: nn.Module) -> str:
    """sha256 of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
