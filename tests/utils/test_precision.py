"""Which precision is taken: by processor as the table says, as asked, or as the folder was begun; and what is said."""

import pytest
import torch

from spikegpt_lora.utils.precision import CPUS, TABLE, cpu_flags, resolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
INTEL = {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile"}


@pytest.mark.parametrize(
    "flags, name, precision",
    [
        (INTEL, "AMX", "bfloat16"),
        (INTEL - {"amx_bf16", "amx_tile"}, "AVX-512 with avx512_bf16", "bfloat16"),
        ({"avx2", "avx512f"}, "AVX-512 without avx512_bf16", "float32"),
        ({"avx2", "fma"}, "AVX2", "float32"),
        (set(), "another CPU", "float32"),
    ],
)
def test_a_cpu_gets_the_precision_of_what_it_has(cpu, flags, name, precision):
    cpu(*flags)
    assert str(resolve("auto", CPU)).startswith(f"precision: {precision} ({name}: ")


@pytest.mark.parametrize(
    "capability, hip, precision",
    [((9, 0), None, "bfloat16"), ((8, 0), None, "bfloat16"), ((7, 5), None, "float32"), ((9, 0), "6.2", "float32")],
)
def test_a_gpu_gets_bfloat16_from_compute_capability_8_on(monkeypatch, capability, hip, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert (
        str(resolve("auto", CUDA)).startswith(f"precision: {precision} (")
        and "not measured" in resolve("auto", CUDA).why
    )


def test_another_device_gets_float32():
    assert not resolve("auto", torch.device("meta")).bf16


@pytest.mark.parametrize("row", [row for row in TABLE if row.float32_ms], ids=lambda row: row.name)
def test_where_both_were_measured_the_faster_one_is_taken(row):
    assert row.auto == ("bfloat16" if row.bfloat16_ms < row.float32_ms else "float32")


def test_what_has_no_bfloat16_products_and_no_figures_takes_float32():
    assert [row.auto for row in CPUS if row.float32_ms is None] == ["float32", "float32"]


@pytest.mark.parametrize(
    "flags, asked, begun, line",
    [
        ("amx_bf16", "auto", None, "precision: bfloat16 (AMX: 1.35 times as fast as float32)"),
        ("avx2", "auto", None, "precision: float32 (AVX2: bfloat16 would take 38.8 times as long)"),
        ("avx2", "bfloat16", None, "precision: bfloat16 (as asked; AVX2: 38.8 times as long as float32)"),
        ("amx_bf16", "float32", None, "precision: float32 (as asked; AMX: bfloat16 would be 1.35 times as fast)"),
        (
            "amx_bf16",
            "auto",
            False,
            "precision: float32 (as the folder was begun; AMX: bfloat16 would be 1.35 times as",
        ),
        ("avx2", "auto", True, "precision: bfloat16 (as the folder was begun; AVX2: 38.8 times as long as float32)"),
        ("avx2", "float32", True, "precision: float32 (as asked; AVX2: bfloat16 would take 38.8 times as long)"),
        (
            "avx512f",
            "bfloat16",
            None,
            "precision: bfloat16 (as asked; AVX-512 without avx512_bf16: what bfloat16 gains",
        ),
    ],
)
def test_the_line_says_what_is_taken_and_why(cpu, flags, asked, begun, line):
    cpu(flags)
    assert str(resolve(asked, CPU, begun)).startswith(line)


X86 = "processor\t: 0\nflags\t\t: fpu avx2 amx_bf16\nbugs\t\t:\n\nprocessor\t: 1\nflags\t\t: fpu avx2 amx_bf16\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16\n"


@pytest.mark.parametrize("text, flags", [(X86, {"fpu", "avx2", "amx_bf16"}), (ARM, set()), ("", set())])
def test_flags_are_those_of_the_first_processor(tmp_path, text, flags):
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_flags(tmp_path / "cpuinfo") == flags


def test_a_system_without_that_file_has_no_flags(tmp_path):
    assert cpu_flags(tmp_path / "cpuinfo") == set()
