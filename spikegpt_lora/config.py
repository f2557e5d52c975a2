"""SpikeGPTConfig: the sizes and the neuron of a SpikeGPT. Defaults are the published 216M model's."""

import inspect
import os
import re
from dataclasses import fields
from pathlib import Path

import torch
from transformers import GenerationConfig, PretrainedConfig

from .neurons.lif import NeuronParameters
from .neurons.multilevel import MOST
from .utils.checks import kinds, violations
from .utils.errors import DamagedFile, first_line, read_json
from .utils.saved import saved_shapes, some

POOLINGS = ("last", "mean", "last_mean")
MATRIX_SPIKES = ("none", "integer")
TOKEN_SHIFTS = ("channels", "rows")
SPIKING = ("matrix_spikes", "spike_levels", "token_shift", "wkv_powers_of_two")  # what differs from the published model
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")

# What a saved model's folder holds for processes that have not imported this package: see `SpikeGPTConfig.auto_map`.
REMOTE_CODE = Path(__file__).parent / "assets" / "spikegpt-film" / "modeling_spikegpt.py"

# What transformers itself passes to a config beside its fields (saved by older versions, or set by `from_pretrained`).
_KNOWN_TO_TRANSFORMERS = {
    "model_type",
    "num_labels",
    "torch_dtype",
    "name_or_path",
    "output_attentions",
    "attn_implementation",
    "experts_implementation",
}


