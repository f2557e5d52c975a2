"""How fast the kernels, a training step and streaming are here, each against what it could be.

    python recipes/bench.py                          everything
    python recipes/bench.py --parts kernels lengths  some of it

Ways to one result are timed in one process, in turns, and only after their results have been found equal; where they
are not, the program stops without a time. It leaves bench.md and bench.json in --output-dir: the processor, versions,
and of each row median, quartiles, and the ratio to its group's first row. bfloat16 is timed where the processor has it.

Floors: `8 exp` is one pass over memory that reads k, v, gy, writes y, gk, gv and takes 8 exponentials an element (the
kernels' own exp, same flags, same threads); `matrix products` are those that the step makes, recorded and made again on
inputs of the same shapes and strides, nothing else.
"""

import argparse
import contextlib
import copy
import ctypes
import importlib.metadata
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded: see "A busy machine" in README.md

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from spikingjelly.activation_based import functional, neuron
from transformers import BertConfig, BertForSequenceClassification, RwkvConfig, RwkvModel
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

import spikegpt_lora.model
from spikegpt_lora import (
    SpikeGPTConfig,
    SpikeGPTForCausalLM,
    SpikeGPTForSequenceClassification,
    SpikeLoraConfig,
    embedded_checkpoint,
    wkv,
)
from spikegpt_lora.adapters import fused
from spikegpt_lora.adapters.config import PRESETS
from spikegpt_lora.convert.generation import WEIGHTS, pack_weights
from spikegpt_lora.finetune.efficient import (
    CachedTrunk,
    DropBackward,
    SkipBatches,
    SparseChannels,
    SparseConfig,
    cached_trunk,
)
from spikegpt_lora.finetune.efficient.step_change import StepChange
from spikegpt_lora.forward import evaluating
from spikegpt_lora.neurons.lif import LIF
from spikegpt_lora.ops import build
from spikegpt_lora.ops.backend import default_backend, load
from spikegpt_lora.ops.integer_spikes import integer_spikes
from spikegpt_lora.pretrain.loop import Pretraining, PretrainOptions
from spikegpt_lora.utils import command_line
from spikegpt_lora.utils.errors import read_json
from spikegpt_lora.utils.files import write_json, write_text
from spikegpt_lora.utils.machine import processor_name
from spikegpt_lora.utils.precision import processor
from spikegpt_lora.utils.timing import Disagreement, Recorder, agree, compare, inside, peak_memory, table

SMALL = {"n_layer": 4, "n_embd": 256, "batch": 32, "tokens": 40}
LARGE = {"n_layer": 18, "n_embd": 768, "batch": 8, "tokens": 40}  # SpikeGPT-216M
MINILM = {"n_layer": 6, "n_embd": 384, "batch": 32, "tokens": 40}  # all-MiniLM-L6-v2
VOCABULARY = 8192


def fused_lora(**settings) -> LoraConfig:
    return fused(LoraConfig(**settings))


ADAPTERS = {
    "LoRA, stock peft": LoraConfig,
    "LoRA, fused": fused_lora,
    "SpikeLoRA": SpikeLoraConfig,
}
GATES = {
    "LoRA": fused_lora,
    "SpikeLoRA": SpikeLoraConfig,
    "SpikeLoRA, binary": partial(SpikeLoraConfig, spikelora_gate="binary"),
    "SpikeLoRA, token time": partial(SpikeLoraConfig, spikelora_time="token"),
    "SpikeLoRA, learned": partial(SpikeLoraConfig, spikelora_learn="both"),
    "SpikeLoRA, token time, learned": partial(SpikeLoraConfig, spikelora_time="token", spikelora_learn="both"),
}


def sparse(keep: float, select: str, layers: str = "all") -> Callable:
    return lambda: SparseChannels(SparseConfig(keep, select, layers=layers, start=0.0))


CHANNELS = {
    "FFN 25 %, static": sparse(0.25, "static"),
    "FFN 25 %, svd": sparse(0.25, "svd"),
    "FFN 10 %, static": sparse(0.1, "static"),
    "FFN 25 %, static, all but first": sparse(0.25, "static", "all_but_first"),
}
CHEAPER = CHANNELS | {
    "half of the backwards dropped": lambda: DropBackward(0.5),
    "three quarters dropped": lambda: DropBackward(0.75),
}
GATED = {"gate that accepts all": lambda: SkipBatches(1.0)}


