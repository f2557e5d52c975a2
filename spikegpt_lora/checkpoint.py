"""Trained models: the one in the package, and upstream SpikeGPT checkpoints (.pth) to our models and back.

lm = SpikeGPTForCausalLM.from_pretrained(embedded_checkpoint())
lm = load_upstream_checkpoint("ridger/SpikeGPT-OpenWebText-216M")  # tensors' names are upstream's but for one prefix
classifier = SpikeGPTForSequenceClassification.from_language_model(lm, num_labels=2)
"""

import logging
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, list_repo_files
from peft import PeftModel, PeftType
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .config import SpikeGPTConfig, read_config
from .model import SpikeGPTForCausalLM, SpikeGPTForSequenceClassification, SpikeGPTPreTrainedModel
from .utils.errors import DamagedFile, first_line, read_json, sentence
from .utils.files import whole_file
from .utils.hub import fetch, hub_id, require_reachable
from .utils.saved import read_torch_file, some

logger = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parent / "assets" / "spikegpt-film"

# Of models that were published as a bare .pth file: its name, and the tokenizer that it was trained with.
KNOWN_FILES = {"ridger/SpikeGPT-OpenWebText-216M": "SpikeGPT-216M.pth"}
UPSTREAM_TOKENIZERS = {"ridger/SpikeGPT-OpenWebText-216M": "EleutherAI/gpt-neox-20b"}

HEADS = {"head.weight", "score.weight"}  # of a language model, of a classifier
KINDS = {SpikeGPTForCausalLM: "language model", SpikeGPTForSequenceClassification: "SpikeGPT classifier"}
PADDING = 256  # rows that an embedding may have beside its tokenizer's tokens: sizes are rounded up

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# What upstream's code fixes and a .pth file therefore cannot say.
UPSTREAM_CONSTANTS = {
    "lif_tau": 2.0,
    "lif_v_threshold": 1.0,
    "lif_v_reset": 0.0,
    "lif_decay_input": True,
    "lif_surrogate_alpha": 2.0,
    "layer_norm_eps": 1e-5,
    "matrix_spikes": "none",
    "token_shift": "channels",
    "wkv_powers_of_two": False,
}


def embedded_checkpoint() -> str:
    """The folder of the SpikeGPT that comes with the package, for any `from_pretrained`: a small English language model
    of film talk, whose matrices read integer spikes, and its tokenizer. Its README.md says what it was trained on and
    what it is not good for."""
    return str(EMBEDDED)


def load_language_model(source: str, **settings) -> tuple[SpikeGPTForCausalLM, PreTrainedTokenizerBase]:
    """A language model in float32 and evaluation mode, and its tokenizer.

    Args:
        source: "embedded", the folder of a saved model, or a hub id.
        settings: of `from_pretrained`.

    Raises:
        ValueError: nothing to be read there, or another kind of model.
    """
    source = str(EMBEDDED) if source == "embedded" else source
    model, tokenizer = load_model(SpikeGPTForCausalLM, source, **settings), load_tokenizer(source)
    require_same_tokens(tokenizer, model.config, source)
    return model.eval(), tokenizer


