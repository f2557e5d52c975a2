"""How fast the kernels, a training step and streaming are here, each against what it could be.

    python recipes/bench.py                          everything, about three minutes on two CPU cores
    python recipes/bench.py --parts kernels lengths  some of it

Everything compared is timed in one process, in turns, and only after its results have been found equal; where they are
not, the program stops without a time. It leaves bench.md and bench.csv in --output-dir: median, quartiles, and the
ratio to each group's first row.

Floors: `8 exp` is one pass over memory that reads k, v, gy, writes y, gk, gv and takes 8 exponentials an element (the
kernels' own exp, same flags, same threads); `matrix products` are those that the step makes, recorded and made again on
inputs of the same shapes and strides, nothing else.
"""

import argparse
import contextlib
import csv
import ctypes
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
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
from spikegpt_lora.adapters.config import PRESETS
from spikegpt_lora.forward import evaluating
from spikegpt_lora.neurons.lif import LIF
from spikegpt_lora.ops import build
from spikegpt_lora.ops.backend import default_backend, load
from spikegpt_lora.utils import command_line
from spikegpt_lora.utils.files import whole_file, write_text
from spikegpt_lora.utils.timing import Disagreement, Recorder, agree, compare, inside, peak_memory, table

SMALL = {"n_layer": 4, "n_embd": 256, "batch": 32, "tokens": 40}
LARGE = {"n_layer": 18, "n_embd": 768, "batch": 8, "tokens": 40}  # SpikeGPT-216M
MINILM = {"n_layer": 6, "n_embd": 384, "batch": 32, "tokens": 40}  # all-MiniLM-L6-v2
PARTS = ("kernels", "lengths", "step", "gates", "large_step", "streaming", "generation", "rwkv")
GATES = {
    "LoRA": LoraConfig,
    "SpikeLoRA": SpikeLoraConfig,
    "SpikeLoRA, binary": partial(SpikeLoraConfig, spikelora_gate="binary"),
    "SpikeLoRA, token time": partial(SpikeLoraConfig, spikelora_time="token"),
    "SpikeLoRA, learned": partial(SpikeLoraConfig, spikelora_learn="both"),
    "SpikeLoRA, token time, learned": partial(SpikeLoraConfig, spikelora_time="token", spikelora_learn="both"),
}


