"""The CPU kernels of all ops in other processes: each build, and more threads than cores."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_kernels._library import OPS

CAPABLE = {"AVX2": ["avx2"], "AVX512": ["avx2", "avx512"]}
# What has checks of builds: the ops, and what computes several at once.
CHECKED = {*OPS, "adapter_apart", "multi_lora_prepared", "prefix_lengths"}
PASSED = re.compile(r"^PASSED \S*test_(\w+)\.py::", re.MULTILINE)


def python(*arguments, **environment):
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def check_ops(**environment):
    """Runs the checks of any shape, each op's, in a process with another environment."""
    done = python("-m", "pytest", str(Path(__file__).parent), "-rp", "-m", "builds", **environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert set(PASSED.findall(done.stdout)) == CHECKED


@pytest.mark.long
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_build(isa):
    if isa not in ["baseline", *CAPABLE.get(torch.backends.cpu.get_cpu_capability(), [])]:
        pytest.skip(f"this processor has no {isa}")
    info = "import torch, peft_kernels; print(torch.ops.peft_kernels.native_info())"
    assert python("-c", info, PEFT_KERNELS_ISA=isa).stdout.startswith(f"{isa} kernels")
    check_ops(PEFT_KERNELS_ISA=isa)


def test_more_threads_than_cores():
    check_ops(OMP_NUM_THREADS="3")


def test_an_unknown_build_is_an_error():
    call = "from peft_kernels.ops.lora_linear import *; lora_linear(**example_inputs(1, 2, 3, 1))"
    command = [sys.executable, "-c", call]
    environment = os.environ | {"PEFT_KERNELS_ISA": "sse9"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "PEFT_KERNELS_ISA must be baseline, avx2 or avx512; got sse9" in done.stderr
