"""The traffic of `prefix_attention`: launches, bytes, and how often the prefix is asked for.

The floor: q, out, dout, lse and the gradients once, k and v once and no key that is padding, the
prefixes that rows have once. Keys and values count once for all heads that share them, and the
prefix once for all rows of the batch.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from peft_kernels.tools.report.traffic.counted import Access, Traffic, TrafficRow
from peft_kernels.triton.common import chips
from peft_kernels.triton.prefix_attention import launch as launchers

op = importlib.import_module("peft_kernels.ops.prefix_attention")

INPUTS = ("q", "k", "v", "prefix_k", "prefix_v")


@dataclass
class Counted:
    """One forward and backward, and what they moved."""

    inputs: dict[str, Tensor]
    dout: Tensor
    out: Tensor
    lse: Tensor
    gradients: tuple[Tensor, ...]
    real_keys: int  # in all rows
    used_prefixes: int
    forward: Traffic
    backward: Traffic

    def traffic(self, direction: str) -> Traffic:
        return self.forward if direction == "fwd" else self.backward

    def reads(self, direction: str, name: str) -> list[Access]:
        """Of the launches that read this input."""
        return [a for a in self.traffic(direction).of(self.inputs[name]) if a.read]

    def floor(self, direction: str) -> int:
        q, k, prefix = (self.inputs[name] for name in ("q", "k", "prefix_k"))
        keys = 2 * self.real_keys * k.shape[1] * k.shape[3] * k.element_size()
        prefixes = 2 * self.used_prefixes * prefix[0].nbytes
        read = q.nbytes + keys + prefixes
        if direction == "fwd":
            return read + self.out.nbytes + self.lse.nbytes
        tensors = (self.dout, self.out, self.lse, *self.gradients)
        return read + sum(tensor.nbytes for tensor in tensors)


def count(
    batch: int,
    queries: int,
    keys: int,
    length: int,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 16,
    prefixes: int = 1,
    prefix_ids: Tensor | None = None,
    ends: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    arch: str = "sm_90",
    backward: bool = True,
) -> Counted:
    """Runs a causal forward, and its backward or none, with the tiles of ``arch``."""
    shapes = (batch, heads, queries, size), (batch, kv_heads, keys, size)
    bank = (prefixes, kv_heads, length, size)
    tensors = [torch.randn(shape).to(dtype) for shape in (*shapes, shapes[1], bank, bank)]
    inputs: list[Any] = [*tensors, prefix_ids, None, None, ends]
    options = [True, size**-0.5]
    # In memory as out, which is how the layer after the attention gives it.
    dout = torch.randn(batch, queries, heads, size).to(dtype).transpose(1, 2)
    with patch.object(chips, "arch_name", lambda device: arch):
        with Traffic() as forward:
            out, lse = launchers.prefix_attention_fwd(*inputs, *options)
        gradients: tuple[Tensor, ...] = ()
        with Traffic() as of_backward:
            if backward:
                arguments = [dout, *inputs, out, lse, *options, True, True, True]
                gradients = launchers.prefix_attention_bwd(*arguments)
    used = 1 if prefix_ids is None else len(set(prefix_ids.tolist()) - {-1})
    return Counted(
        inputs=dict(zip(INPUTS, tensors, strict=True)),
        dout=dout,
        out=out,
        lse=lse,
        gradients=gradients,
        real_keys=batch * keys if ends is None else int(ends.sum()),
        used_prefixes=used,
        forward=forward,
        backward=of_backward,
    )


# ---- the table ---------------------------------------------------------------------------------


def rows() -> list[TrafficRow]:
    """Training over a text, and a decode step over many keys, at sizes the interpreter can do."""
    calls = {
        "training": count(2, 96, 96, 32, heads=8, size=32),
        "decoding": count(4, 1, 600, 32, heads=8, size=32, backward=False),
    }
    found = []
    for plan, counted in calls.items():
        # A decode step has no backward.
        for direction in ("fwd", "bwd") if plan == "training" else ("fwd",):
            found.append(_row(counted, plan, direction))
    return found


def _row(counted: Counted, plan: str, direction: str) -> TrafficRow:
    traffic = counted.traffic(direction)
    batch, heads, queries, size = counted.inputs["q"].shape
    keys, length = counted.inputs["k"].shape[2], counted.inputs["prefix_k"].shape[2]
    return TrafficRow(
        op="prefix_attention",
        direction=direction,
        plan=plan,
        sizes=(batch, heads, queries, keys, length, size),
        launches=traffic.launches,
        extra_passes=0,
        bytes_moved=traffic.bytes_moved(),
        bytes_floor=counted.floor(direction),
        atomics=traffic.atomics,
    )
