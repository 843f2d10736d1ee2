"""The traffic of `lora_linear`'s plans: launches, full-size activation passes, bytes."""

from __future__ import annotations

import importlib
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from peft_kernels.tools.report.traffic.counted import BASE_PASSES, Traffic, TrafficRow
from peft_kernels.triton.common import chips
from peft_kernels.triton.lora_linear import launch as launchers
from peft_kernels.triton.lora_linear import plans, tilings


def count(
    plan: str,
    m: int,
    n: int,
    k: int,
    r: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype = torch.float32,
    dropout_p: float = 0.1,
    arch: str = "sm_90",
    splits: int = 1,
) -> list[TrafficRow]:
    """Runs forward and backward under ``plan`` with the tiles of ``arch``, and counts.

    The sums over k of y and dx are in so many ``splits``, whatever the model says of the sizes.
    m, n, k and r must differ, so that a tensor is known by its shape.
    """
    if len({m, n, k, r}) != 4:
        raise ValueError(f"m, n, k and r must be four different numbers; got {(m, n, k, r)}")
    op = importlib.import_module("peft_kernels.ops.lora_linear")
    inputs = op.example_inputs(m, n, k, r, dtype=dtype, adapter_dtype=adapter_dtype)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    a, b = inputs["lora_a"], inputs["lora_b"]
    dy = torch.randn(m, n).to(dtype)
    seed = torch.tensor(1) if dropout_p else None

    tiling = tilings.tiling
    split = patch.object(tilings, "tiling", lambda *args: replace(tiling(*args), splits=splits))
    with plans.force(plan), split, patch.object(chips, "arch_name", lambda device: arch):
        with Traffic() as forward:
            y, s = launchers.lora_linear_fwd(x, weight, bias, a, b, 2.0, None, dropout_p, seed)
        with Traffic() as backward:
            gradients = launchers.lora_linear_bwd(
                dy, x, weight, a, b, s, 2.0, None, dropout_p, seed, True, True, True
            )

    def row(direction: str, traffic: Traffic, *tensors: Tensor) -> TrafficRow:
        return TrafficRow(
            op="lora_linear",
            direction=direction,
            plan=plan if splits == 1 else f"{plan} in {splits} parts",
            sizes=(m, n, k, r),
            launches=traffic.launches,
            extra_passes=round(
                traffic.passes((m, k), (m, n)) + _of_parts(traffic, (m, k), (m, n)) - BASE_PASSES, 3
            ),
            bytes_moved=traffic.bytes_moved(),
            bytes_floor=sum(t.numel() * t.element_size() for t in tensors),
            atomics=traffic.atomics,
        )

    return [
        row("fwd", forward, x, weight, bias, a, b, y, s),
        row("bwd", backward, dy, x, weight, a, b, s, *gradients),
    ]


def _of_parts(traffic: Traffic, *shapes: tuple[int, int]) -> float:
    """Reads and writes of tensors of these shapes in parts: one each for every part."""
    return sum(
        (access.read + access.written) / (access.shape[1] * access.shape[2])
        for access in traffic.accesses
        if access.shape[1:] in shapes
    )


def rows(m: int, n: int, k: int, r: int) -> list[TrafficRow]:
    found = [row for plan in (*plans.PLANS, plans.PERSISTENT) for row in count(plan, m, n, k, r)]
    found += [row for plan in ("i", "ii") for row in count(plan, m, n, k, r, splits=4)]
    # The backward of "ii" is that of "i".
    found = [row for row in found if row.direction == "fwd" or not row.plan.startswith("ii")]
    # In terms, the forward alone differs.
    return found + [count(plan, m, n, k, r)[0] for plan in plans.TERM_PLANS]