def load_causal_model(source: str, **settings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model of any architecture that transformers has, in float32 and evaluation mode, and its tokenizer.

    Args:
        source: "embedded", the folder of a saved model, or a hub id.
        settings: of `from_pretrained`.

    Raises:
        ValueError: nothing to be read there, no language model, or one without some of its weights.
    """
    file = Path(source) / "config.json"
    if (Path(source) / "adapter_config.json").is_file():
        raise ValueError(f"{source} holds an adapter, which is no whole language model: give its base model")
    if source == "embedded" or (file.is_file() and read_json(file).get("model_type") == SpikeGPTConfig.model_type):
        return load_language_model(source, **settings)
    try:
        settings = {"output_loading_info": True, "dtype": torch.float32} | settings
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, **settings)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"no language model at {source!r}: {first_line(error)}") from error
    model, info = loaded
    if missing := set(info["missing_keys"]):
        raise ValueError(f"{source} is no whole language model: it has no {some(missing)}")
    return model.eval(), load_tokenizer(source)


def load_with_adapter(source: str) -> tuple[SpikeGPTForCausalLM | PeftModel, PreTrainedTokenizerBase]:
    """As `load_language_model`; or of the folder of an adapter, saved with its tokenizer, its base model with it.

    Raises:
        ValueError: nothing to be read there, or the adapter is none for its base model.
    """
    file = Path(source) / "adapter_config.json"
    if not file.is_file():
        return load_language_model(source)
    try:
        model, _ = load_causal_model(base_of(source))
    except ValueError as error:
        raise ValueError(f"the base model of the adapter in {source} is not to be had: {error}") from error
    if read_json(file).get("spikelora_time") == "token" and not isinstance(model, SpikeGPTForCausalLM):
        model.generation_config.use_cache = False  # membranes are not in other models' caches
    return load_adapter(model, source).eval(), load_tokenizer(source)


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
        read_config(folder)
    try:
        model, info = model_class.from_pretrained(source, output_loading_info=True, dtype=torch.float32, **changes)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"no {kind} at {str(source)!r}: {first_line(error)}") from error
    heads = HEADS if new_head else set()
    problems = [f"it has no {some(names)}"] if (names := set(info["missing_keys"]) - heads) else []
    problems += [f"it has {some(names)} beside"] if (names := set(info["unexpected_keys"]) - heads) else []
    if problems:
        raise ValueError(f"{source} is no {kind}: {'; '.join(problems)}")
    return model


def load_adapter(model: PreTrainedModel, folder: str | os.PathLike) -> PeftModel:
    """`model` with the adapter of peft that lies in `folder`, all of whose weights come from there.

    Raises:
        FileNotFoundError: there is none.
        DamagedFile: it cannot be read, is of a method that is not known here, or is none for `model`.
    """
    kind = read_json(_adapter_file(folder), keys=("peft_type",))["peft_type"]
    if kind not in list(PeftType):
        raise DamagedFile(
            f"{folder} holds no adapter of a method known here: peft_type must be SPIKELORA or one of peft's own, got "
            f"{kind!r}: load it with the version of spikegpt_lora that wrote it"
        )
    try:
        with warnings.catch_warnings(record=True) as said:
            adapted = PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # a damaged file can fail anywhere in the reader
        lines = (sentence(error) or f"{type(error).__name__}: {error}").split("\n")
        reason = " ".join(line.strip() for line in lines[:2])  # torch's list of sizes goes on
        raise DamagedFile(f"{folder} holds no adapter for this model, or a damaged one ({reason})") from error
    if missing := [str(warning.message) for warning in said if "missing adapter keys" in str(warning.message)]:
        raise DamagedFile(f"{folder} holds only a part of its adapter ({missing[0].splitlines()[0]})")
    return adapted


def load_adapted(model_class: type[SpikeGPTPreTrainedModel], folder: str | os.PathLike) -> PeftModel:
    """The base model of the adapter in `folder`, in float32, with the adapter; `base_of` says where it is looked for.

    The configuration that comes with it names the place where the base was found, so after a move
    `model.peft_config["default"].save_pretrained(folder)` lets peft's own Auto classes find it again.

    Raises:
        FileNotFoundError, DamagedFile: as `load_adapter`.
        ValueError: as `load_model`, of the base.
    """
    base, file = base_of(folder), _adapter_file(folder)
    brings_head = bool(read_json(file).get("modules_to_save"))
    try:
        model = load_model(model_class, base, new_head=brings_head)
    except ValueError as error:
        raise ValueError(f"{error}; this is the base model that {file} names") from error
    adapted = load_adapter(model, folder)
    adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


def base_of(folder: str | os.PathLike) -> str:
    """Where the base model of the adapter in `folder` is: the folder or hub id that its adapter_config.json names.

    Where that folder is gone, it is looked for in two places: a relative path is tried from `folder` on; and of any
    path the last two parts from the folder above its parent on, so that OUT/lora/seed0 finds OUT/base/seed0 after OUT
    was moved. A warning says so. Whether the weights there are those that the adapter was trained on is checked of
    SpikeLoRA (`adapters.fingerprint`); of LoRA, whose files hold nothing of its base, only sizes are.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: it names no base model.
    """
    file = _adapter_file(folder)
    named = read_json(file, keys=("base_model_name_or_path",))["base_model_name_or_path"]
    if not isinstance(named, str):
        raise ValueError(f"{file} must name its base model as base_model_name_or_path, got {named!r}")
    if Path(named).exists():
        return named
    here = file.resolve().parent
    for place in (here / named, here.parent.parent.joinpath(*Path(named).parts[-2:])):
        if (place / "config.json").is_file():
            logger.warning(
                "the base model of the adapter in %s was moved from %s to %s", folder, named, place.resolve()
            )
            return str(place.resolve())
    return named


def load_classifier(folder: str | os.PathLike) -> tuple[SpikeGPTPreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """A fine-tuned classifier in evaluation mode, with its adapter if `folder` holds one, and its tokenizer.

    Raises:
        ValueError: neither a model nor an adapter there, or one that cannot be read.
    """
    if (Path(folder) / "adapter_config.json").is_file():
        return load_adapted(SpikeGPTForSequenceClassification, folder).eval(), load_tokenizer(folder)
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} holds neither a model (config.json) nor an adapter (adapter_config.json)")
    return load_model(SpikeGPTForSequenceClassification, folder).eval(), load_tokenizer(folder)


def load_tokenizer(source: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or of a hub id.

    Raises:
        ValueError: there is none, or a damaged one.
    """
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # a damaged file can fail anywhere in the reader
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"no tokenizer at {str(source)!r}, or a damaged one ({kind}{first_line(error)})") from error


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


