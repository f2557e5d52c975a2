"""A mutation fuzzer for every file that the package reads: `python tests/fuzz.py TARGET SEED COUNT`.

Each mutant is a right file spoilt at a place and in a way drawn at random: bytes, JSON values, arrays, headers.
Whatever it is, reading it must end in a result that is as right as the file, or in one sentence (`errors.sentence`). A
line of JSON on stdout says of each mutant how it ended; whoever started this watches how long a line takes to come.
"""

import io
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from transformers.utils import logging as transformers_logging

from spikegpt_lora import (
    SpikeGPTConfig,
    SpikeGPTForCausalLM,
    SpikeGPTForSequenceClassification,
    SpikeLoraConfig,
    SpikeTrace,
    load_upstream_checkpoint,
    record_spikes,
    save_upstream_checkpoint,
)
from spikegpt_lora.checkpoint import load_adapter, load_model
from spikegpt_lora.utils import errors

DANGEROUS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "os.remove"}
NASTY = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**12, 10**30, 0.5, -0.0, 1e38, 1e308, float("nan"), float("inf"),
    "", "x", "__class__", "os.system", "../../../etc/passwd", "\u0000", [], {}, [[]], [0], [-1, -1], {"": {}},
    [10**9] * 3,
]  # fmt: skip
DEEP = "stands for a value that is nested 99,999 deep"
PAYLOAD = b"cos\nsystem\n(S'echo executed'\ntR."  # a pickle that runs a command


def spoil_bytes(data: bytes, draw: random.Random) -> bytes:
    data, at = bytearray(data), draw.randrange(max(1, len(data)))
    length = draw.choice([1, 1, 2, 8, 64, 1024])
    match draw.randrange(8):
        case 0:
            data[at : at + 1] = bytes([(data[at] if data else 0) ^ 1 << draw.randrange(8)])
        case 1:
            del data[at:]
        case 2:
            del data[at : at + length]
        case 3:
            data[at:at] = draw.randbytes(length)
        case 4:
            data[at : at + length] = bytes(length)
        case 5:
            data[at : at + length] = b"\xff" * length
        case 6:
            data[at : at + 8] = struct.pack("<Q", draw.choice([0, 1, 2**31, 2**40, 2**63, 2**64 - 1]))
        case 7:
            data[:length] = PAYLOAD
    return bytes(data)


def spoil_json(content, draw: random.Random):
    """`content` with one value somewhere in it replaced, removed, doubled or buried."""
    if isinstance(content, dict | list) and content and draw.random() < 0.8:
        key = draw.choice(list(content)) if isinstance(content, dict) else draw.randrange(len(content))
        match draw.randrange(6):
            case 0:
                del content[key]
            case 1 if isinstance(content, dict):
                content[draw.choice(["", "x", "auto_map", "op", "type", str(key) + "_"])] = content[key]
            case 2 if isinstance(content, list):
                content.append(content[key])
            case _:
                content[key] = spoil_json(content[key], draw)
        return content
    return DEEP if draw.random() < 0.03 else draw.choice(NASTY)


def spoilt_json(data: bytes, draw: random.Random) -> bytes:
    return json.dumps(spoil_json(json.loads(data), draw)).replace(f'"{DEEP}"', "[" * 99999 + "]" * 99999).encode()


def spoil_json_file(data: bytes, draw: random.Random) -> bytes:
    return spoil_bytes(data, draw) if draw.random() < 0.2 else spoilt_json(data, draw)


def spoil_safetensors(data: bytes, draw: random.Random) -> bytes:
    """Half of the mutants have a header that is JSON of the right length, and lies."""
    if draw.random() < 0.5:
        return spoil_bytes(data, draw)
    (length,) = struct.unpack("<Q", data[:8])
    header = spoilt_json(data[8 : 8 + length], draw)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def spoil_array(array: np.ndarray, draw: random.Random) -> np.ndarray:
    match draw.randrange(7):
        case 0:
            numbers = [] if array.dtype.kind == "U" else [np.int8, np.int64, np.float16, np.float64, np.complex64, bool]
            return array.astype(draw.choice([*numbers, object, "U"]))
        case 1:
            return array[..., :0] if array.ndim else array
        case 2:
            return array.reshape(-1)
        case 3:
            return array[None]
        case 4 if array.size and array.dtype.kind in "fiu":
            spoilt = array.copy()
            value = draw.choice(
                [np.nan, np.inf, -np.inf, -1, 2**31 - 1] if array.dtype.kind == "f" else [-1, 0, 1, 127]
            )
            spoilt.reshape(-1)[draw.randrange(array.size)] = np.asarray(value).astype(array.dtype)
            return spoilt
        case 5:
            return np.broadcast_to(np.zeros((), array.dtype), (2, *array.shape)).copy()
        case _:
            return np.array(draw.choice(["", 0, -1, np.nan]))


