"""Compiles every launch of the shipped plans ahead of time, for GPUs that need not be there.

The launches are recorded from the launchers themselves, run on tensors without data, so that what
is compiled here is what a GPU would be given. Run as a program (``python -m
peft_kernels.tools.report.compile WORKERS all|once TARGET...``), it prints the rows as JSON; it must
not run under ``TRITON_INTERPRET=1``, where a kernel isn't compiled at all.
"""

from __future__ import annotations

import importlib
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

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from peft_kernels.tools.report.compile_cases import CASES, AnyCase
from peft_kernels.triton.common import chips
from peft_kernels.triton.common import launch as common_launch


@dataclass(frozen=True)
class Target:
    """A chip to compile for, and what its tensor-core instructions are called."""

    gpu: GPUTarget
    plans: str  # the architecture whose tiles it is given
    tensor_core: str  # pattern of the instruction's name
    narrow: str  # the same for tiles of fewer rows than that instruction takes

    @property
    def shared_limit(self) -> int:
        """Bytes a program may use."""
        return chips.arch(self.plans).shared


def _nvidia(capability: int, plans: str, tensor_core: str = r"\bHMMA\b") -> Target:
    return Target(GPUTarget("cuda", capability, 32), plans, tensor_core, r"\bHMMA\b")


def _amd(name: str) -> Target:
    return Target(GPUTarget("hip", name, 64), name, r"\bv_mfma\w*", r"\bv_mfma\w*")


TARGETS = {
    "sm_75": _nvidia(75, chips.NO_TENSOR_CORES),
    "sm_80": _nvidia(80, "sm_80"),
    "sm_86": _nvidia(86, "sm_86"),
    "sm_89": _nvidia(89, "sm_89"),
    "sm_90": _nvidia(90, "sm_90", r"\bHGMMA\b"),
    "sm_100": _nvidia(100, "sm_100", r"\bUTC\w*MMA\b"),
    "sm_120": _nvidia(120, "sm_120"),
    "gfx90a": _amd("gfx90a"),
    "gfx942": _amd("gfx942"),
    "gfx950": _amd("gfx950"),
    # the tiles for any other GPU, held to the smallest limit
    "other (sm_80)": _nvidia(80, "other"),
}
# Kernels whose products have keys for rows.
PRODUCTS_OF_KEYS = ("prefix_attention_text_grad", "prefix_attention_prefix_grad")
# Kernels that multiply no 16-bit tiles: sums, few rows against an adapter each, float32 alone.
ELEMENTWISE_KERNELS = (
    "terms", "sum_partials", "sum_parts", "gain_bwd", "decode_shrink", "dequantize",
    "adapter_fold", "adapter_down", "adapter_fusion_weights", "adapter_fusion_weights_bwd",
    "prefix_attention_combine", "prefix_attention_delta",
    "prompt_lookup_fwd", "prompt_lookup_bwd", "dora_changed", "dora_norm", "dora_keep",
)  # fmt: skip


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
    multiplies: bool  # 16-bit tiles, on a chip with tensor cores that Triton knows

    def within_budget(self) -> bool:
        """No spills, shared memory within the chip, 16-bit products on the tensor cores."""
        return (
            self.spills == 0
            and self.shared <= self.shared_limit
            and (bool(self.tensor_core) or not self.multiplies)
        )


@dataclass(frozen=True)
class Launch:
    """A kernel with the specialisation and options it would be launched with."""

    target: str
    module: str
    kernel: str
    case: str
    dtype: str
    tile: str
    multiplies: bool  # 16-bit tiles
    narrow: bool  # fewer rows than the tensor cores' widest instruction takes
    signature: dict[str, Any]
    constexprs: dict[Any, Any]
    attrs: dict[Any, Any]
    options: dict[str, int]

    def key(self) -> str:
        # The sums have no tile to choose, and differ in the divisibility of their sizes only.
        sums = self.kernel.startswith("sum_")
        specialised = () if sums else (self.signature, self.constexprs, self.attrs)
        return str((self.target, self.kernel, specialised, self.options))


# ---- recording the launches --------------------------------------------------------------------