def main() -> int:
    args = parse_arguments()
    command_line.set_up()
    recorded = runs_in(args.record, args.parts) if args.record else None  # before minutes of measuring
    if args.threads:
        torch.set_num_threads(args.threads)
    load("cpu")
    rows = []
    try:
        for part in args.parts:
            torch.manual_seed(0)
            rows += [{"part": part, **row} for row in PARTS[part](args.repeats)]
    except Disagreement as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    run = {**conditions(), "rows": rows}
    text = f"{sentence(run)}\n\n{table(rows)}"
    print(text)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(args.output_dir / "bench.md", text + "\n")
    write_json(args.output_dir / "bench.json", run)
    if recorded:
        recorded["runs"] = [run, *(other for other in recorded["runs"] if other["kind"] != run["kind"])]
        write_json(args.record, recorded)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    add = parser.add_argument
    named = f"of {' '.join(PARTS)} (default: all)"
    add("--parts", nargs="+", choices=PARTS, metavar="PART", default=list(PARTS), help=named)
    add("--repeats", type=command_line.positive, default=15, help="rounds of each comparison")
    add("--threads", type=command_line.positive, help="of torch (default: its own choice)")
    add("--output-dir", type=Path, default=Path("runs/bench"), help="bench.md and bench.json go here")
    add("--record", type=Path, metavar="FILE", help="of runs by processor kind; this one goes there too")
    return parser.parse_args()


def runs_in(path: Path, parts: list[str]) -> dict:
    """What `path` holds, to which a run of `parts` is to be added."""
    if missing := ", ".join(part for part in PARTS if part not in parts):
        raise ValueError(f"--record takes a run of all parts, this one has no {missing}: leave --parts or --record out")
    return read_json(path, keys=("runs",))


# ---- the parts