def spoil_zip(data: bytes, draw: random.Random) -> bytes:
    """One member of a .npz or .pth: its array, its bytes, its name, or a header that promises 40 GB of zeros."""
    if draw.random() < 0.3:
        return spoil_bytes(data, draw)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = draw.choice(sorted(members))
    kind = draw.randrange(6)
    if kind < 3 and name.endswith(".npy"):
        array = spoil_array(np.load(io.BytesIO(members[name]), allow_pickle=False), draw)
        np.save(file := io.BytesIO(), array, allow_pickle=True)
        members[name] = file.getvalue()
    elif kind == 3:
        members[draw.choice(["x.npy", "../x.npy", name + "_"])] = members.pop(name)
    elif kind == 4 and name.endswith(".npy"):
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000,), }".ljust(117) + b"\n"
        members[name] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(1 << 16)
    else:
        members[name] = spoil_bytes(members[name], draw)
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return file.getvalue()


def small_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 40, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 5, [1] * 4 + [0], [1] + [0] * 4])
    return {"input_ids": ids, "attention_mask": mask}


def lively(model, names=""):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if names in name:
                p.add_(torch.randn(p.shape, generator=generator))
    return model.eval()


CONFIG = {"vocab_size": 40, "n_embd": 8, "n_layer": 1}


def make_model(folder: Path) -> None:
    lively(SpikeGPTForSequenceClassification(SpikeGPTConfig(**CONFIG, num_labels=2))).save_pretrained(folder)


def read_model(folder: Path) -> None:
    model = load_model(SpikeGPTForSequenceClassification, folder)
    run_finite(model, small_batch())


def make_upstream(folder: Path) -> None:
    folder.mkdir()
    save_upstream_checkpoint(lively(SpikeGPTForCausalLM(SpikeGPTConfig(**CONFIG))), folder / "model.pth")


def read_upstream(folder: Path) -> None:
    run_finite(load_upstream_checkpoint(folder / "model.pth"), {"input_ids": torch.tensor([[1]])})


def make_trace(folder: Path) -> None:
    folder.mkdir()
    model = lively(SpikeGPTForCausalLM(SpikeGPTConfig(**CONFIG)))
    record_spikes(model, small_batch(), currents=True).save(folder / "trace.npz")


def read_trace(folder: Path) -> None:
    trace = SpikeTrace.load(folder / "trace.npz")
    for name in trace.spikes:
        trace.firing_rate(name), trace.sparsity(name), trace.dead(name), trace.saturated(name)


def make_adapter(folder: Path) -> None:
    make_model(folder / "base")
    model = SpikeGPTForSequenceClassification.from_pretrained(folder / "base")
    model = lively(get_peft_model(model, SpikeLoraConfig(task_type="SEQ_CLS", r=2)), "lora_")
    model.save_pretrained(folder / "adapter")


def read_adapter(folder: Path) -> None:
    model = load_model(SpikeGPTForSequenceClassification, folder / "base")
    run_finite(load_adapter(model, folder / "adapter"), small_batch())


def run_finite(model, batch: dict[str, torch.Tensor]) -> None:
    """A model that was read without a word runs, and its weights are numbers (large ones may overflow, which shows)."""
    model.eval()(**batch)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise AssertionError("read without a word, and a weight is not finite")


# Of each target: what writes a right folder, what reads it, and the files in it that are spoilt, with how.
TARGETS: dict[str, tuple[Callable, Callable, dict[str, Callable]]] = {
    "weights": (make_model, read_model, {"model.safetensors": spoil_safetensors}),
    "config": (make_model, read_model, {"config.json": spoil_json_file}),
    "upstream": (make_upstream, read_upstream, {"model.pth": spoil_zip}),
    "trace": (make_trace, read_trace, {"trace.npz": spoil_zip}),
    "adapter": (
        make_adapter,
        read_adapter,
        {"adapter/adapter_config.json": spoil_json_file, "adapter/adapter_model.safetensors": spoil_safetensors},
    ),
}


def main(target: str, seed: int, count: int) -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    make, read, files = TARGETS[target]
    seen: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        right, spoilt = Path(temporary) / "right", Path(temporary) / "spoilt"
        make(right)
        read(right)  # so that what is imported late is there
        sys.addaudithook(lambda event, args: seen.append(event) if event in DANGEROUS and seen is not None else None)
        for number in range(count):
            draw = random.Random(f"{target} {seed} {number}")
            shutil.copytree(right, spoilt)
            name = draw.choice(sorted(files))
            (spoilt / name).write_bytes(files[name]((right / name).read_bytes(), draw))
            seen.clear()
            print(json.dumps({"number": number, "file": name} | outcome(read, spoilt, seen)), flush=True)
            shutil.rmtree(spoilt)


def outcome(read: Callable, folder: Path, seen: list[str]) -> dict:
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read(folder)
        ended, text = "read", ""
    except Exception as error:
        text = errors.sentence(error)
        ended = "traceback" if text is None else "sentence"
        text = f"{type(error).__name__}: {error}" if text is None else text
    return {
        "ended": ended,
        "text": text[:300],
        "seconds": round(time.perf_counter() - started, 2),
        "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024,
        "dangerous": [event for event in seen if event != "os.remove"],
    }


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