def launches(name: str, cases: tuple[AnyCase, ...] = CASES) -> list[Launch]:
    """Every distinct launch of ``cases`` on the target ``name``."""
    found: dict[str, Launch] = {}
    for case in cases:
        for launch in _launches_of(name, case):
            found.setdefault(launch.key(), launch)
    return list(found.values())


def _launches_of(name: str, case: AnyCase) -> Iterator[Launch]:
    target = TARGETS[name]
    backend = make_backend(target.gpu)
    calls: list[tuple[Any, tuple, dict]] = []

    def record(kernel: Any, grid: tuple, args: tuple, options: dict[str, Any]) -> None:
        calls.append((kernel, args, options))

    with ExitStack() as stack:
        stack.enter_context(patch.object(common_launch, "run", record))
        stack.enter_context(patch.object(chips, "arch_name", lambda device: target.plans))
        case.run()
    for kernel, args, options in calls:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, extra = bind(*args, **options)
        _, signature, constexprs, attrs = kernel._pack_args(
            backend, options, bound, specialization, extra
        )
        stem = kernel.__name__.removesuffix("_kernel")
        tile = [f"{side}{bound[f'BLOCK_{side}']}" for side in "MNKR" if f"BLOCK_{side}" in bound]
        counts = [option for option in extra if option.startswith("num_")]
        tile += [f"{option.removeprefix('num_')[0]}{extra[option]}" for option in counts]
        yield Launch(
            target=name,
            module=kernel.fn.__module__,
            kernel=stem,
            case=case.label(),
            dtype=case.dtype,
            tile=" ".join(tile),
            multiplies=stem not in ELEMENTWISE_KERNELS
            and target.plans != chips.NO_TENSOR_CORES
            and bound.get("HAS_BASE", True)
            and case.dtype != "float32",
            narrow=stem in ("decode_tile", "gain_end")
            or (stem == "add_low_rank" and bound["BLOCK_M"] < 64)
            or (stem == "prefix_attention_fwd" and bound["BLOCK_M"] < 64)
            or (stem in PRODUCTS_OF_KEYS and bound["BLOCK_N"] < 64),
            signature=signature,
            constexprs=constexprs,
            attrs=attrs,
            options=extra,
        )


# ---- compiling and reading the result ----------------------------------------------------------


def compiled(launch: Launch) -> Any:
    """What Triton makes of it."""
    kernel = getattr(importlib.import_module(launch.module), launch.kernel + "_kernel")
    source = ASTSource(kernel, launch.signature, launch.constexprs, launch.attrs)
    return triton.compile(source, target=TARGETS[launch.target].gpu, options=launch.options)


def compile_launch(launch: Launch) -> CompiledRow:
    target, made = TARGETS[launch.target], compiled(launch)
    if target.gpu.backend == "hip":
        registers, spills, text = _read_amdgcn(made.asm["amdgcn"])
    else:
        registers, spills, text = _read_cubin(made.asm["cubin"])
    pattern = target.narrow if launch.narrow else target.tensor_core
    return CompiledRow(
        target=launch.target,
        kernel=launch.kernel,
        case=launch.case,
        dtype=launch.dtype,
        tile=launch.tile,
        registers=registers,
        spills=spills,
        shared=made.metadata.shared,
        shared_limit=target.shared_limit,
        tensor_core=dict(Counter(re.findall(pattern, text))),
        multiplies=launch.multiplies,
    )


def _read_amdgcn(text: str) -> tuple[int, int, str]:
    """(vector registers, bytes of scratch memory a thread, assembly).

    Scalar registers spill to lanes of vector registers, which takes no memory.
    """

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        if found is None:
            raise RuntimeError(f"the compiled kernel's metadata has no {name}")
        return int(found.group(1))

    return field("vgpr_count"), field("private_segment_fixed_size"), text


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


def compile_rows(names: list[str], workers: int, once: bool = False) -> list[CompiledRow]:
    jobs = [launch for name in names for launch in launches(name)]
    if once:
        jobs = list({(job.target, job.kernel): job for job in reversed(jobs)}.values())
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_launch, jobs))


if __name__ == "__main__":
    workers, once, *chosen = sys.argv[1:]
    json.dump(
        [asdict(row) for row in compile_rows(chosen, int(workers), once == "once")], sys.stdout
    )
