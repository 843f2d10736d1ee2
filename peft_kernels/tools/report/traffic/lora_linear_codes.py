"""The traffic of `lora_linear` over a weight in codes: bytes of each plan against the floor."""

from __future__ import annotations

import importlib
from unittest.mock import patch

import torch
from torch import Tensor

from peft_kernels.ops._quantize import quantize
from peft_kernels.ops._quantized import QuantizedWeight, arguments_of
from peft_kernels.tools.report.traffic.counted import BASE_PASSES, Traffic, TrafficRow
from peft_kernels.triton.common import chips
from peft_kernels.triton.lora_linear import plans
from peft_kernels.triton.lora_linear_codes import launch as launchers

# In one tile of the H100's rows, where widening in the tile is meant to win.
ROWS = 48


def count(plan: str, kind: str, m: int, n: int, k: int, r: int) -> list[TrafficRow]:
    """Runs forward and backward under ``plan`` with the H100's tiles, and counts."""
    op = importlib.import_module("peft_kernels.ops.lora_linear")
    dtypes = {"dtype": torch.bfloat16, "adapter_dtype": torch.float32}
    inputs = op.example_inputs(m, n, k, r, **dtypes)
    x, bias, a, b = (inputs[name] for name in ("x", "bias", "lora_a", "lora_b"))
    weight = arguments_of(_in_codes(inputs["weight"], kind))
    dy, options = torch.randn(m, n).to(x.dtype), (2.0, None, 0.0, None)
    with plans.force(plan), patch.object(chips, "arch_name", lambda device: "sm_90"):
        with Traffic() as forward:
            y, s = launchers.lora_linear_codes(x, *weight, bias, a, b, *options)
        with Traffic() as backward:
            gradients = launchers.lora_linear_codes_bwd(
                dy, x, *weight, a, b, s, *options, True, True, True
            )
    parts = [part for part in weight if isinstance(part, Tensor)]

    def row(direction: str, traffic: Traffic, *tensors: Tensor) -> TrafficRow:
        return TrafficRow(
            op="lora_linear_codes",
            direction=direction,
            plan=f"{kind} {plan}",
            sizes=(m, n, k, r),
            launches=traffic.launches,
            extra_passes=round(traffic.passes((m, k), (m, n)) - BASE_PASSES, 3),
            bytes_moved=traffic.bytes_moved(),
            bytes_floor=sum(t.numel() * t.element_size() for t in (*tensors, *parts)),
            atomics=traffic.atomics,
        )

    return [
        row("fwd", forward, x, bias, a, b, y, s),
        row("bwd", backward, dy, x, a, b, s, *gradients),
    ]


def _in_codes(values: Tensor, kind: str) -> QuantizedWeight:
    """With codes of scales that values have no say in: which entries are read is counted."""
    weight = quantize(values, kind)
    if weight.nested is None:
        return weight
    codes = torch.arange(weight.scales.numel()).remainder(256).to(torch.uint8)
    return weight._replace(scales=codes.view_as(weight.scales))


def rows(n: int, k: int, r: int) -> list[TrafficRow]:
    return [
        row
        for kind in ("nf4", "int8")
        for plan in plans.CODES_PLANS
        for row in count(plan, kind, ROWS, n, k, r)
    ]
