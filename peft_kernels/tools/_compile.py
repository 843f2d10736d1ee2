"""Compiles every launch of the shipped plans ahead of time, for GPUs that need not be there.

The launches are recorded from the launchers themselves, run on tensors without data, so that what
is compiled here is what a GPU would be given. Run as a program (``python -m
peft_kernels.tools._compile WORKERS TARGET...``), it prints the rows as JSON; it must not run under
``TRITON_INTERPRET=1``, where a kernel isn't compiled at all.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from peft_kernels.triton import _plans
from peft_kernels.triton import lora_linear as launchers


@dataclass(frozen=True)
class Target:
    """A chip to compile for, and what its tensor-core instructions are called."""

    gpu: GPUTarget
    plans: str  # the architecture whose tiles it is given
    shared_limit: int  # bytes a program may use
    tensor_core: str  # pattern of the instruction's name


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), "sm_80", 163 * 1024, r"\bHMMA\b"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), "sm_90", 227 * 1024, r"\bHGMMA\b"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), "sm_100", 227 * 1024, r"\bUTC\w*MMA\b"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), "gfx942", 64 * 1024, r"\bv_mfma\w*"),
    # the tiles for any other GPU, held to the smallest limit
    "other (sm_80)": Target(GPUTarget("cuda", 80, 32), "other", 48 * 1024, r"\bHMMA\b"),
}
MATMUL_KERNELS = ("tile", "in_loop", "shrink", "from_dy", "grad_a", "add_low_rank")


@dataclass(frozen=True)
class Case:
    """A call of the op whose launches are compiled."""

    m: int
    r: int
    dtype: str
    adapter_dtype: str
    dropout: bool
    plans: tuple[str, ...]

    def label(self) -> str:
        dropout = " dropout" if self.dropout else ""
        dtypes = f"{self.dtype}/{self.adapter_dtype}".replace("bfloat", "bf").replace("float", "f")
        return f"m={self.m} r={self.r} {dtypes}{dropout}"


CASES = (
    # the heaviest use of every tile: the widest rank block, float32 adapters (three products for
    # one), dropout
    Case(8192, 64, "bfloat16", "float32", True, _plans.PLANS),
    Case(16, 64, "bfloat16", "float32", True, _plans.PLANS),
    # float16 multiplies float32 adapters in another way
    Case(8192, 64, "float16", "float32", True, ("i", "ii")),
    # the lightest
    Case(8192, 16, "bfloat16", "bfloat16", False, ("i", "ii")),
    # float32 takes the library's GEMM unless `tune` says otherwise
    Case(8192, 64, "float32", "float32", True, ("library",)),
)
N = K = 4096


@dataclass(frozen=True)
class CompiledRow:
    """What the compiler made of one kernel in one configuration."""

    target: str
    kernel: str
    case: str
    dtype: str  # of x
    tile: str
    registers: int
    spills: int  # bytes a thread
    shared: int  # bytes a program
    shared_limit: int
    tensor_core: dict[str, int]  # instruction: how often it occurs

    def within_budget(self) -> bool:
        """No spills, shared memory within the chip, 16-bit products on the tensor cores."""
        needs_tensor_cores = self.kernel in MATMUL_KERNELS and self.dtype != "float32"
        return (
            self.spills == 0
            and self.shared <= self.shared_limit
            and (bool(self.tensor_core) or not needs_tensor_cores)
        )


@dataclass(frozen=True)
class Launch:
    """A kernel with the specialisation and options it would be launched with."""

    target: str
    kernel: str
    case: str
    dtype: str
    tile: str
    signature: dict[str, str]
    constexprs: dict[Any, Any]
    attrs: dict[Any, Any]
    options: dict[str, int]

    def key(self) -> str:
        # The sums have no tile to choose, and differ in the divisibility of their sizes only.
        matmul = self.kernel in MATMUL_KERNELS
        specialised = (self.signature, self.constexprs, self.attrs) if matmul else ()
        return str((self.target, self.kernel, specialised, self.options))


# ---- recording the launches --------------------------------------------------------------------


def launches(name: str, cases: tuple[Case, ...] = CASES) -> list[Launch]:
    """Every distinct launch of ``cases`` on the target ``name``."""
    found: dict[str, Launch] = {}
    for case in cases:
        for plan in case.plans:
            for launch in _launches_of(name, case, plan):
                found.setdefault(launch.key(), launch)
    return list(found.values())


def _launches_of(name: str, case: Case, plan: str) -> Iterator[Launch]:
    target = TARGETS[name]
    backend = make_backend(target.gpu)
    calls: list[tuple[Any, tuple, dict]] = []

    def record(kernel: Any, grid: tuple, *args: Any, **options: Any) -> None:
        calls.append((kernel, args, options))

    with ExitStack() as stack:
        stack.enter_context(patch.object(launchers, "_launch", record))
        stack.enter_context(patch.object(_plans, "arch_name", lambda device: target.plans))
        stack.enter_context(_plans.force(plan))
        _run(case)
    for kernel, args, options in calls:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, extra = bind(*args, **options)
        _, signature, constexprs, attrs = kernel._pack_args(
            backend, options, bound, specialization, extra
        )
        tile = [f"{side}{bound[f'BLOCK_{side}']}" for side in "MNKR" if f"BLOCK_{side}" in bound]
        tile += [f"{option.removeprefix('num_')[0]}{value}" for option, value in extra.items()]
        yield Launch(
            target=name,
            kernel=kernel.__name__.removesuffix("_kernel"),
            case=case.label(),
            dtype=case.dtype,
            tile=" ".join(tile),
            signature=signature,
            constexprs=constexprs,
            attrs=attrs,
            options=extra,
        )


def _run(case: Case) -> None:
    """One forward and backward on tensors without data."""

    def empty(*shape: int, dtype: str = case.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    x, weight, bias, dy = empty(case.m, K), empty(N, K), empty(N), empty(case.m, N)
    a, b = empty(case.r, K, dtype=case.adapter_dtype), empty(N, case.r, dtype=case.adapter_dtype)
    scale = torch.tensor(1.0)
    seed = empty(dtype="int64") if case.dropout else None
    p = 0.1 if case.dropout else 0.0
    _, s = launchers.lora_linear_fwd(x, weight, bias, a, b, scale, p, seed)
    launchers.lora_linear_bwd(dy, x, weight, a, b, s, scale, p, seed, True, True, True)


# ---- compiling and reading the result ----------------------------------------------------------


def compile_launch(launch: Launch) -> CompiledRow:
    target = TARGETS[launch.target]
    kernel = getattr(launchers.kernels, launch.kernel + "_kernel")
    source = ASTSource(kernel, launch.signature, launch.constexprs, launch.attrs)
    compiled = triton.compile(source, target=target.gpu, options=launch.options)
    if target.gpu.backend == "hip":
        registers, spills, text = _read_amdgcn(compiled.asm["amdgcn"])
    else:
        registers, spills, text = _read_cubin(compiled.asm["cubin"])
    return CompiledRow(
        target=launch.target,
        kernel=launch.kernel,
        case=launch.case,
        dtype=launch.dtype,
        tile=launch.tile,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        shared_limit=target.shared_limit,
        tensor_core=dict(Counter(re.findall(target.tensor_core, text))),
    )


def _read_amdgcn(text: str) -> tuple[int, int, str]:
    """(vector registers, spilled bytes a thread, assembly)."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        if found is None:
            raise RuntimeError(f"the compiled kernel's metadata has no {name}")
        return int(found.group(1))

    spilled = field("vgpr_spill_count") + field("sgpr_spill_count")
    return field("vgpr_count"), 4 * spilled, text


def _read_cubin(cubin: bytes) -> tuple[int, int, str]:
    """(registers, bytes of stack a thread, SASS); Triton's kernels have a stack only to spill."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _cuobjdump("-res-usage", path)
        sass = _cuobjdump("-sass", path)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no resource usage: {usage!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local, sass


def _cuobjdump(option: str, path: Path) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    result = subprocess.run(
        [tools / "cuobjdump", option, path],
        capture_output=True,
        text=True,
        # cuobjdump starts nvdisasm, which lies beside it
        env={"PATH": str(tools)},
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"cuobjdump {option} failed: {result.stderr.strip()}")
    return result.stdout


def compile_rows(names: list[str], workers: int) -> list[CompiledRow]:
    jobs = [launch for name in names for launch in launches(name)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_launch, jobs))


if __name__ == "__main__":
    json.dump([asdict(row) for row in compile_rows(sys.argv[2:], int(sys.argv[1]))], sys.stdout)
