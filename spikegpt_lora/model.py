"""The SpikeGPT model, from token ids to logits.

    x = ln0(1[E[token] >= 0])                                     tokens are the time steps
    x = x + LIF(SRWKV(LN x));  x = x + LIF(SRFFN(LN x));  dropout    one Block, times n_layer
    head(ln_out(x))  or  score(pool(ln_out(x)))

What differs from a transformer: no attention matrix and no position embedding; SRWKV is a decaying average (wkv.py),
the residual stream receives spikes only (neurons/lif.py), and the whole past is a state of fixed size, `SpikeGPTState`.
With `config.matrix_spikes = "integer"` every matrix reads integer spikes (neurons/multilevel.py, neurons/residual.py).
A mask means that a time step does not exist: nothing decays, shifts or fires there, on whichever side the padding is.
Names inside the base model are upstream's. Source: SpikeGPT (arXiv 2302.13939), upstream `src/model.py`.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput

from .config import SpikeGPTConfig, check_saved
from .neurons.embedding import EmbeddingSpike
from .neurons.integer_block import integer_block_step
from .neurons.lif import LIF
from .neurons.multilevel import IntegerSpikes
from .neurons.residual import IntegerAmplitude, IntegerNorm
from .ops.activations import sigmoid_gate, squared_relu
from .ops.block_step import block_step
from .ops.dropout import Dropout
from .ops.integer_read import RowShift
from .ops.packed_linear import matrix_product
from .ops.spike_linear import SpikeLinear
from .ops.token_shift import token_shift
from .ops.wkv import powers_of_two, wkv
from .utils.inputs import (
    CACHES,
    LOSS,
    real_tokens,
    refuse_unknown,
    require_finite,
    require_labels,
    require_one_text,
    require_tokens,
)
from .utils.saved import some


@dataclass
class SpikeGPTState(ModelOutput):
    """Everything that SpikeGPT remembers of the tokens it has read; batch first, L layers, C = n_embd.

    att_shift, ffn_shift `(B, L, C)`: input of SRWKV and of SRFFN at the last token, or where `config.token_shift` is
    "rows" what their matrices gave for it, `(B, L, 3 C)` and `(B, L, n_ffn + C)`; wkv `(B, L, 3, C)`: numerator,
    denominator, exponent; att_membrane, ffn_membrane `(B, L, C)`: membranes of the two LIFs of each block. adapters
    `(B, units)`: membranes of the adapters' gates, where those live in token time.
    """

    att_shift: Tensor | None = None
    wkv: Tensor | None = None
    att_membrane: Tensor | None = None
    ffn_shift: Tensor | None = None
    ffn_membrane: Tensor | None = None
    adapters: Tensor | None = None

    def select(self, index: Tensor | slice) -> "SpikeGPTState":
        """The state of some of the sequences: `index` is any index into the batch dimension."""
        return SpikeGPTState(**{name: tensor[index] for name, tensor in self.items()})

    def layers(self) -> list[tuple[Tensor, ...]]:
        """Of each layer its five tensors, `(B, ...)`."""
        return list(zip(*(tensor.unbind(1) for tensor in self.to_tuple()[:5])))


@dataclass
class SpikeGPTOutput(ModelOutput):
    """last_hidden_state `(B, T, C)`, state, hidden_states: n_layer + 1 tensors `(B, T, C)` if asked for; and where
    matrices read integer spikes those that a head reads, `(B, T, C)`: the residual stream before ln_out."""

    last_hidden_state: Tensor | None = None
    state: SpikeGPTState | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    residual: Tensor | None = None


@dataclass
class SpikeGPTHeadOutput(ModelOutput):
    """loss (scalar, with labels), logits `(B, T, V)` or `(B, num_labels)`, state, hidden_states."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: SpikeGPTState | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    def get(self, key: str, default: Any = None) -> Any:
        """As a dict's; under the names that transformers has for caches the state is found too (its classifier-free
        guidance asks so, and hands it back to `forward` by that name)."""
        return super().get("state" if key in CACHES else key, default)