def kernels(repeats: int) -> list[dict]:
    """WKV and LIF, forward and backward, at (32, 64, 512)."""
    B, T, C = 32, 64, 512
    time_decay, time_first = torch.randn(C), torch.randn(C)
    k, v, gy = (torch.randn(B, T, C) for _ in range(3))

    def wkv_by(function):
        leaves = [x.clone().requires_grad_() for x in (time_decay, time_first, k, v)]
        return lambda: torch.autograd.grad(function(*leaves)[0], leaves, gy)

    ways = {
        "kernel": wkv_by(partial(wkv, backend="extension")),
        "plain torch": wkv_by(partial(wkv, backend="reference")),
        "loop over tokens (transformers' Rwkv)": wkv_by(rwkv_linear_attention_cpu),
    }
    agree("wkv", ways, 1e-3)
    rows = compare("WKV forward + backward (32, 64, 512)", {"8 exp": eight_exp(k, v, gy), **ways}, repeats)

    x, lif = torch.randn(B, T, C).requires_grad_(), LIF()
    node = neuron.LIFNode(tau=2.0, surrogate_function=lif.surrogate_function, step_mode="m")

    def spikingjelly(current):
        functional.reset_net(node)
        return node(current.transpose(0, 1).contiguous()).transpose(0, 1)

    ways = {
        "kernel": lambda: torch.autograd.grad(lif(x), x, gy),
        "spikingjelly": lambda: torch.autograd.grad(spikingjelly(x), x, gy),
    }
    agree("LIF", ways, 1e-5)
    rows += compare("LIF forward + backward (32, 64, 512)", ways, repeats)
    mask = torch.arange(T) < torch.randint(T // 2, T + 1, (B, 1))

    def masked():
        return torch.autograd.grad(lif.step(x, None, mask)[0], x, gy)

    ways = {
        "kernel": masked,
        "spikingjelly": inside(lambda: patch.object(LIF, "_has_kernel", lambda self: False), masked),
    }
    agree("LIF with padding", ways, 1e-5)
    return rows + compare("LIF with padding, forward + backward (32, 64, 512)", ways, repeats)


def lengths(repeats: int) -> list[dict]:
    """WKV forward and backward against T and C: time and memory an element."""
    rows = []
    for group, shapes in {
        "WKV against T (4, T, 512)": {f"T = {T}": (4, T, 512) for T in (64, 256, 1024, 4096, 8192)},
        "WKV against C (8, 64, C)": {f"C = {C}": (8, 64, C) for C in (64, 100, 256, 1000, 2048)},
    }.items():
        ways = {name: wkv_at(*shape) for name, shape in shapes.items()}
        for row in compare(group, ways, repeats):
            elements = math.prod(shapes[row["what"]])
            memory = peak_memory(ways[row["what"]]) / elements
            row["note"] = f"{1e6 * row['median_ms'] / elements:.2f} ns and {memory:.0f} bytes an element"
            rows.append(row)
    return rows


def wkv_at(B: int, T: int, C: int) -> Callable:
    leaves = [torch.randn(shape).requires_grad_() for shape in ((C,), (C,), (B, T, C), (B, T, C))]
    gy = torch.randn(B, T, C)
    return lambda: torch.autograd.grad(wkv(*leaves, backend="extension")[0], leaves, gy)


def step(repeats: int) -> list[dict]:
    """A training step with each adapter, of a 4-layer, 256-wide model."""
    return training_steps("4 x 256", spikegpt, SMALL, LOOPS, repeats)


def encoder(repeats: int) -> list[dict]:
    """The same of a BERT of all-MiniLM-L6-v2's size."""
    return training_steps("BERT 6 x 384", bert, MINILM, {}, repeats)


def large_step(repeats: int) -> list[dict]:
    """The same of the 216M model's shape."""
    return training_steps("216M", spikegpt, LARGE, {"loops over tokens": loops}, max(repeats // 3, 3))


def training_steps(name: str, model: Callable, size: dict, others: dict[str, Callable], repeats: int) -> list[dict]:
    """Each of ADAPTERS beside the matrix products that all of them make; stock LoRA in the contexts `others` too."""
    trainings = {adapter: Training(make, model, **size) for adapter, make in ADAPTERS.items()}
    stock, spiking = trainings["LoRA, stock peft"], trainings["SpikeLoRA"]
    lora = {adapter: one.gradients for adapter, one in trainings.items() if one is not spiking}
    lora |= {way: inside(context, stock.gradients) for way, context in others.items()}
    agree("gradients of LoRA", lora, 1e-6)
    plain = inside(lambda: default_backend("reference"), spiking.gradients)
    agree("gradients of SpikeLoRA", {"kernels": spiking.gradients, "plain torch": plain}, 1e-6)

    ways = {"matrix products": products(stock.step), **steps(trainings)}
    ways |= {f"LoRA, {way}": inside(context, stock.step) for way, context in others.items()}
    if bf16_pays():
        ways["matrix products, bfloat16"] = products(partial(stock.step, bf16=True))
        ways |= {f"{adapter}, bfloat16": partial(one.step, bf16=True) for adapter, one in trainings.items()}
    rows = compare(f"training step, {name}, batch {size['batch']} x {size['tokens']}", ways, repeats)
    for row, training in zip(rows[1:], trainings.values()):
        share, memory = row["median_ms"] / rows[1]["median_ms"], peak_memory(training.step) / 2**20
        row["note"] = f"{share:.2f} of stock LoRA, {memory:.0f} MiB above {training.weights_mib:.0f} MiB of weights"
    return rows


def efficient(repeats: int) -> list[dict]:
    """A training step of fused LoRA made cheaper in each of the ways of `finetune/efficient`, of a 4-layer, 256-wide
    classifier, real and integer, of the 216M shape, of an encoder of all-MiniLM-L6-v2's size and, by the gate alone, of
    a language model. They do not give one result: what they give is tests/finetune/efficient's."""
    rows = []
    for name, model, size, changes, some in (
        ("4 x 256", spikegpt, SMALL, CHEAPER | GATED, repeats),
        ("4 x 256, integer spikes", integer_spikegpt, SMALL, CHEAPER, repeats),
        ("BERT 6 x 384", bert, MINILM, CHANNELS, repeats),
        ("216M", spikegpt, LARGE, CHANNELS, max(repeats // 3, 3)),
        ("language model 4 x 256", language_spikegpt, SMALL | {"batch": 16, "tokens": 128}, GATED, repeats),
    ):
        for bf16 in (False, True) if bf16_pays() else (False,):
            ways = {"dense": partial(Training(fused_lora, model, **size).step, bf16=bf16)}
            for way, change in changes.items():
                ways[way] = partial(Changed(change(), model, size).step, bf16=bf16)
            if model in (spikegpt, integer_spikegpt):
                for way, cached in {"upper half": False, "upper half, cached trunk": True}.items():
                    ways[way] = partial(upper_half(model, size, cached).step, bf16=bf16)
            precision = ", bfloat16" if bf16 else ""
            rows += times_faster(compare(f"LoRA step made cheaper, {name}{precision}", ways, some))
    return rows


def times_faster(rows: list[dict]) -> list[dict]:
    for row in rows[1:]:
        row["note"] = f"{rows[0]['median_ms'] / row['median_ms']:.2f} times as fast"
    return rows


def gates(repeats: int) -> list[dict]:
    """A training step and an answer with each kind of gate, on a SpikeGPT and on the encoder.

    Only LoRA can be merged into W0, which is what "no inference overhead" means.
    """
    rows = []
    for name, model, size in (("4 x 256", spikegpt, SMALL), ("MiniLM, 6 x 384", bert, MINILM)):
        trainings = {gate: Training(adapter, model, **size) for gate, adapter in GATES.items()}
        rows += compare(f"step by gate, {name}, batch 32 x 40", steps(trainings), repeats)
        merged = Training(LoraConfig, model, **size)
        merged.model.merge_adapter()
        answers = {"LoRA, merged": merged.answer} | {gate: training.answer for gate, training in trainings.items()}
        rows += compare(f"inference by gate, {name}, batch 32 x 40", answers, repeats)
    return rows


def pretrain(repeats: int) -> list[dict]:
    """A pre-training step of a 4-layer, 256-wide language model, on random tokens."""
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, 100_000)
    ways = {}
    with tempfile.TemporaryDirectory() as folder:
        for bf16 in (False, True) if bf16_pays() else (False,):
            # So many steps that none is saved, and a rate so low that the weights stay what they are.
            options = PretrainOptions(steps=10**9, learning_rate=1e-30, bf16=bf16)
            model = random_weights(SpikeGPTForCausalLM(config(SMALL)))
            one = partial(next, Pretraining(model, tokens, options).train(folder, math.inf))
            name = ", bfloat16" if bf16 else ""
            ways |= {f"matrix products{name}": products(one), f"pre-training{name}": one}
        size = f"{options.batch_size} x {options.length}"
        rows = compare(f"pre-training step, 4 x 256, vocabulary of {VOCABULARY:,}, {size} tokens", ways, repeats)
    return per_second(rows, options.batch_size * options.length)


def streaming(repeats: int) -> list[dict]:
    """One token of the 216M model, its state carried along; its matrices as they are, and packed."""
    model = random_weights(SpikeGPTForCausalLM(config(LARGE, vocab_size=50277))).eval()
    with torch.inference_mode():
        read = token_reader(model)
        plain = inside(lambda: default_backend("reference"), read)
        ways = {"kernels": read, "plain torch": plain}
        agree("logits of one token", ways, 1e-3)
        ways = {"matrix-vector products": products(plain), **ways}  # torch's own: the kernels' are no operators
        for weights in WEIGHTS:
            ways[f"kernels, {weights} weights"] = token_reader(pack_weights(copy.deepcopy(model), weights))
        rows = compare("one token, 216M, streaming", ways, 3 * repeats)
    return per_second(rows, 1)


def token_reader(model: SpikeGPTForCausalLM) -> Callable:
    """Reads one token after three others, as often as it is called."""
    state, token = model(torch.tensor([[1, 2, 3]]), use_cache=True).state, torch.tensor([[4]])
    return lambda: model(token, state=state, use_cache=True).logits


def generation(repeats: int) -> list[dict]:
    """`generate` with the model in the package: a token takes as long whether 50 are written or 400."""
    model = SpikeGPTForCausalLM.from_pretrained(embedded_checkpoint()).eval()
    prompt, lengths = torch.tensor([[3, 4, 5]]), (50, 200, 400)

    def writing(tokens):
        exactly = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
        return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **exactly)

    ways = {f"{tokens} tokens": writing(tokens) for tokens in lengths}
    rows = compare("generate, the model in the package", ways, max(3, repeats // 3))
    for row, tokens in zip(rows, lengths, strict=True):
        row["note"] = f"{row['median_ms'] / tokens:.2f} ms a token"
    return rows


def spikes(repeats: int) -> list[dict]:
    """Integer spikes: the neuron alone, a training step of a language model whose matrices read them, and a token."""
    x, most = torch.randn(16, 128, 1024).requires_grad_(), torch.full((1024,), 3.0)
    log_scale, gy = torch.zeros(1024).requires_grad_(), torch.randn(16, 128, 1024)

    def fire(backend):
        out = integer_spikes(x, log_scale, most, False, True, backend=backend)
        return torch.autograd.grad(out, (x, log_scale), gy)

    ways = {"kernel": partial(fire, "extension"), "plain torch": partial(fire, "reference")}
    agree("integer spikes", ways, 1e-4)
    rows = compare("integer spikes, forward + backward (16, 128, 1024)", ways, repeats)
    models = {name: integer_model(**settings) for name, settings in INTEGERS.items()}
    ids, ways = torch.randint(1, VOCABULARY, (16, 129)), {}
    for name, model in models.items():
        one = partial(gradients_of, model, ids[:2, :20])
        plain = inside(lambda: default_backend("reference"), one)
        agree(f"gradients, {name}", {"kernels": one, "plain torch": plain}, 1e-6)
        step = language_step(model.float().train(), ids)
        ways |= {name: step, f"{name}, plain torch": inside(lambda: default_backend("reference"), step)}
    rows += compare("training step by what matrices read, 4 x 256, 16 x 128 tokens", ways, repeats)
    with torch.inference_mode():
        ways = {name: token_reader(model.eval()) for name, model in models.items()}
        return rows + compare("one token by what matrices read, 4 x 256, streaming", ways, 3 * repeats)


INTEGERS = {
    "real numbers": {},
    "integers, shift of rows": {"matrix_spikes": "integer", "token_shift": "rows"},
    "integers, shift of channels": {"matrix_spikes": "integer", "token_shift": "channels"},
}


def integer_model(**settings) -> SpikeGPTForCausalLM:
    torch.manual_seed(0)
    return random_weights(SpikeGPTForCausalLM(config(SMALL, vocab_size=VOCABULARY, dropout=0.0, **settings)))


def gradients_of(model: SpikeGPTForCausalLM, ids: torch.Tensor) -> list[torch.Tensor]:
    """Of a language model in float64, so that no rounding flips a spike."""
    model.double().zero_grad()
    model(ids, labels=ids).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def language_step(model: SpikeGPTForCausalLM, ids: torch.Tensor) -> Callable:
    """A training step of all weights, which stay what they are."""
    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step():
        model(ids[:, :-1], labels=ids[:, :-1]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def rwkv(repeats: int) -> list[dict]:
    """transformers' RwkvModel of the same size, full training step without a head (it has no CPU kernel)."""
    ids = torch.randint(1, VOCABULARY, (SMALL["batch"], SMALL["tokens"]))
    size = {"vocab_size": VOCABULARY, "hidden_size": SMALL["n_embd"], "num_hidden_layers": SMALL["n_layer"]}
    theirs = RwkvModel(RwkvConfig(**size)).train()
    ours = random_weights(spikegpt_lora.SpikeGPTModel(config(SMALL))).train()

    def by(model):
        def run():
            model(ids).last_hidden_state.square().mean().backward()
            model.zero_grad()

        return run

    ways = {"SpikeGPT": by(ours), "transformers' Rwkv": by(theirs)}
    return compare("forward + backward of all weights, 4 x 256, batch 32 x 40", ways, repeats)


PARTS = {
    part.__name__: part
    for part in (
        kernels, lengths, step, encoder, large_step, gates, efficient, pretrain, streaming, generation, spikes, rwkv,
    )
}  # fmt: skip


# ---- what is measured


class Training:
    """A training step with adapters, of a classifier or a language model: forward, backward, clipping, AdamW.

    Two of one model and size start from the same weights and read the same batch.

    Args:
        adapter: makes a peft configuration. model: makes the model from n_layer and n_embd, and names its targets.
    """

    def __init__(self, adapter: Callable, model: Callable, n_layer: int, n_embd: int, batch: int, tokens: int):
        torch.manual_seed(0)
        length = torch.randint(tokens - tokens // 10, tokens + 1, (batch, 1))
        self.inputs = {
            "input_ids": torch.randint(1, VOCABULARY, (batch, tokens)),
            "attention_mask": (torch.arange(tokens) < length).long(),
            "labels": torch.randint(0, 2, (batch,)),
        }
        model, target = model(n_layer, n_embd)
        task = "CAUSAL_LM" if isinstance(model, SpikeGPTForCausalLM) else "SEQ_CLS"
        if task == "CAUSAL_LM":
            self.inputs["labels"] = self.inputs["input_ids"].masked_fill(self.inputs["attention_mask"] == 0, -100)
        self.weights_mib = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
        adapter = adapter(task_type=task, r=16, lora_alpha=16, target_modules=target)
        self.model = random_weights(get_peft_model(model, adapter)).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, fused=True)  # the weights stay what they are

    def backward(self, bf16: bool = False):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = self.model(**self.inputs).loss
        loss.backward()

    def step(self, bf16: bool = False):
        self.backward(bf16)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def answer(self):
        """Inference on the same batch."""
        with evaluating(self.model), torch.inference_mode():
            self.model(**self.inputs)

    def gradients(self) -> list[torch.Tensor]:
        """In float64 and without dropout, so that no rounding flips a spike (transformers' loop stays in float32)."""
        self.model.double().eval()
        self.backward()
        gradients = [p.grad for p in self.parameters]
        self.optimizer.zero_grad()
        self.model.float().train()
        return gradients


class Changed(Training):
    """A training step of fused LoRA that `change` makes cheaper."""

    def __init__(self, change: StepChange, model: Callable, size: dict):
        super().__init__(fused_lora, model, **size)
        change.begin(self.model, 0, lambda number: [self.inputs] * number)
        self.change, self.taken = change, 0

    def step(self, bf16: bool = False):
        self.change.begin_step(self.taken, 10**9)
        super().step(bf16)
        self.taken += 1


def upper_half(model: Callable, size: dict, cached: bool) -> Training:
    """Fused LoRA in the upper half of the blocks; with what stands below computed before."""
    half = size["n_layer"] // 2
    above = rf".*blocks\.({'|'.join(map(str, range(half, size['n_layer'])))})\.(att|ffn)\.(receptance|key|value)"
    training = Training(fused_lora, lambda *shape: (model(*shape)[0], above), **size)
    if cached:
        lengths = training.inputs["attention_mask"].sum(dim=1).tolist()
        texts = [ids[:length].tolist() for ids, length in zip(training.inputs["input_ids"], lengths)]
        rows = cached_trunk(training.model, Dataset.from_dict({"input_ids": texts}), half)
        counts = [torch.tensor(list(row["counts"]), dtype=torch.uint8).view(-1, size["n_embd"]) for row in rows]
        training.inputs["inputs_embeds"] = torch.nn.utils.rnn.pad_sequence(counts, batch_first=True)
        training.trunk = CachedTrunk(half)  # held: what nobody holds is closed
        training.trunk.begin(training.model)
    return training


def steps(trainings: dict[str, Training]) -> dict[str, Callable]:
    return {name: training.step for name, training in trainings.items()}


def products(function: Callable) -> Callable:
    """The floor of `function`: its matrix products alone."""
    with Recorder() as recorder:
        function()
    return recorder.replay()


def per_second(rows: list[dict], tokens: int) -> list[dict]:
    for row in rows:
        row["note"] = f"{1e3 * tokens / row['median_ms']:,.{0 if tokens > 1 else 1}f} tokens a second"
    return rows


def spikegpt(n_layer: int, n_embd: int):
    size = {"n_layer": n_layer, "n_embd": n_embd}
    model = random_weights(SpikeGPTForSequenceClassification(config(size, num_labels=2, pooling="last_mean")))
    return model, PRESETS["rkv+srffn"]


def language_spikegpt(n_layer: int, n_embd: int):
    model = random_weights(SpikeGPTForCausalLM(config({"n_layer": n_layer, "n_embd": n_embd})))
    return model, PRESETS["rkv+srffn"]


def integer_spikegpt(n_layer: int, n_embd: int):
    spikes = {"matrix_spikes": "integer", "token_shift": "rows", "num_labels": 2, "pooling": "last_mean"}
    size = {"n_layer": n_layer, "n_embd": n_embd}
    return random_weights(SpikeGPTForSequenceClassification(config(size, **spikes))), PRESETS["rkv+srffn"]


def bert(n_layer: int, n_embd: int):
    sizes = {"hidden_size": n_embd, "num_hidden_layers": n_layer, "intermediate_size": 4 * n_embd}
    model = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=n_embd // 32))
    return model, r"(.*\.)?encoder\.layer\.\d+\..*(query|key|value|dense)"


def random_weights(model):
    """The initial values are mostly 0: with them nothing would fire, and zeros are not a fair input."""
    for parameter in model.parameters():
        if parameter.dim() == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def config(size: dict, **changes) -> SpikeGPTConfig:
    sizes = {"n_layer": size["n_layer"], "n_embd": size["n_embd"], "vocab_size": VOCABULARY, "pad_token_id": 0}
    return SpikeGPTConfig(**sizes | changes)


@contextlib.contextmanager
def loops():
    """A loop over tokens in Python for WKV (transformers' Rwkv) and for LIF (spikingjelly, step by step)."""

    def wkv_loop(time_decay, time_first, k, v, state=None, mask=None):
        y, state = rwkv_linear_attention_cpu(time_decay, time_first, k, v, return_state=True)
        return y, torch.stack(state, 1)

    def lif_loop(self, x, carry=None, mask=None):
        node = neuron.LIFNode(tau=self.tau, v_threshold=self.v_threshold, surrogate_function=self.surrogate_function)
        spikes = torch.stack([node(x_t) for x_t in x.unbind(1)], 1)
        if carry is not None:
            carry[0] = node.v
        return spikes

    wkv_patch, lif_patch = patch.object(spikegpt_lora.model, "wkv", wkv_loop), patch.object(LIF, "_fire", lif_loop)
    with default_backend("reference"), wkv_patch, lif_patch:
        yield


# How else a model can be run.
LOOPS = {"plain torch and spikingjelly": lambda: default_backend("reference"), "loops over tokens": loops}


# ---- the floor of WKV


def eight_exp(k: torch.Tensor, v: torch.Tensor, gy: torch.Tensor) -> Callable:
    """The pass over memory that WKV is measured against, compiled as the kernels are."""
    compiler, flags = build.cpp_compiler()
    source, flags = Path(__file__).with_name("eight_exp.cpp"), [*flags, *build.optional_flags(compiler)]
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler, *flags, f"-I{build.sources()}", "-shared", str(source), "-o", f"{folder}/floor.so"]
        subprocess.run(command, check=True)
        function = ctypes.CDLL(f"{folder}/floor.so").eight_exp

    def run():
        results = [torch.empty_like(k) for _ in range(3)]
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (k, v, gy, *results)]
        function(*pointers, ctypes.c_long(k.numel()))
        return results

    expected = (-k.abs()).exp() + (-v.abs()).exp() + (-gy.abs()).exp()
    if not torch.allclose(run()[0], expected, rtol=1e-5):
        raise Disagreement("the pass with 8 exp does not compute exp")
    return run


# ---- where it is measured


CPU = torch.device("cpu")


def bf16_pays() -> bool:
    """Whether the processor multiplies bfloat16; elsewhere a step in it takes a multiple of one in float32."""
    return processor(CPU).auto == "bfloat16"


def conditions() -> dict:
    packages = ("spikegpt_lora", "torch", "transformers", "peft", "spikingjelly")
    versions = {package: importlib.metadata.version(package) for package in packages}
    compiler = subprocess.run([*build.cpp_compiler()[0], "--version"], capture_output=True, text=True).stdout
    versions["compiler"] = compiler.splitlines()[0]
    kind, name = processor(CPU).name, processor_name()
    return {"kind": kind, "processor": name, "threads": torch.get_num_threads(), "versions": versions}


def sentence(run: dict) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
    return f"{run['kind']} ({run['processor']}), {run['threads']} threads; {versions}"


if __name__ == "__main__":
    sys.exit(command_line.run(main))