class SpikeGPTConfig(PretrainedConfig):
    """Configuration of every SpikeGPT model class.

    Args:
        vocab_size: rows of the token embedding.
        n_embd, n_layer: width and depth; `hidden_size` and `num_hidden_layers` are accepted as their names too.
        n_ffn: hidden width of SRFFN; None means 4 * n_embd, as upstream.
        context_length: length the model was trained at. Information only: no length is refused.
        layer_norm_eps: epsilon of every LayerNorm.
        dropout: dropout probability after each block (upstream: 0.03), and only there.
        lif_tau, lif_v_threshold, lif_v_reset, lif_decay_input, lif_detach_reset, lif_surrogate_alpha: of the blocks'
            neurons, see `neurons.lif.NeuronParameters`; the last one also of the embedding's spikes.
        matrix_spikes: what matrices read: "none", as published, real numbers behind a norm; "integer", integer spikes
            (neurons/multilevel.py, neurons/residual.py) and nothing else.
        spike_levels: K, the largest integer spike: -K ... K before att.output and after the token shift, squares of
            0 ... K before ffn.value.
        token_shift: where a token is mixed with the one before it: "channels" before a matrix, as published; "rows"
            after it. With integer spikes, "rows" is a model whose matrices read the residual stream itself (for
            training from the beginning), "channels" has neurons after the token shift (for existing checkpoints).
        wkv_powers_of_two: decays of WKV and weights of its tokens are powers of two, so that it needs no exp.
        pooling: what the classifier reads: "last" real token, "mean" over real tokens, or both ("last_mean").
        use_cache: return the state by default when not training (language model only).

    `auto_map` is no setting. In config.json it names the classes of modeling_spikegpt.py, which is written beside it
    and imports this package: with `trust_remote_code=True` the Auto classes load a saved model in a process that has
    not imported it. Where it is imported, that file is never read.

    Raises:
        ValueError: an unknown key, a value of another type or out of range, code of somebody else in `auto_map`; one
            message lists every problem.
    """

    model_type = "spikegpt"
    attribute_map = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "intermediate_size": "n_ffn"}
    keys_to_ignore_at_inference = ["state"]
    auto_map = {
        "AutoConfig": f"{REMOTE_CODE.stem}.SpikeGPTConfig",
        "AutoModel": f"{REMOTE_CODE.stem}.SpikeGPTModel",
        "AutoModelForCausalLM": f"{REMOTE_CODE.stem}.SpikeGPTForCausalLM",
        "AutoModelForSequenceClassification": f"{REMOTE_CODE.stem}.SpikeGPTForSequenceClassification",
    }

    vocab_size: int = 50277
    n_embd: int = 768
    n_layer: int = 18
    n_ffn: int | None = None
    context_length: int = 1024
    layer_norm_eps: float = 1e-5
    dropout: float = 0.03
    lif_tau: float = 2.0
    lif_v_threshold: float = 1.0
    lif_v_reset: float | None = 0.0
    lif_decay_input: bool = True
    lif_detach_reset: bool = False
    lif_surrogate_alpha: float = 2.0
    matrix_spikes: str = "none"
    spike_levels: int = 3
    token_shift: str = "channels"
    wkv_powers_of_two: bool = False
    pooling: str = "last"
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs) -> None:
        kwargs = {self.attribute_map.get(key, key): value for key, value in kwargs.items()}
        for key in ("n_embd", "n_layer", "n_ffn"):
            setattr(self, key, kwargs.pop(key, getattr(self, key)))
        if self.n_ffn is None:
            self.n_ffn = 4 * self.n_embd
        problems = self._foreign_code(kwargs.pop("auto_map", {})) + self._unknown_keys(kwargs) + self._bad_values()
        if problems:
            raise ValueError("SpikeGPTConfig: " + "; ".join(problems))
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict:
        """As in transformers; what makes a model spiking is left out of one that is as published."""
        said = super().to_dict() | {"auto_map": dict(self.auto_map)}
        if all(getattr(self, name) == getattr(type(self), name) for name in SPIKING):
            return {name: value for name, value in said.items() if name not in SPIKING}
        return said

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """As in transformers; the module that `auto_map` names is written beside the file."""
        super().to_json_file(json_file_path, use_diff)
        Path(json_file_path).with_name(REMOTE_CODE.name).write_bytes(REMOTE_CODE.read_bytes())

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig") -> None:
        """Nothing: asked for by transformers after it loaded a model with `trust_remote_code=True`, it would copy this
        package's source into whatever folder is saved next."""

    @property
    def neuron(self) -> NeuronParameters:
        """The settings of the blocks' neurons: every field lif_..."""
        return NeuronParameters(**{one.name: getattr(self, f"lif_{one.name}") for one in fields(NeuronParameters)})

    def _foreign_code(self, given) -> list[str]:
        """What is wrong with the auto_map of a file."""
        if isinstance(given, dict) and given.items() <= self.auto_map.items():
            return []
        return [f"auto_map must name classes of {REMOTE_CODE.name}, or be left out, got {given!r}"]

    @staticmethod
    def _unknown_keys(kwargs: dict) -> list[str]:
        known = _KNOWN_TO_TRANSFORMERS | set(GenerationConfig().to_dict())
        unknown = sorted(key for key in kwargs if key not in known and not key.startswith("_"))
        return [f"unknown key {key!r}" for key in unknown]

    def _bad_values(self) -> list[str]:
        sizes = ("vocab_size", "n_embd", "n_layer", "n_ffn", "context_length")
        if wrong := violations(self, kinds(self, inspect.get_annotations(SpikeGPTConfig))):
            return wrong
        rules = [(key, ">= 1", getattr(self, key) >= 1) for key in sizes]
        rules += [(key, f"a token's id below {self.vocab_size}", self._is_token(key)) for key in TOKENS]
        rules += [
            ("dropout", "in [0, 1)", 0 <= self.dropout < 1),
            ("layer_norm_eps", "> 0", self.layer_norm_eps > 0),
            *self.neuron.rules("lif_"),
            ("matrix_spikes", f"one of {', '.join(MATRIX_SPIKES)}", self.matrix_spikes in MATRIX_SPIKES),
            ("spike_levels", f"in 1 ... {MOST}", 1 <= self.spike_levels <= MOST),
            ("token_shift", f"one of {', '.join(TOKEN_SHIFTS)}", self.token_shift in TOKEN_SHIFTS),
            ("pooling", f"one of {', '.join(POOLINGS)}", self.pooling in POOLINGS),
        ]
        return violations(self, rules)

    def _is_token(self, key: str) -> bool:
        ids = getattr(self, key)
        return all(i is None or 0 <= i < self.vocab_size for i in (ids if isinstance(ids, list) else [ids]))


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
        config = SpikeGPTConfig.from_dict(content)
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise DamagedFile(f"{file}: {first_line(error)}") from error
    if not isinstance(config.dtype, torch.dtype | None):
        raise DamagedFile(f"{file}: dtype must be the name of one, got {config.dtype!r}")
    return config


def check_saved(source: str | os.PathLike) -> None:
    """Look at a saved model before anything is built from it, if `source` is the folder of one.

    Raises:
        ValueError: a damaged file, another architecture, or other sizes in config.json than in the weights.
    """
    folder = Path(source)
    if (folder / "config.json").is_file():
        config = read_config(folder)
        if shapes := saved_shapes(folder):
            _require_sizes(config, shapes, folder)


def _require_sizes(config: SpikeGPTConfig, shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Raise where config.json speaks of another model than the weights: nothing of its sizes is built then."""
    layers = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
    if not layers:
        raise ValueError(f"{folder} is no SpikeGPT: it has no emb.weight and no blocks, but {some(shapes)}")
    found = {"n_layer": max(layers) + 1}
    if len(embedding := shapes.get("emb.weight", ())) == 2:
        found |= {"vocab_size": embedding[0], "n_embd": embedding[1]}
    if len(key := shapes.get("blocks.0.ffn.key.weight", ())) == 2:
        found |= {"n_ffn": key[0]}
    given = {name: getattr(config, name) for name in found}
    if wrong := [f"{name} {given[name]} for {size}" for name, size in found.items() if given[name] != size]:
        raise ValueError(f"{folder}/config.json says {', '.join(wrong)} of the weights: they do not belong together")