def _linear(config: SpikeGPTConfig, inputs: int, outputs: int, gain: float) -> nn.Linear:
    """A linear layer without bias whose initial weight is orthogonal with this gain: see `_init_weights`."""
    integer = config.matrix_spikes == "integer"
    linear = SpikeLinear(inputs, outputs) if integer else nn.Linear(inputs, outputs, bias=False)
    linear.init_gain = gain  # type: ignore[assignment]  # torch's hints know tensors and modules only
    return linear


def _norm(config: SpikeGPTConfig) -> nn.LayerNorm:
    kind = IntegerNorm if config.matrix_spikes == "integer" else nn.LayerNorm
    return kind(config.n_embd, eps=config.layer_norm_eps)


def _product(linear: nn.Module, spikes: IntegerSpikes | None, x: Tensor) -> Tensor:
    """W x; or W diag(s) q for the integer spikes q of x, where there are neurons before the matrix."""
    return linear(x) if spikes is None else linear(spikes(x), scale=spikes.scale)


class _Half(nn.Module):
    """What SRWKV and SRFFN share: linear layers that read each token mixed with the one before it."""

    readers: tuple[str, ...]  # their names
    time_mix_k: nn.Parameter
    time_mix_v: nn.Parameter
    time_mix_r: nn.Parameter

    def __init__(self, config: SpikeGPTConfig, layer_id: int):
        super().__init__()
        self.layer_id, self.n_layer = layer_id, config.n_layer
        self.mixes_rows = config.token_shift == "rows"
        self.spiking = config.matrix_spikes == "integer"

    def _add_reader(self, config: SpikeGPTConfig, name: str, outputs: int, gain: float) -> None:
        C, mixed = config.n_embd, outputs if self.mixes_rows else config.n_embd
        setattr(self, name, _linear(config, C, outputs, gain))
        setattr(self, f"time_mix_{name[0]}", nn.Parameter(torch.empty(1, 1, mixed)))
        before = IntegerSpikes(C, config.spike_levels) if self.spiking and not self.mixes_rows else None
        self.register_module(f"spike_{name}", before)

    def read(
        self, x: Tensor, norm: nn.LayerNorm, shift: Tensor | None, mask: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """What the readers give for x `(B, T, C)`, before the norm; and the new shift."""
        linears = [getattr(self, name) for name in self.readers]
        shares = [getattr(self, f"time_mix_{name[0]}") for name in self.readers]
        if self.mixes_rows:
            return _mixed_rows(norm, x, linears, shares, shift, mask)
        *mixed, shift = token_shift(x, shift, mask, *shares, norm=norm)
        neurons = [getattr(self, f"spike_{name}") for name in self.readers]
        return [_product(*one) for one in zip(linears, neurons, mixed)], shift


def _read(norm: nn.LayerNorm, x: Tensor, linears: list[nn.Module]) -> list[Tensor]:
    """What `linears` give for the norm of x."""
    if isinstance(norm, IntegerNorm):
        return norm.read(x, *linears)
    x = norm(x)
    return [linear(x) for linear in linears]


def _mixed_rows(
    norm: nn.LayerNorm,
    x: Tensor,
    linears: list[nn.Module],
    shares: list[Tensor],
    shift: Tensor | None,
    mask: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """What `linears` give for the norm of x, mixed with what it was at the token before; and the new shift, all of it
    at the last token."""
    before = [None] * len(shares) if shift is None else shift.split([share.numel() for share in shares], dim=-1)
    if isinstance(norm, IntegerNorm):
        shifts = [RowShift(share, old, mask) for share, old in zip(shares, before)]
        mixed, last = zip(*norm.read_mixed(x, linears, shifts))
    else:
        rows = _read(norm, x, linears)
        mixed, last = zip(*(token_shift(row, old, mask, share) for row, old, share in zip(rows, before, shares)))
    return list(mixed), torch.cat(last, dim=-1)


class SRWKV(_Half):
    """Spiking RWKV's time mixing: sigmoid(R) * WKV(K, V), projected (paper section 3.3; upstream RWKV_TimeMix)."""

    readers = ("key", "value", "receptance")
    spike_output: IntegerSpikes | None

    def __init__(self, config: SpikeGPTConfig, layer_id: int):
        super().__init__(config, layer_id)
        C = config.n_embd
        self.powers_of_two = config.wkv_powers_of_two
        self.time_decay = nn.Parameter(torch.empty(C))
        self.time_first = nn.Parameter(torch.empty(C))
        self._add_reader(config, "key", C, gain=0)
        self._add_reader(config, "value", C, gain=1)
        self._add_reader(config, "receptance", C, gain=0)
        K = config.spike_levels
        self.register_module("spike_output", IntegerSpikes(C, K, scale=1.2 / K) if self.spiking else None)
        self.output = _linear(config, C, C, gain=0)

    def forward(
        self,
        x: Tensor,
        norm: nn.LayerNorm,
        shift: Tensor | None = None,
        wkv_state: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x `(B, T, C)`, before the norm -> current for lif1 `(B, T, C)`, new shift, new wkv state `(B, 3, C)`."""
        (k, v, r), shift = self.read(x, norm, shift, mask)
        weights: tuple[Tensor, Tensor, Tensor] = (self.time_decay, self.time_first, k)
        weights = powers_of_two(*weights) if self.powers_of_two else weights
        y, wkv_state = wkv(*weights, v, wkv_state, mask)
        return _product(self.output, self.spike_output, sigmoid_gate(r, y)), shift, wkv_state


class SRFFN(_Half):
    """Spiking RWKV's channel mixing: sigmoid(R) * V(relu(K)^2) (paper section 3.4; upstream RWKV_ChannelMix). Where
    matrices read integer spikes, relu(K)^2 is what the neurons before V send: squares."""

    readers = ("key", "receptance")
    spike_value: IntegerSpikes | None

    def __init__(self, config: SpikeGPTConfig, layer_id: int):
        super().__init__(config, layer_id)
        C, hidden = config.n_embd, cast(int, config.n_ffn)  # a configuration that is made has no None there
        self._add_reader(config, "key", hidden, gain=math.sqrt(max(1, hidden / C)))
        self._add_reader(config, "receptance", C, gain=0)
        K = config.spike_levels
        before = IntegerSpikes(hidden, K, signed=False, squared=True, scale=3 / K) if self.spiking else None
        self.register_module("spike_value", before)
        self.value = _linear(config, hidden, C, gain=0)

    def forward(
        self, x: Tensor, norm: nn.LayerNorm, shift: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x `(B, T, C)`, before the norm -> current for lif2 `(B, T, C)`, new shift."""
        (k, r), shift = self.read(x, norm, shift, mask)
        k = k if self.spiking else squared_relu(k)
        return sigmoid_gate(r, _product(self.value, self.spike_value, k)), shift


class Block(GradientCheckpointingLayer):
    """x = x + LIF(SRWKV(LN x)); x = x + LIF(SRFFN(LN x)); dropout (paper figure 1; upstream Block)."""

    def __init__(self, config: SpikeGPTConfig, layer_id: int):
        super().__init__()
        if layer_id == 0 and config.matrix_spikes == "integer":
            self.amplitude0 = IntegerAmplitude(config.n_embd)
        elif layer_id == 0:
            self.ln0 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)
        self.ln1 = _norm(config)
        self.ln2 = _norm(config)
        self.att = SRWKV(config, layer_id)
        self.ffn = SRFFN(config, layer_id)
        self.lif1 = LIF(config.neuron)
        self.lif2 = LIF(config.neuron)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x: Tensor, state: tuple[Tensor | None, ...], mask: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x `(B, T, C)`, the five tensors of one of `SpikeGPTState.layers` or five None -> x, the five new ones."""
        att_shift, wkv_state, att_membrane, ffn_shift, ffn_membrane = state
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        elif hasattr(self, "amplitude0"):
            x = self.amplitude0(x)
        in_one = integer_block_step if self.att.spiking else block_step
        if mask is None and (stepped := in_one(self, SRWKV, SRFFN, x, state)) is not None:
            return stepped
        current, att_shift, wkv_state = self.att(x, self.ln1, att_shift, wkv_state, mask)
        x, att_membrane = self.lif1.add(x, current, att_membrane, mask)
        current, ffn_shift = self.ffn(x, self.ln2, ffn_shift, mask)
        x, ffn_membrane = self.lif2.add(x, current, ffn_membrane, mask, self.dropout)
        return x, (att_shift, wkv_state, att_membrane, ffn_shift, ffn_membrane)


class SpikeGPTPreTrainedModel(PreTrainedModel):
    """What the three model classes share: names, initial values, gradient checkpointing."""

    config: SpikeGPTConfig
    config_class = SpikeGPTConfig
    base_model_prefix = "spikegpt"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _is_stateful = True  # generation cannot take tokens back

    @classmethod
    def from_pretrained(cls, source, *args, output_loading_info=False, ignore_mismatched_sizes=False, **kwargs):
        """As in transformers.

        Raises:
            ValueError: a damaged file, another architecture, weights of other sizes, or one that is not finite (spikes
                would hide it; those of quantised matrices are not looked at).
        """
        if source is not None and not {"config", "subfolder"} & kwargs.keys():
            check_saved(source)
        model, info = super().from_pretrained(
            source, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        if info["mismatched_keys"] and not ignore_mismatched_sizes:
            found = info["mismatched_keys"]
            wrong = sorted(f"{name} must be {tuple(ours)}, got {tuple(its)}" for name, its, ours in found)
            raise ValueError(f"{source} holds weights of other sizes than its config.json says: {some(wrong)}")
        wide = {name: p for name, p in model.named_parameters() if p.dtype.itemsize > 1}
        require_finite(wide, f"the weights of {source or cls.__name__}")
        return (model, info) if output_loading_info else model

    @property
    def is_gradient_checkpointing(self) -> bool:
        """What peft asks of every model; transformers' own warns, from 5.24 on, that its name is old."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    @torch.no_grad()
    def _init_weights(self, module):
        """Initial values of upstream's `RWKV_Init`; h = channel / (C - 1), i = channel / C, l = layer / (L - 1),
        m = 1 - layer / L.

        | parameter | initial value |
        | --- | --- |
        | emb | orthogonal, gain 1e-4 sqrt(max(V, C)) |
        | ln0, ln1, ln2, ln_out | weight 1, bias 0; with integer spikes: offset -1, centre 0 |
        | amplitude0 | 2 |
        | att.time_decay | -5 + 8 h^(0.7 + 1.3 l) |
        | att.time_first | ln 0.3 + 0.5 ((channel + 1) mod 3 - 1) |
        | att.time_mix_k, _v, _r | i^m, i^m + 0.3 l, i^(m / 2) |
        | att.value | orthogonal, gain 1 |
        | att.key, att.receptance, att.output | 0 |
        | ffn.time_mix_k, _r | i^m |
        | ffn.key | orthogonal, gain sqrt(max(1, n_ffn / C)) |
        | ffn.value, ffn.receptance | 0 |
        | head | orthogonal, gain 0.5 sqrt(max(1, V / C)) |
        | score | normal, standard deviation 0.02 |
        | spike_... | see `IntegerSpikes`: s = 1; 1.2 / K before att.output, 3 / K before ffn.value |

        With `token_shift="rows"` C of time_mix is the number of rows.
        """
        if isinstance(module, nn.LayerNorm):
            initialization.ones_(module.weight)
            initialization.zeros_(module.bias)
            if isinstance(module, IntegerNorm):
                initialization.constant_(module.offset, -1.0)
                initialization.zeros_(module.centre)
        elif isinstance(module, IntegerAmplitude):
            initialization.constant_(module.amplitude, 2.0)
        elif isinstance(module, IntegerSpikes):
            scale, most = module.initial
            initialization.constant_(module.log_scale, math.log(scale))
            initialization.constant_(module.most, most)
        elif isinstance(module, nn.Embedding):
            _orthogonal(module.weight, 1e-4 * math.sqrt(max(module.weight.shape)))
        elif isinstance(module, nn.Linear) and hasattr(module, "init_gain"):
            _orthogonal(module.weight, module.init_gain)
        elif isinstance(module, nn.Linear):  # score
            initialization.normal_(module.weight, mean=0.0, std=0.02)
        elif isinstance(module, SRWKV):
            _init_srwkv(module)
        elif isinstance(module, SRFFN):
            _init_srffn(module)


def _init_srwkv(att: SRWKV):
    C, l, m = att.time_decay.numel(), att.layer_id / max(att.n_layer - 1, 1), 1 - att.layer_id / att.n_layer
    channel = torch.arange(C, dtype=torch.float32, device=att.time_decay.device)
    h, i = channel / max(C - 1, 1), (channel / C).view(1, 1, C)
    initialization.copy_(att.time_decay, -5 + 8 * h ** (0.7 + 1.3 * l))
    initialization.copy_(att.time_first, math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
    initialization.copy_(att.time_mix_k, i**m)
    initialization.copy_(att.time_mix_v, i**m + 0.3 * l)
    initialization.copy_(att.time_mix_r, i ** (0.5 * m))


def _init_srffn(ffn: SRFFN):
    m = 1 - ffn.layer_id / ffn.n_layer
    for share in (ffn.time_mix_k, ffn.time_mix_r):
        i = torch.arange(share.numel(), dtype=torch.float32, device=share.device) / share.numel()
        initialization.copy_(share, i.view(1, 1, -1) ** m)


def _orthogonal(weight: Tensor, gain: float):
    """Orthogonal `weight`, drawn in float32 (there is no half-precision QR), unless it was loaded from a file."""
    if gain == 0:
        initialization.zeros_(weight)
    elif not getattr(weight, "_is_hf_initialized", False):
        drawn = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        initialization.copy_(weight, nn.init.orthogonal_(drawn, gain=gain))


class SpikeGPTModel(SpikeGPTPreTrainedModel):
    """Token ids to hidden states, with the state in and out."""

    def __init__(self, config: SpikeGPTConfig):
        super().__init__(config)
        self.emb: nn.Module = nn.Embedding(config.vocab_size, config.n_embd)
        self.emb_spike = EmbeddingSpike(config.lif_surrogate_alpha)
        self.blocks = nn.ModuleList([Block(config, i) for i in range(config.n_layer)])
        self.ln_out = _norm(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.emb

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.emb = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        state: SpikeGPTState | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> SpikeGPTOutput | tuple:
        """Read a stretch of tokens.

        Args:
            input_ids: `(B, T)`, T >= 1; or `inputs_embeds` `(B, T, C)`: rows of E, real-valued, before they spike.
            attention_mask: `(B, T)`, 0 where there is no token, on any side; None: every token is real.
            state: what was remembered of the tokens before, from an earlier call with `use_cache=True`.
            use_cache: return `.state`. Default: `config.use_cache` when not training.
            output_hidden_states: return x before every block, and after ln_out.
            kwargs: what stock code passes to every model, as None or where it changes nothing (see `inputs`); a state
                as `cache` or `past_key_values`, with a mask of the tokens before it too, as caches go.

        Raises:
            ValueError: neither or both inputs, no token at all, ids that the vocabulary has not, a mask that is no mask
                or of another batch, a state of another batch or not finite, several texts in a row.
            TypeError: an argument that there is not.
        """
        x, mask, state = self._given(input_ids, attention_mask, inputs_embeds, state, kwargs)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        x, _ = self.emb_spike.step(x, mask=mask)
        hidden_states, new_states = [], []
        states = [(None,) * 5] * len(self.blocks) if state is None else state.layers()
        for block, layer_state in zip(self.blocks, states):
            if output_hidden_states:  # else no layer's activations outlive it
                hidden_states.append(x)
            x, new_state = block(x, layer_state, mask)
            new_states.append(new_state)
        residual, x = x, self.ln_out(x)

        output = SpikeGPTOutput(
            last_hidden_state=x,
            state=SpikeGPTState(*(torch.stack(t, dim=1) for t in zip(*new_states))) if use_cache else None,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            residual=residual if self.config.matrix_spikes == "integer" else None,
        )
        return output if _default(return_dict, self.config.return_dict) else output.to_tuple()

    def _given(self, input_ids, attention_mask, inputs_embeds, state, others: dict):
        """Embeddings `(B, T, C)`, mask bool `(B, T)` or None, and state; raises on what would be read wrongly."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        tokens = require_tokens(input_ids, inputs_embeds, self.config.n_embd)
        state, attention_mask = _past(state, attention_mask, others, tokens.shape[1])
        refuse_unknown(type(self).__name__, others, _OWN)
        mask = real_tokens(attention_mask, *tokens.shape[:2])
        require_one_text(others.get("position_ids"), mask)
        if state is not None:
            self._check_state(state, tokens.shape[0])
        if input_ids is None:
            return inputs_embeds, mask, state
        if state is None:  # of a text that goes on, it was said at its beginning
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        return self._embed(input_ids), mask, state

    def _check_state(self, state, B: int) -> None:
        if not isinstance(state, SpikeGPTState) or state.wkv is None:
            raise ValueError(f"state must be a SpikeGPTState from an earlier call, got {type(state).__name__}")
        held, expected = tuple(state.wkv.shape[:2]), (B, self.config.n_layer)
        if held != expected:
            raise ValueError(f"state must be of (sequences, layers) {expected}, got {held}")
        if state.wkv.shape[-1] != self.config.n_embd:
            raise ValueError(f"state must be of width {self.config.n_embd}, got {state.wkv.shape[-1]}")
        require_finite(state, "state")

    def _embed(self, input_ids: Tensor) -> Tensor:
        try:
            return self.emb(input_ids)
        except IndexError as error:
            low, high = int(input_ids.min()), int(input_ids.max())
            raise ValueError(
                f"input_ids must be in 0 ... {self.config.vocab_size - 1}, got {low} ... {high}: the tokenizer is "
                "another model's"
            ) from error


def _default(value, default):
    return default if value is None else value


_OWN = ("input_ids", "attention_mask", "inputs_embeds", "state", "labels", "use_cache", "output_hidden_states")


def _past(state, attention_mask, others: dict, T: int):
    """State and mask of this stretch of T tokens, also where stock code gives them as those of a cache: then they are
    taken out of `others`, and the mask is that of all tokens so far."""
    for name in CACHES:
        if isinstance(others.get(name), SpikeGPTState):
            state = others.pop(name)
            attention_mask = None if attention_mask is None else attention_mask[:, -T:]
    return state, attention_mask


def _predictable(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """labels `(B, T)` with -100 where the step before is masked, so that nothing real could predict the token."""
    if attention_mask is None:
        return labels
    after_nothing = nn.functional.pad(~attention_mask.bool()[:, :-1], (1, 0))
    return labels.masked_fill(after_nothing, -100)


class SpikeGPTForCausalLM(SpikeGPTPreTrainedModel, GenerationMixin):
    """SpikeGPT with its language-model head; `generate` carries the state, one token at a time."""

    _tied_weights_keys = {"head.weight": "spikegpt.emb.weight"}  # only if config.tie_word_embeddings

    def __init__(self, config: SpikeGPTConfig):
        super().__init__(config)
        self.spikegpt = SpikeGPTModel(config)
        gain = 0.5 * math.sqrt(max(1, config.vocab_size / config.n_embd))
        self.head: nn.Module = _linear(config, config.n_embd, config.vocab_size, gain=gain)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        state: SpikeGPTState | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> SpikeGPTHeadOutput | tuple:
        """As `SpikeGPTModel.forward`; logits `(B, T, V)`, or of the last `logits_to_keep` positions only.

        labels `(B, T)`: token ids, -100 is ignored; shifted inside, so pass `input_ids` with padding at -100. A token
        that follows a masked step is not predicted: a sentence's loss is the same on whichever side it is padded.
        """
        of_loss = {name: kwargs.pop(name) for name in LOSS if name in kwargs}
        output = self.spikegpt(
            input_ids, attention_mask, inputs_embeds, state, use_cache, output_hidden_states, return_dict=True, **kwargs
        )
        kept = slice(-logits_to_keep, None)  # of 0: everything
        if output.residual is None:
            logits = matrix_product(self.head, output.last_hidden_state[:, kept])
        else:
            (logits,) = _read(self.spikegpt.ln_out, output.residual[:, kept], [self.head])
        loss = None
        if labels is not None:
            labels = _predictable(labels, attention_mask)
            if not of_loss:  # else the Trainer divides by a count of its own
                require_labels(labels[:, 1:])
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **of_loss)
        return _head_output(self, loss, logits, output, return_dict)

    def generate(self, *args, **kwargs) -> Tensor | ModelOutput:
        """transformers' `generate`, one token a step. With `return_dict_in_generate=True` the result has `.state`, what
        was read of each sequence: all of it but its newest token. So `generate(result.sequences[:, -1:],
        state=result.state)` goes on. After a beam search it is None (the beams' states are not the sequences')."""
        result = super().generate(*args, **kwargs)
        if isinstance(result, ModelOutput):
            result.state = None if "beam_indices" in result else next(filter(None, map(result.get, CACHES)), None)
        return result

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        """Hands the state to the next step."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        return model_kwargs | {"state": outputs.state} if outputs.state is not None else model_kwargs

    def prepare_inputs_for_generation(
        self, input_ids, state=None, attention_mask=None, inputs_embeds=None, is_first_iteration=False, **kwargs
    ):
        if state is not None and not is_first_iteration and kwargs.get("use_cache"):  # it has read all but the newest
            input_ids = input_ids[:, -1:]
            attention_mask = None  # the newest token is real in every row
        embeds_first = inputs_embeds is not None and is_first_iteration
        return {
            "input_ids": None if embeds_first else input_ids,
            "inputs_embeds": inputs_embeds if embeds_first else None,
            "attention_mask": attention_mask,
            "state": state,
            "use_cache": kwargs.get("use_cache"),
            "output_hidden_states": kwargs.get("output_hidden_states"),
            "output_attentions": kwargs.get("output_attentions"),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
        }

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        if (state := kwargs.get("state")) is not None:
            rows = torch.arange(state.wkv.shape[0], device=state.wkv.device)
            kwargs["state"] = state.select(rows.repeat_interleave(expand_size))
        return input_ids, kwargs

    @classmethod
    def _supports_default_dynamic_cache(cls):  # `generate` is not to make a key/value cache beside the state
        return False

    @staticmethod
    def _reorder_cache(state: SpikeGPTState, beam_idx: Tensor) -> SpikeGPTState:
        return state.select(beam_idx)


class SpikeGPTForSequenceClassification(SpikeGPTPreTrainedModel):
    """SpikeGPT with a classifier, `score`, on its pooled hidden states (`config.pooling`)."""

    def __init__(self, config: SpikeGPTConfig):
        super().__init__(config)
        self.num_labels = cast(int, config.num_labels)
        self.spikegpt = SpikeGPTModel(config)
        self.score: nn.Module = _score(config)
        self.post_init()

    @classmethod
    def from_language_model(cls, model: SpikeGPTForCausalLM, **changes) -> "SpikeGPTForSequenceClassification":
        """A classifier on `model`'s weights, shared and not copied, with a new `score`.

        Args:
            changes: to the configuration, e.g. `num_labels=3`, `pooling="mean"`, `dropout=0.1`; not to the sizes.

        Raises:
            RuntimeError: the changed configuration asks for other weights than `model` has.
        """
        config = SpikeGPTConfig.from_dict({**model.config.to_dict(), "architectures": None, **changes})
        with torch.device("meta"):  # nothing is drawn at random that the next line would overwrite
            classifier = cls(config)
        classifier.spikegpt.load_state_dict(model.spikegpt.state_dict(), assign=True)
        classifier.score = classifier.score.to_empty(device=model.device).to(model.dtype)
        classifier._init_weights(classifier.score)
        return classifier.train(model.training)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        state: SpikeGPTState | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> SpikeGPTHeadOutput | tuple:
        """As `SpikeGPTModel.forward`; logits `(B, num_labels)`. labels `(B,)`: class ids, or values for regression."""
        of_loss = {name: kwargs.pop(name) for name in LOSS if name in kwargs}
        output = self.spikegpt(
            input_ids, attention_mask, inputs_embeds, state, use_cache, output_hidden_states, return_dict=True, **kwargs
        )
        if output.residual is None:
            logits = self.score(pool(output.last_hidden_state, attention_mask, self.config.pooling))
        else:  # a mean is no integer: what is pooled is what the matrix gave
            (rows,) = _read(self.spikegpt.ln_out, output.residual, [self.score])
            logits = pool_rows(rows, attention_mask, self.config.pooling)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **of_loss)
        return _head_output(self, loss, logits, output, return_dict)


def pool(hidden: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """What the classifier reads of hidden `(B, T, C)`: `(B, C)`, or `(B, 2 C)` for "last_mean"; 0 without a token."""
    B, T, _ = hidden.shape
    mask = hidden.new_ones(B, T, dtype=torch.long) if attention_mask is None else attention_mask.bool().long()
    newest = (torch.arange(T, device=hidden.device) * mask).argmax(dim=1)
    last = hidden[torch.arange(B, device=hidden.device), newest] * mask.amax(dim=1, keepdim=True)
    if pooling == "last":
        return last
    mean = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return mean if pooling == "mean" else torch.cat([last, mean], dim=1)


def pool_rows(rows: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """Logits `(B, labels)` of what a score with integer spikes gave for every token, `(B, T, rows)`; for "last_mean"
    the second half of the rows reads the mean."""
    if pooling != "last_mean":
        return pool(rows, attention_mask, pooling)
    last, mean = rows.chunk(2, dim=-1)
    return pool(last, attention_mask, "last") + pool(mean, attention_mask, "mean")


def _score(config: SpikeGPTConfig) -> nn.Linear:
    """`score`; with integer spikes its two parts of "last_mean" stand one above the other, not side by side."""
    parts, labels = 2 if config.pooling == "last_mean" else 1, cast(int, config.num_labels)
    if config.matrix_spikes == "integer":
        return SpikeLinear(config.n_embd, parts * labels)
    return nn.Linear(parts * config.n_embd, labels, bias=False)


def _head_output(model, loss, logits, output: SpikeGPTOutput, return_dict):
    result = SpikeGPTHeadOutput(loss=loss, logits=logits, state=output.state, hidden_states=output.hidden_states)
    return result if _default(return_dict, model.config.return_dict) else result.to_tuple()


AutoConfig.register("spikegpt", SpikeGPTConfig)
AutoModel.register(SpikeGPTConfig, SpikeGPTModel)
AutoModelForCausalLM.register(SpikeGPTConfig, SpikeGPTForCausalLM)
AutoModelForSequenceClassification.register(SpikeGPTConfig, SpikeGPTForSequenceClassification)