def load_upstream_checkpoint(source: str | os.PathLike | Mapping[str, Tensor]) -> SpikeGPTForCausalLM:
    """The language model of an upstream checkpoint, in float32 and evaluation mode; sizes are read from the tensors.

    Args:
        source: a .pth file, a hub id such as "ridger/SpikeGPT-OpenWebText-216M", or a state dict.

    Raises:
        FileNotFoundError: neither such a file nor such a hub repository.
        ValueError: not a readable checkpoint, or not SpikeGPT's tensors; every missing, unexpected, misshapen or
            non-finite one is named. Nothing in the file is ever executed (`torch.load(weights_only=True)`).
    """
    tensors = source if isinstance(source, Mapping) else read_torch_file(_find(source))
    name = "the state dict" if isinstance(source, Mapping) else str(source)
    tensors = _flat_tensors(tensors, name)
    config = _config_from_sizes(tensors, name)
    with torch.device("meta"):
        model = SpikeGPTForCausalLM(config)
    ours = {_our_name(key): tensor for key, tensor in tensors.items()}
    _check_fit(ours, model.state_dict(), name)
    model.load_state_dict({key: tensor.float().clone() for key, tensor in ours.items()}, assign=True)
    return model.eval()


def save_upstream_checkpoint(model: SpikeGPTForCausalLM, path: str | os.PathLike) -> None:
    """Write `model` as a .pth file that upstream's code loads; the file appears whole or not at all.

    Raises:
        TypeError: `model` is no SpikeGPTForCausalLM (a peft model must be merged first: `model.merge_and_unload()`).
        ValueError: its configuration differs from what upstream's code fixes, so the file would mean another model.
    """
    if not isinstance(model, SpikeGPTForCausalLM):
        raise TypeError(
            f"an upstream checkpoint holds a SpikeGPTForCausalLM, got {type(model).__name__}; "
            "merge adapters first with model.merge_and_unload()"
        )
    given = {key: getattr(model.config, key) for key in UPSTREAM_CONSTANTS} | {"n_ffn": model.config.n_ffn}
    expected = UPSTREAM_CONSTANTS | {"n_ffn": 4 * model.config.n_embd}
    differing = [
        f"{key} = {given[key]!r} (upstream: {expected[key]!r})" for key in expected if given[key] != expected[key]
    ]
    if differing:
        raise ValueError("upstream's code cannot run this model: " + ", ".join(differing) + "; use save_pretrained")
    with torch.device("meta"):
        foreign = sorted(model.state_dict().keys() - SpikeGPTForCausalLM(model.config).state_dict().keys())
    if foreign:
        raise ValueError(f"upstream's code knows no {foreign[0]} ({len(foreign)} such tensors): merge adapters first")
    tensors = {key.removeprefix("spikegpt."): t.detach().cpu().contiguous() for key, t in model.state_dict().items()}
    with whole_file(path) as temporary, temporary.open("wb") as file:
        torch.save(tensors, file)


