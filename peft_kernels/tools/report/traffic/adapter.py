"""The traffic of `adapter`'s forward and backward: launches, activation passes, bytes.

The floor, every tensor once:

forward   read: x, the residual, D, U, their biases, the LayerNorms' weights and biases
          written: y, z and two numbers a row and LayerNorm
backward  read: dy, x, D, U, z, the two numbers, pre_norm's weight and bias; where a LayerNorm makes
          the gradient depend on t, also the residual, U's bias and the LayerNorm's weight
          written: dx, G, dD, the gradients of biases and LayerNorms and, behind a LayerNorm, that
          of the residual (elsewhere it is dy itself)

A scale by channel is read where there is one. What autograd makes of the float32 gradients (scale
G, their dtype) is of the parameters' size and not counted. Nor are the passes that a program makes
over its own rows, which the caches have to serve: `Counted.repeats`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from peft_kernels.tools.report.traffic.counted import Traffic, TrafficRow
from peft_kernels.triton.adapter import launch as launchers
from peft_kernels.triton.common import chips

# The module: the package exports the function of this name.
op = importlib.import_module("peft_kernels.ops.adapter")

TENSORS = (
    "x", "residual", "down_weight", "down_bias", "up_weight", "up_bias", "scale_t",
    "pre_norm_weight", "pre_norm_bias", "norm_weight", "norm_bias",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Which residuals and LayerNorms an adapter has; ``residual`` is one besides x."""

    adds_x: bool = False
    residual: bool = False
    pre_norm: bool = False
    norm: bool = False


LAYOUTS = {
    "update": Layout(),
    "x added": Layout(adds_x=True),
    "LayerNorm before": Layout(adds_x=True, pre_norm=True),
    "LayerNorm after": Layout(adds_x=True, residual=True, norm=True),
    "LayerNorm before and after": Layout(adds_x=True, residual=True, pre_norm=True, norm=True),
}


@dataclass
class Counted:
    """One call of the op with all its gradients, and what they moved."""

    layout: Layout
    inputs: dict[str, Tensor]
    dy: Tensor
    saved: tuple[Tensor, Tensor]  # z and the statistics
    y: Tensor
    gradients: tuple[Tensor, ...]  # dx, the residual's, and the parameters'
    forward: Traffic
    backward: Traffic

    def traffic(self, direction: str) -> Traffic:
        return self.forward if direction == "fwd" else self.backward

    def sizes(self) -> tuple[int, int, int, int]:
        """m, n, k, r."""
        (m, k), (n, r) = self.inputs["x"].shape, self.inputs["up_weight"].shape
        return m, n, k, r

    def activations(self, direction: str) -> list[Tensor]:
        """The full-size tensors of the floor."""
        x, residual = self.inputs["x"], self.inputs.get("residual")
        residuals = [] if residual is None else [residual]
        if direction == "fwd":
            return [x, *residuals, self.y]
        dx, d_residual = self.gradients[:2]
        return [self.dy, x, dx, *([*residuals, d_residual] if self.layout.norm else [])]

    def parameters(self, direction: str) -> list[Tensor]:
        """Those of the floor; a scale that is a number is the kernel's argument."""
        unread = set() if direction == "fwd" else {"down_bias", "norm_bias"}
        if direction == "bwd" and not self.layout.norm:
            unread.add("up_bias")
        if not self.inputs["scale_t"].dim():
            unread.add("scale_t")
        skipped = unread | {"x", "residual"}
        return [tensor for name, tensor in self.inputs.items() if name not in skipped]

    def floor(self, direction: str) -> int:
        tensors = [*self.activations(direction), *self.parameters(direction), *self.saved]
        if direction == "bwd":
            tensors += self.gradients[2:]
        return sum(tensor.nbytes for tensor in tensors)

    def extra_passes(self, direction: str) -> float:
        """Over activations beyond the floor's, of float32 ones too."""
        m, n, k, _ = self.sizes()
        passes = self.traffic(direction).passes((m, k), (m, n))
        return round(passes - len(self.activations(direction)), 6)

    def repeats(self, launch: str, tensor: Tensor) -> float:
        """How often a launch reads each element of a tensor: all but the first time from L2, as
        long as the rows that are worked on at a time fit in it."""
        accesses = [a for a in self.forward.accesses + self.backward.accesses if a.launch == launch]
        address = tensor.untyped_storage().data_ptr()
        (access,) = (a for a in accesses if a.storage == address)
        return access.requests / access.read


def count(
    layout: Layout,
    m: int,
    k: int,
    r: int,
    n: int | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype = torch.float32,
    channels: bool = False,
    dropout_p: float = 0.0,
    arch: str = "sm_90",
) -> Counted:
    """Runs forward and backward with the tiles of ``arch``; ``channels``: a scale for each of n.

    m differs from k and n, and r from all of them, so that an activation is known by its shape.
    """
    n = k if n is None else n
    if m in (k, n) or r in (m, k, n) or min(k, n) <= 4:
        raise ValueError(f"m, r and k or n must be different, k and n > 4; got {(m, r, k, n)}")
    inputs: dict[str, Any] = op.example_inputs(
        m, k, r, n, dtype=dtype, adapter_dtype=adapter_dtype,
        residual=layout.residual, pre_norm=layout.pre_norm, norm=layout.norm,
    )  # fmt: skip
    inputs["scale_t"] = torch.rand(n).to(adapter_dtype) if channels else torch.tensor(2.0)
    dy = torch.randn(m, n).to(dtype)
    shared: dict[str, Any] = {name: inputs.get(name) for name in TENSORS}
    shared |= {"scale": 1.0, "pre_norm_eps": 1e-5, "norm_eps": 1e-5, "activation": "gelu"}
    shared |= {"adds_x": layout.adds_x, "dropout_p": dropout_p}
    shared["seed"] = torch.tensor(1) if dropout_p else None
    needs: dict[str, Any] = {"needs_x": True, "needs_down": True, "needs_up": True}
    needs |= {"needs_pre_norm": layout.pre_norm, "needs_norm": layout.norm}
    # The residual's gradient is dy where no LayerNorm follows.
    needs["needs_residual"] = layout.residual and layout.norm
    with patch.object(chips, "arch_name", lambda device: arch):
        with Traffic() as forward:
            y, z, statistics = launchers.adapter_fwd(**shared)
        with Traffic() as backward:
            gradients = launchers.adapter_bwd(dy, z=z, statistics=statistics, **shared, **needs)
    return Counted(layout, inputs, dy, (z, statistics), y, gradients, forward, backward)


# ---- the table ---------------------------------------------------------------------------------


def rows(m: int, k: int, r: int) -> list[TrafficRow]:
    """Every layout's traffic, with n = k; bfloat16 with float32 parameters."""
    return [
        _row(counted, name, direction)
        for name, layout in LAYOUTS.items()
        for counted in (count(layout, m, k, r),)
        for direction in ("fwd", "bwd")
    ]


def _row(counted: Counted, name: str, direction: str) -> TrafficRow:
    traffic = counted.traffic(direction)
    return TrafficRow(
        op="adapter",
        direction=direction,
        plan=name,
        sizes=counted.sizes(),
        launches=traffic.launches,
        extra_passes=counted.extra_passes(direction),
        bytes_moved=traffic.bytes_moved(),
        bytes_floor=counted.floor(direction),
        atomics=traffic.atomics,
    )
