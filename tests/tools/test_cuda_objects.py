"""nvcc's machine code of the CUDA kernels: no spills for any architecture, and its table."""

from dataclasses import replace

import pytest
from rich.console import Console

from peft_kernels.tools.report import cuda_objects

# cuobjdump's output, cut down.
OUTPUT = """
Fatbin elf code:
================
arch = sm_90
Resource usage:
 Function _ZN12peft_kernels4cuda17multi_lora_decodeILb1ELb0ELi16E13__nv_bfloat16S2_EEvNS0_6ParamsIT:
  REG:165 STACK:8 SHARED:1024 LOCAL:4 CONSTANT[0]:680 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN12peft_kernels4cuda17multi_lora_decodeILb0ELb1ELi4E6__halffEEvNS0_6ParamsIT2_T3_EE:
  REG:80 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:680 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


@pytest.fixture(scope="module")
def rows():
    if reason := cuda_objects.why_none():
        pytest.skip(reason)
    return cuda_objects.rows()


def test_no_spills(rows):
    assert [row for row in rows if not row.within_budget()] == []


def test_every_kernel_for_every_architecture(rows):
    kernels = {row.kernel for row in rows}
    architectures = {row.architecture for row in rows}
    assert {"sm_80", "sm_90"} <= architectures
    assert "multi_lora_decode<true, true, 16, bfloat16, float>" in kernels
    assert {"prompt_lookup_fwd<8, bfloat16, float>", "prompt_lookup_bwd<8, bfloat16>"} <= kernels
    assert len(rows) == len(kernels) * len(architectures)


def test_reads_what_cuobjdump_prints():
    first, second = cuda_objects.parse(OUTPUT)
    assert first.kernel == "multi_lora_decode<false, true, 4, half, float>"
    assert (first.architecture, first.registers, first.spills, first.shared) == ("sm_90", 80, 0, 0)
    assert second.kernel == "multi_lora_decode<true, false, 16, bfloat16, bfloat16>"
    assert (second.registers, second.spills, second.shared) == (165, 12, 1024)
    assert first.within_budget() and not second.within_budget()


def printed(rows):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(cuda_objects.table(rows))
    return capture.get()


def test_table():
    rows = cuda_objects.parse(OUTPUT)
    text = printed([*rows, replace(rows[0], architecture="sm_120", registers=77)])
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if "│" in line}
    assert "80" in lines[rows[0].kernel] and "77" in lines[rows[0].kernel]
    assert "ok" in lines[rows[0].kernel]
    assert "165 (12)" in lines[rows[1].kernel] and "OUTSIDE" in lines[rows[1].kernel]


def test_empty_table_says_why(monkeypatch):
    monkeypatch.setattr(cuda_objects, "why_none", lambda: "no nvcc")
    assert "no nvcc" in printed([])