def main() -> int:
    args = parse_arguments()
    command_line.set_up()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    load("cpu")
    rows = []
    try:
        for part in args.parts:
            rows += globals()[part](args.repeats)
    except Disagreement as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    text = f"{conditions()}\n\n{table(rows)}"
    print(text)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(args.output_dir / "bench.md", text + "\n")
    with whole_file(args.output_dir / "bench.csv") as path, open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["group", "what", "median_ms", "quartile1_ms", "quartile3_ms", "ratio", "note"])
        writer.writeheader()
        writer.writerows(rows)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = command_line.parser(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which comparisons (default: all)")
    add("--repeats", type=command_line.positive, default=15, help="rounds of each comparison")
    add("--threads", type=command_line.positive, help="of torch (default: its own choice)")
    add("--output-dir", type=Path, default=Path("runs/bench"), help="the table and the CSV go here")
    return parser.parse_args()


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
        "extension": wkv_by(lambda *x: wkv(*x, backend="extension")),
        "reference (plain torch)": wkv_by(lambda *x: wkv(*x, backend="reference")),
        "loop over tokens (transformers' Rwkv)": wkv_by(rwkv_linear_attention_cpu),
    }
    agree("wkv", ways, 1e-3)
    rows = compare("wkv forward + backward (32, 64, 512)", {"8 exp": eight_exp(k, v, gy), **ways}, repeats)

    x, lif = torch.randn(B, T, C).requires_grad_(), LIF()
    node = neuron.LIFNode(tau=2.0, surrogate_function=lif.surrogate_function, step_mode="m")

    def spikingjelly(current):
        functional.reset_net(node)
        return node(current.transpose(0, 1).contiguous()).transpose(0, 1)

    ways = {
        "extension": lambda: torch.autograd.grad(lif(x), x, gy),
        "spikingjelly": lambda: torch.autograd.grad(spikingjelly(x), x, gy),
    }
    agree("lif", ways, 1e-5)
    rows += compare("LIF forward + backward (32, 64, 512)", ways, repeats)
    mask = torch.arange(T) < torch.randint(T // 2, T + 1, (B, 1))

    def masked():
        return torch.autograd.grad(lif.step(x, None, mask)[0], x, gy)

    ways = {"extension": masked, "spikingjelly": inside(spikingjelly_lif, masked)}
    agree("masked lif", ways, 1e-5)
    return rows + compare("LIF with padding, forward + backward (32, 64, 512)", ways, repeats)


def lengths(repeats: int) -> list[dict]:
    """WKV forward and backward against T and C: time and memory per token and channel."""
    rows = []
    for name, shapes in (
        ("wkv against T (4, T, 512)", [(4, T, 512) for T in (64, 256, 1024, 4096, 8192)]),
        ("wkv against C (8, 64, C)", [(8, 64, C) for C in (64, 100, 256, 1000, 2048)]),
    ):
        ways, sizes = {}, {}
        for B, T, C in shapes:
            leaves = [torch.randn(C), torch.randn(C), torch.randn(B, T, C), torch.randn(B, T, C)]
            leaves = [x.requires_grad_() for x in leaves]
            gy = torch.randn(B, T, C)
            label = f"T = {T}" if "against T" in name else f"C = {C}"
            ways[label] = lambda leaves=leaves, gy=gy: torch.autograd.grad(
                wkv(*leaves, backend="extension")[0], leaves, gy
            )
            sizes[label] = B * T * C
        group = compare(name, ways, repeats)
        for row in group:
            memory = peak_memory(ways[row["what"]]) / sizes[row["what"]]
            row["note"] = f"{1e6 * row['median_ms'] / sizes[row['what']]:.2f} ns and {memory:.0f} bytes an element"
        rows += group
    return rows


def step(repeats: int) -> list[dict]:
    """One LoRA and one SpikeLoRA training step of a 4-layer, 256-wide model."""
    rows = []
    for adapter in (LoraConfig, SpikeLoraConfig):
        training = Training(adapter, spikegpt, **SMALL)
        training.check_gradients(WAYS)
        ways = {"matrix products": training.floor()}
        ways |= {name: inside(context, training.step) for name, context in WAYS.items()}
        ways["matrix products, bf16"] = training.floor(bf16=True)
        ways["extension, bf16"] = lambda training=training: training.step(bf16=True)
        rows += compare(f"{adapter.__name__} step, 4 x 256, batch 32 x 40", ways, repeats)
    return rows


def gates(repeats: int) -> list[dict]:
    """A training step and an answer with each kind of gate, on a SpikeGPT and an encoder of all-MiniLM-L6-v2's size.

    Only LoRA can be merged into W0, which is what "no inference overhead" means.
    """
    rows = []
    for name, model, size in (("4 x 256", spikegpt, SMALL), ("MiniLM, 6 x 384", bert, MINILM)):
        trainings = {gate: Training(adapter, model, **size) for gate, adapter in GATES.items()}
        ways = {gate: training.step for gate, training in trainings.items()}
        rows += compare(f"step by gate, {name}, batch 32 x 40", ways, repeats)
        merged = Training(LoraConfig, model, **size)
        merged.model.merge_adapter()
        answers = {"LoRA, merged": merged.answer} | {gate: training.answer for gate, training in trainings.items()}
        rows += compare(f"inference by gate, {name}, batch 32 x 40", answers, repeats)
    return rows


def large_step(repeats: int) -> list[dict]:
    """One LoRA training step of the 216M model's shape, and its memory."""
    training = Training(LoraConfig, spikegpt, **LARGE)
    ways = {"extension": WAYS["extension"], "loops over tokens": WAYS["loops over tokens"]}
    training.check_gradients(ways)
    timed = {"matrix products": training.floor()}
    timed |= {name: inside(context, training.step) for name, context in ways.items()}
    rows = compare("LoraConfig step, 216M, batch 8 x 40", timed, max(repeats // 3, 3))
    memory = peak_memory(training.step) / 2**20
    rows[1]["note"] = f"{memory:.0f} MiB above {training.weights_mib:.0f} MiB of weights"
    return rows


def streaming(repeats: int) -> list[dict]:
    """One token of the 216M model, its state carried along."""
    model = random_weights(SpikeGPTForCausalLM(config(LARGE, vocab_size=50277))).eval()
    with torch.inference_mode():
        state = model(torch.tensor([[1, 2, 3]]), use_cache=True).state
        token = torch.tensor([[4]])

        def read():
            return model(token, state=state, use_cache=True).logits

        with default_backend("reference"):
            expected = read()
        if not torch.allclose(read(), expected, rtol=1e-3, atol=1e-3):
            raise Disagreement("streaming: extension and reference give different logits")
        with default_backend("reference"), Recorder() as recorder:  # torch's own products: the kernels make others
            read()
        ways = {
            "matrix-vector products": recorder.replay(),
            "extension": read,
            "reference (plain torch)": inside(lambda: default_backend("reference"), read),
        }
        rows = compare("one token, 216M, streaming", ways, 3 * repeats)
    for row in rows:
        row["note"] = f"{1e3 / row['median_ms']:.1f} tokens a second"
    return rows


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


def rwkv(repeats: int) -> list[dict]:
    """transformers' RwkvModel of the same size, full training step without a head (it has no CPU kernel)."""
    ids = torch.randint(1, 8192, (SMALL["batch"], SMALL["tokens"]))
    size = {"vocab_size": 8192, "hidden_size": SMALL["n_embd"], "num_hidden_layers": SMALL["n_layer"]}
    theirs = RwkvModel(RwkvConfig(**size)).train()
    ours = random_weights(spikegpt_lora.SpikeGPTModel(config(SMALL))).train()

    def by(model):
        def run():
            model(ids).last_hidden_state.square().mean().backward()
            model.zero_grad()

        return run

    return compare("forward + backward, 4 x 256, batch 32 x 40", {"SpikeGPT": by(ours), "Rwkv": by(theirs)}, repeats)


# ---- what is measured


class Training:
    """A training step of a classifier with adapters: forward, backward, clipping, AdamW.

    Args:
        adapter: makes a peft configuration. model: makes the classifier from n_layer and n_embd, and names its targets.
    """

    def __init__(self, adapter: Callable, model: Callable, n_layer: int, n_embd: int, batch: int, tokens: int):
        model, target = model(n_layer, n_embd)
        self.weights_mib = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
        adapter = adapter(task_type="SEQ_CLS", r=16, lora_alpha=16, target_modules=target)
        self.model = random_weights(get_peft_model(model, adapter)).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, fused=True)  # the weights stay what they are
        length = torch.randint(tokens - tokens // 10, tokens + 1, (batch, 1))
        self.inputs = {
            "input_ids": torch.randint(1, 8192, (batch, tokens)),
            "attention_mask": (torch.arange(tokens) < length).long(),
            "labels": torch.randint(0, 2, (batch,)),
        }

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

    def floor(self, bf16: bool = False) -> Callable:
        with Recorder() as recorder:
            self.step(bf16)
        return recorder.replay()

    def check_gradients(self, ways: dict[str, Callable]):
        """One gradient whichever way; in float64 and without dropout, so that no rounding flips a spike.

        (transformers' loop computes WKV in float32 even then.)
        """
        self.model.double().eval()
        agree("gradients of a step", {name: inside(context, self._gradients) for name, context in ways.items()}, 1e-6)
        self.model.float().train()

    def _gradients(self) -> list[torch.Tensor]:
        self.backward()
        gradients = [p.grad for p in self.parameters]
        self.optimizer.zero_grad()
        return gradients


def spikegpt(n_layer: int, n_embd: int):
    size = {"n_layer": n_layer, "n_embd": n_embd}
    model = random_weights(SpikeGPTForSequenceClassification(config(size, num_labels=2, pooling="last_mean")))
    return model, PRESETS["rkv+srffn"]


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
    sizes = {"n_layer": size["n_layer"], "n_embd": size["n_embd"], "vocab_size": 8192, "pad_token_id": 0}
    return SpikeGPTConfig(**sizes | changes)


# ---- the ways to run a model


@contextlib.contextmanager
def patched(target, name: str, value):
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)


def spikingjelly_lif():
    return patched(LIF, "_has_kernel", lambda self: False)


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

    with (
        default_backend("reference"),
        patched(spikegpt_lora.model, "wkv", wkv_loop),
        patched(LIF, "_fire", lif_loop),
    ):
        yield


WAYS = {
    "extension": contextlib.nullcontext,
    "extension, LIF by spikingjelly": spikingjelly_lif,
    "reference (plain torch)": lambda: default_backend("reference"),
    "loops over tokens": loops,
}


# ---- the floor of WKV


EIGHT_EXP = """
#include "arithmetic.h"
extern "C" void eight_exp(const float* k, const float* v, const float* g, float* y, float* gk, float* gv, long count) {
  using spikegpt::exp_nonpositive;
#pragma omp parallel for
  for (long start = 0; start < count; start += 64) {
    const float *a = k + start, *b = v + start, *c = g + start;
    float *x = y + start, *p = gk + start, *q = gv + start;
    FOR_LANES(i, 64) {
      const float l = -std::fabs(a[i]), m = -std::fabs(b[i]), n = -std::fabs(c[i]);
      x[i] = exp_nonpositive(l) + exp_nonpositive(m) + exp_nonpositive(n);
      p[i] = exp_nonpositive(l + m) + exp_nonpositive(m + n) + exp_nonpositive(n + l);
      q[i] = exp_nonpositive(l + m + n) + exp_nonpositive(l + l);
    }
  }
}
"""


def compiler_and_flags() -> tuple[list[str], list[str]]:
    """What the kernels are compiled with."""
    compiler, flags = build.cpp_compiler()
    return compiler, [*flags, *build.optional_flags(compiler)]


def eight_exp(k: torch.Tensor, v: torch.Tensor, gy: torch.Tensor) -> Callable:
    """The pass over memory that WKV is measured against, compiled as the kernels are."""
    compiler, flags = compiler_and_flags()
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler, *flags, f"-I{build.sources()}", "-shared", "-x", "c++", "-", "-o", f"{folder}/floor.so"]
        subprocess.run(command, input=EIGHT_EXP, text=True, check=True)
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


# ---- the report


def conditions() -> str:
    compiler, flags = compiler_and_flags()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    return (
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}; {version} {' '.join(flags)}"
    )


if __name__ == "__main__":
    sys.exit(command_line.run(main))
