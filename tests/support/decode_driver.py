"""The decode plan's device code, run on the CPU: compiles csrc/simt and calls it by ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peft_kernels.ops.multi_lora_linear import PAGE, LoRABank, example_inputs

CSRC = Path(__file__).parents[2] / "csrc"
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
GRID_WAIT = -1  # as the line of a barrier to leave out
MAX_BANKS = 4
NAMES = ("x", "weight", "bias", "y", "s", "ids")
BANK_NAMES = ("a", "b", "table", "ranks", "scales")

_Traffic = ctypes.c_int64 * 4


def _int64(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names]


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names]


class _Bank(ctypes.Structure):
    _fields_ = [*_pointers(*BANK_NAMES), *_int64("rows", "width", "max_pages")]


class _Call(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("adapter_dtype", ctypes.c_int32),
        *_pointers(*NAMES),
        *_int64("m", "n", "k", "x_stride", "id_count", "slots", "has_base", "bank_count"),
        ("banks", _Bank * MAX_BANKS),
        *_int64("blocks", "shared_limit", "seed", "left_out"),
        ("traffic", _Traffic * (len(NAMES) + len(BANK_NAMES) * MAX_BANKS)),
        ("error", ctypes.c_char * 512),
    ]


@dataclass(frozen=True)
class Traffic:
    """Bytes of one buffer that the kernel loaded and stored: all, and the different ones."""

    loaded: int
    distinct_loaded: int
    stored: int
    distinct_stored: int


class DecodeError(RuntimeError):
    """What the emulation found: a deadlock, or an access that a GPU would fault on."""


def _compile(source: Path, output: Path, *flags: str) -> Path:
    command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += ["-Wno-missing-field-initializers", "-shared", "-fPIC", "-x", "c++", str(source)]
    subprocess.run([*command, "-x", "none", *flags, "-o", str(output)], check=True)
    return output


def compile_driver(output: Path, *flags: str, op: str = "multi_lora_linear") -> Path:
    return _compile(CSRC / "simt" / f"{op}.cpp", output, *flags)


def compile_ops(output: Path, *flags: str, op: str = "multi_lora_linear") -> Path:
    """The ops themselves, for tensors of the CPU."""
    torch_folder = Path(torch.__file__).parent
    headers = (f"-I{CSRC / 'simt'}", "-isystem", str(torch_folder / "include"))
    libraries = (f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10")
    target = "-DTORCH_TARGET_VERSION=0x020d000000000000"
    source = CSRC / "cuda" / f"{op}.cu"
    return _compile(source, output, target, *headers, *libraries, *flags)


def sanitizer_environment() -> dict[str, str]:
    """What a Python needs to load code that was compiled with ``SANITIZE``."""
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    leaks = "detect_leaks=0"  # the interpreter's own
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": leaks}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@functools.cache
def _driver() -> str:
    """The compiled driver: the one that ``PEFT_KERNELS_SIMT`` names, or a new one."""
    if path := os.environ.get("PEFT_KERNELS_SIMT"):
        return path
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return str(compile_driver(Path(_folder().name, "driver.so"), "-O2"))


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(_driver())


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def decode(
    *,
    x: Tensor,
    banks: Sequence[LoRABank],
    ids: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    y: Tensor | None = None,
    blocks: int = 3,
    shared_limit: int = 99 << 10,
    seed: int = 0,
    left_out: int = 0,
) -> tuple[Tensor, Tensor, dict[str, Traffic]]:
    """(y, S, traffic by buffer, a bank's as ``a0``) of one launch; y is added to if it is given.

    Args:
        blocks: of the grid.
        shared_limit: bytes of shared memory that a block may have.
        seed: of the schedule.
        left_out: the line of a ``__syncthreads()`` that isn't executed, or GRID_WAIT.
    """
    (m, k), n = x.shape, sum(bank.b.shape[1] for bank in banks)
    call = _Call(dtype=DTYPE_CODES[x.dtype], adapter_dtype=DTYPE_CODES[banks[0].a.dtype])
    call.has_base = y is None
    if y is None:
        y = x.new_full((m, n), torch.nan)
    s = torch.full((m, PAGE * sum(bank.table.shape[1] for bank in banks)), torch.nan)
    ids = ids.contiguous()
    for name, tensor in zip(NAMES, (x, weight, bias, y, s, ids), strict=True):
        setattr(call, name, _address(tensor))
    call.m, call.n, call.k, call.x_stride = m, n, k, x.stride(0)
    call.id_count, call.slots, call.bank_count = ids.numel(), len(banks[0].ranks), len(banks)
    for into, bank in zip(call.banks, banks, strict=False):
        for name, tensor in zip(BANK_NAMES, bank, strict=True):
            setattr(into, name, tensor.data_ptr())
        into.rows, into.width, into.max_pages = *bank.b.shape, bank.table.shape[1]
    call.blocks, call.shared_limit, call.seed, call.left_out = blocks, shared_limit, seed, left_out
    if _library().multi_lora_decode_simt(ctypes.byref(call)):
        raise DecodeError(call.error.decode())
    names = [*NAMES, *(name + str(j) for j in range(len(banks)) for name in BANK_NAMES)]
    return y, s, {name: Traffic(*row) for name, row in zip(names, call.traffic, strict=False)}


# ---- for the tests ---------------------------------------------------------------------------

DTYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]
DTYPE_IDS = ["-".join(str(t).removeprefix("torch.") for t in pair) for pair in DTYPES]
RANKS = (0, 1, 3, 8, 9, 16, 33, 64)


def inputs_of(m, widths, k, dtype=torch.float32, adapter_dtype=None, count=None):
    """Inputs of random rows, with ids out of order, -1 and beyond the slots among them."""
    ids = torch.randint(-1, len(RANKS), (count or m,), dtype=torch.int32)
    ids[-1:] = len(RANKS) - 1
    if len(ids) > 2:
        ids[1], ids[2] = -1, len(RANKS) + 5
    sizes = {"dtype": dtype, "adapter_dtype": adapter_dtype, "ids": ids, "max_rank": 72}
    return example_inputs(m, widths, k, RANKS, **sizes)


def add_inputs(inputs, y):
    """The same for a y to add to, in place of the base layer."""
    return {name: inputs[name] for name in ("x", "banks", "ids")} | {"y": y}


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def run_again(file: str, tests: str, passed: int, **environment: str) -> None:
    """Runs some of a file's tests in a process with other settings."""
    environment = {"PEFT_KERNELS_SIMT": _driver()} | environment
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", file, "-k", tests]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert f"{passed} passed" in done.stdout
