"""What launchers share: the launch itself, long sums in parts, float32 matrices in terms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_kernels.triton.common import chips, dependent
from peft_kernels.triton.common.layouts import Prepared
from peft_kernels.triton.common.sizes import cdiv
from peft_kernels.triton.common.sum_kernels import sum_partials_kernel
from peft_kernels.triton.common.term_kernels import terms_kernel

GROUP_M = 8  # rows of tiles that share their columns in L2
SUM_PARTS, SUM_BLOCK = 16, 256
TERMS_BLOCK = 512
# More splits than this cost more in adding them up than they bring in parallelism.
MAX_SPLITS = 64


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    if 0 not in grid:
        run(kernel, grid, args, options)


def launch_prepared(kernel: Any, prepared: Prepared, *args: Any) -> None:
    """The same with a grid and options that are kept, and not copied in each call."""
    grid, options = prepared
    if 0 not in grid:
        run(kernel, grid, args, options)


def run(kernel: Any, grid: tuple[int, ...], args: tuple, options: dict[str, Any]) -> None:
    """Apart from `launch`, so that a tool can record launches instead of running them."""
    kernel[grid](*args, **options)


def options(tile: chips.Tile) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def argument(value: Tensor | float | None, default: float) -> tuple[Any, bool]:
    """A kernel's argument and whether it is a pointer: a tensor on the GPU is read there."""
    if value is None:
        return default, False
    if not isinstance(value, Tensor):
        return value, False
    return (value, True) if on_device(value) else (value.item(), False)


def on_device(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu"


def chunks(cores: int, length: int, block: int, programs: int) -> tuple[int, int]:
    """Splits ``length`` where ``programs`` alone don't fill the GPU: (chunk length, chunks)."""
    wanted = 2 * cores // max(programs, 1)
    chunk = block * cdiv(cdiv(length, block), min(max(wanted, 1), MAX_SPLITS))
    return chunk, cdiv(length, chunk) if length else 0


def sum_partials(parts: Tensor, out: Tensor, factor: Tensor | float, pdl: bool = False) -> Tensor:
    """out = factor (parts[0] + parts[1] + ...); zeros when there is none.

    Args:
        pdl: the launch before is what makes ``parts``, and lets this one begin.
    """
    value, is_pointer = argument(factor, 1.0)
    launch(
        sum_partials_kernel,
        (cdiv(out.numel(), SUM_BLOCK),),
        parts, out, value, parts.shape[0], out.numel(),
        FACTOR_ON_DEVICE=is_pointer, PARTS=SUM_PARTS, BLOCK=SUM_BLOCK,
        **dependent.second(pdl),
    )  # fmt: skip
    return out


def in_terms(a: Tensor, dtype: torch.dtype, terms: int) -> Tensor:
    """``[terms, rows, cols]`` in ``dtype``, whose sum is the float32 matrix ``a`` [rows, cols]."""
    rows, cols = a.shape
    out = a.new_empty(terms, rows, cols, dtype=dtype)
    launch(
        terms_kernel,
        (rows * cdiv(cols, TERMS_BLOCK),),
        a, out, rows, cols, *a.stride(), TERMS=terms, BLOCK=TERMS_BLOCK,
    )  # fmt: skip
    return out
