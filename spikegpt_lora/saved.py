"""Saved models and tokenizers, read so that what is wrong with a file is said by name before anything is built from it.

transformers fills what a file lacks with random numbers, and says so in a report that nobody has to read.
"""

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .config import SpikeGPTConfig
from .errors import DamagedFile, read_json
from .model import SpikeGPTForCausalLM, SpikeGPTForSequenceClassification, SpikeGPTPreTrainedModel
from .tokenizer import load_tokenizer

HEADS = {"head.weight", "score.weight"}  # of a language model, of a classifier
KINDS = {SpikeGPTForCausalLM: "language model", SpikeGPTForSequenceClassification: "SpikeGPT classifier"}
PADDING = 256  # rows that an embedding may have beside its tokenizer's tokens: sizes are rounded up


def load_model(
    model_class: type[SpikeGPTPreTrainedModel], source: str | os.PathLike, new_head: bool = False, **changes
) -> SpikeGPTPreTrainedModel:
    """A saved model in float32, all of whose weights come from its files.

    Args:
        source: the folder of a saved model, or a hub id.
        new_head: the head may be missing (it is drawn), and another one be there.
        changes: of the configuration.

    Raises:
        ValueError: nothing to be read there, another architecture, other sizes than in config.json, weights that are
            missing, unknown, of other sizes or not finite.
    """
    folder, kind = Path(source), KINDS[model_class]
    if folder.is_dir():
        _require_sizes(read_config(folder), _shapes(folder), folder)
    try:
        model, info = model_class.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32, **changes
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"no {kind} at {str(source)!r}: {_first_line(error)}") from error
    heads = HEADS if new_head else set()
    problems = [f"it has no {_some(names)}"] if (names := set(info["missing_keys"]) - heads) else []
    problems += [f"it has {_some(names)} beside"] if (names := set(info["unexpected_keys"]) - heads) else []
    problems += [f"{key} must be {tuple(ours)}, got {tuple(its)}" for key, its, ours in info["mismatched_keys"]]
    if problems:
        raise ValueError(f"{source} is no {kind}: {'; '.join(problems)}")
    return model


def read_config(folder: str | os.PathLike) -> SpikeGPTConfig:
    """The configuration of a saved model.

    Raises:
        ValueError: no config.json, a damaged one, or another architecture's.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no config.json: give a whole model (an adapter is none)")
    content = read_json(file)
    if (kind := content.get("model_type")) != SpikeGPTConfig.model_type:
        raise DamagedFile(f"{file} must say model_type {SpikeGPTConfig.model_type!r}, says {kind!r}: give a SpikeGPT")
    try:
        return SpikeGPTConfig.from_dict(content)
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise DamagedFile(f"{file}: {_first_line(error)}") from error


def require_same_tokens(tokenizer: PreTrainedTokenizerBase, config: SpikeGPTConfig, source: str | os.PathLike) -> None:
    """Raise ValueError where `tokenizer` is seen not to be that of the model at `source`: it has more tokens than the
    model, or far fewer, or the model's folder holds another one."""
    size, known = len(tokenizer), config.vocab_size
    own = (Path(source) / "tokenizer.json").is_file() and load_tokenizer(source)
    if size > known or (not own and known - size >= PADDING):
        reason = f"the tokenizer has {size} tokens, the model knows {known}"
    elif own and own.get_vocab() != tokenizer.get_vocab():
        reason = f"the tokenizer has other tokens than the model's own in {source}"
    else:
        return
    raise ValueError(f"{reason}: they do not belong together; name the model's own with --tokenizer")


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Sizes of a saved model's tensors by upstream's name, from the heads of its files."""
    index, old = folder / "model.safetensors.index.json", folder / "pytorch_model.bin"
    if index.is_file():
        names = read_json(index, keys=("weight_map",))["weight_map"]
        files = [folder / str(name) for name in (set(names.values()) if isinstance(names, dict) else ())]
    elif not (folder / "model.safetensors").is_file() and old.is_file():
        tensors = read_torch_file(old)
        held = tensors.items() if isinstance(tensors, Mapping) else ()
        return {str(name).removeprefix("spikegpt."): tuple(t.shape) for name, t in held if isinstance(t, Tensor)}
    else:
        files = [folder / "model.safetensors"]
    shapes = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no {file.name}: fetch or save the model again")
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
    except SafetensorError as error:
        raise DamagedFile(f"{file} is damaged or cut short ({error}): fetch or write it again") from error


def _require_sizes(config: SpikeGPTConfig, shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Raise where config.json speaks of another model than the weights: nothing of its sizes is built then."""
    embedding, key = shapes.get("emb.weight", ()), shapes.get("blocks.0.ffn.key.weight", ())
    if len(embedding) != 2 or len(key) != 2:
        raise ValueError(
            f"{folder} is no SpikeGPT: it has no emb.weight and blocks.0.ffn.key.weight, but {_some(shapes)}"
        )
    layers = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
    found = {"vocab_size": embedding[0], "n_embd": embedding[1], "n_ffn": key[0], "n_layer": max(layers) + 1}
    given = {name: getattr(config, name) for name in found}
    if wrong := [f"{name} {given[name]} for {size}" for name, size in found.items() if given[name] != size]:
        raise ValueError(f"{folder}/config.json says {', '.join(wrong)} of the weights: they do not belong together")


def _some(names) -> str:
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
            f"A SpikeGPT checkpoint is torch.save(model.state_dict(), ...). Reader's words: {_first_line(error)}"
        ) from error
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is not a whole PyTorch file, perhaps a broken download: fetch it "
            f"again. Reader's words: {_first_line(error)}"
        ) from error
    held = [t for t in tensors.values() if isinstance(t, Tensor)] if isinstance(tensors, Mapping) else []
    if (numbers := sum(t.numel() * t.element_size() for t in held)) > 2 * (size := path.stat().st_size):  # 2: tied ones
        raise ValueError(
            f"{path} must hold its tensors' {numbers:,} bytes, has {size:,}: some repeat one number (stride 0)"
        )
    return tensors


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