def _adapter_file(folder: str | os.PathLike) -> Path:
    file = Path(folder) / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no adapter_config.json: give the folder of an adapter")
    return file


def _find(source: str | os.PathLike) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the .pth file in it (or use from_pretrained on a saved model)")
    if hub_id(str(source)) is None:
        raise FileNotFoundError(f"no checkpoint file at {path}")
    try:
        return _from_hub(str(source))
    except OSError as error:
        raise FileNotFoundError(
            f"{source!r} is no file, and the hub gave no checkpoint of that name ({type(error).__name__}: {error}); "
            "download the .pth file and pass its path"
        ) from error


def _from_hub(repo_id: str) -> Path:
    filename = KNOWN_FILES.get(repo_id)
    if filename is None:
        require_reachable(f"{constants.ENDPOINT}/{repo_id}")
        found = [name for name in list_repo_files(repo_id) if name.endswith(".pth")]
        if len(found) != 1:
            raise ValueError(f"{repo_id} holds {len(found)} .pth files {found}; download one and pass its path")
        filename = found[0]
    return fetch([filename], repo_id)[0]


def _flat_tensors(tensors, name: str) -> dict[str, Tensor]:
    if not isinstance(tensors, Mapping) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        inside = f"keys {list(tensors)[:8]}" if isinstance(tensors, Mapping) else f"a {type(tensors).__name__}"
        raise ValueError(f"{name} must be a dict of named tensors, got {inside}; pass the state dict inside it")
    problems = [f"{key!r} is no name" for key in tensors if not isinstance(key, str)]
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    problems += [
        f"{key} must be a dense tensor of {allowed}, got {tensor.layout} {tensor.dtype} on {tensor.device}"
        for key, tensor in tensors.items()
        if tensor.layout != torch.strided or tensor.dtype not in DTYPES or tensor.is_meta
    ]
    if problems:
        raise ValueError(f"{name} does not fit SpikeGPT:\n  " + "\n  ".join(problems))
    return {key.removeprefix("module."): tensor for key, tensor in tensors.items()}  # as saved under DataParallel


def _config_from_sizes(tensors: dict[str, Tensor], name: str) -> SpikeGPTConfig:
    embedding = tensors.get("emb.weight")
    numbers = {int(match[1]) for key in tensors if (match := re.match(r"blocks\.(\d+)\.", key))}
    layers = next(n for n in range(len(numbers) + 1) if n not in numbers)  # those without a gap from 0
    if embedding is None or embedding.dim() != 2 or not layers:
        raise ValueError(
            f"{name} is no SpikeGPT checkpoint: it needs emb.weight (vocabulary, width) and blocks.0.*, "
            f"got {len(tensors)} tensors named {', '.join(sorted(tensors)[:6])}, ..."
        )
    vocab_size, n_embd = embedding.shape
    # the GPT-NeoX-20B tokenizer's
    neox: dict[str, Any] = {"eos_token_id": 0, "pad_token_id": 1} if vocab_size == 50277 else {}
    return SpikeGPTConfig(vocab_size=vocab_size, n_embd=n_embd, n_layer=layers, **neox)


def _our_name(key: str) -> str:
    return key if key.startswith("head.") else f"spikegpt.{key}"


def _check_fit(given: dict[str, Tensor], expected: dict[str, Tensor], name: str) -> None:
    problems = [f"missing {key} {tuple(expected[key].shape)}" for key in expected.keys() - given.keys()]
    problems += [f"unexpected {key} {tuple(given[key].shape)}" for key in given.keys() - expected.keys()]
    for key in expected.keys() & given.keys():
        if given[key].shape != expected[key].shape:
            problems.append(f"{key} must be {tuple(expected[key].shape)}, got {tuple(given[key].shape)}")
        elif not torch.isfinite(given[key]).all():
            problems.append(f"{key} holds values that are not finite")
    if problems:
        problems = sorted(problem.replace("spikegpt.", "") for problem in problems)
        raise ValueError(f"{name} does not fit SpikeGPT ({len(problems)} problems):\n  " + "\n  ".join(problems))
