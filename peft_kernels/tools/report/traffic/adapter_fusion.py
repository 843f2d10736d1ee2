"""The traffic of `adapter_fusion`'s forward and backward: launches, activation passes, bytes.

The floor, every tensor once; R is the sum of the N bottlenecks:

forward   read: x, the query where it isn't x, the residual, D and the absorbed matrices, biases
          written: y and, for the backward, z [m, R], w [m, R + N] and p [m, N]
backward  read: dy, x, the query, D and the absorbed matrices, z, w's first R columns and p
          written: dx, dq where the query isn't x, and the parameters' gradients

The absorbed matrices are made once for many calls, and what autograd makes of the float32 gradients
is of the parameters' size: neither is counted.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from peft_kernels.tools.report.traffic.counted import Traffic, TrafficRow
from peft_kernels.triton.adapter_fusion import launch as launchers
from peft_kernels.triton.common import chips

# The module: the package exports the function of this name.
op = importlib.import_module("peft_kernels.ops.adapter_fusion")

SIZES = (16, 8, 24)  # the bottlenecks of the table's adapters
PARAMETERS = (
    "down_weight", "down_bias", "score_weight", "score_bias", "mix_weight", "mix_bias",
)  # fmt: skip


@dataclass
class Counted:
    """One call of the op with all its gradients, and what they moved."""

    sizes: tuple[int, ...]
    inputs: dict[str, Tensor]
    dy: Tensor
    y: Tensor
    saved: tuple[Tensor, Tensor, Tensor]  # z, w and p
    gradients: tuple[Tensor, ...]  # dx, dq, and the parameters'
    forward: Traffic
    backward: Traffic

    def traffic(self, direction: str) -> Traffic:
        return self.forward if direction == "fwd" else self.backward

    def activations(self, direction: str) -> list[Tensor]:
        """The full-size tensors of the floor."""
        names = ("x", "query", "residual") if direction == "fwd" else ("x", "query")
        rows = [self.inputs[name] for name in names if name in self.inputs]
        if direction == "fwd":
            return [*rows, self.y]
        return [self.dy, *rows, *self.gradients[: len(rows)]]

    def floor(self, direction: str) -> int:
        z, w, p = self.saved
        if direction == "fwd":
            others = [*(self.inputs[name] for name in PARAMETERS), z, w, p]
        else:
            weights = ("down_weight", "score_weight", "mix_weight", "mix_bias")
            others = [self.inputs[name] for name in weights]
            others += [z, w[:, : sum(self.sizes)], p, *self.gradients[2:]]
        return sum(tensor.nbytes for tensor in [*self.activations(direction), *others])

    def extra_passes(self, direction: str) -> float:
        """Over activations beyond the floor's."""
        m, n = self.y.shape
        passes = self.traffic(direction).passes((m, n))
        return round(passes - len(self.activations(direction)), 6)


def count(
    m: int,
    n: int,
    sizes: Sequence[int],
    *,
    query: bool = False,
    residual: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype = torch.float32,
    arch: str = "sm_90",
) -> Counted:
    """Runs forward and backward with the tiles of ``arch``; without ``query`` it is x.

    m and n, the width of x, query and y, are neither each other nor R, N or R + N, so that an
    activation is known by its shape.
    """
    ranks, adapters = sum(sizes), len(sizes)
    if m == n or {m, n} & {ranks, adapters, ranks + adapters}:
        found = f"{(m, n)} and {(ranks, adapters)}"
        raise ValueError(f"m and n must differ from each other, R, N and R + N; got {found}")
    inputs = _inputs(op.example_inputs(m, n, sizes, dtype=dtype, adapter_dtype=adapter_dtype))
    inputs |= {"query": torch.randn(m, n).to(dtype)} if query else {}
    inputs |= {"residual": torch.randn(m, n).to(dtype)} if residual else {}
    dy = torch.randn(m, n).to(dtype)
    shared: dict[str, Any] = {name: inputs.get(name) for name in ("x", "query", *PARAMETERS)}
    shared |= {"sizes": list(sizes), "activation": "gelu"}
    needs: dict[str, Any] = {f"needs_{name}": True for name in ("x", "down", "score", "mix")}
    needs["needs_query"] = query
    with patch.object(chips, "arch_name", lambda device: arch):
        with Traffic() as forward:
            y, z, w, p = launchers.adapter_fusion_fwd(residual=inputs.get("residual"), **shared)
        with Traffic() as backward:
            gradients = launchers.adapter_fusion_bwd(dy, z=z, w=w, p=p, **shared, **needs)
    return Counted(tuple(sizes), inputs, dy, y, (z, w, p), gradients, forward, backward)


def _inputs(example: dict[str, Any]) -> dict[str, Tensor]:
    """The op's tensors by name, as the module has them: M and v lie in one tensor."""
    made = ("up_weights", "up_biases", "query_weight", "query_bias", "key_weight", "value_weight")
    return {
        "x": example["x"],
        "down_weight": torch.cat(example["down_weights"]),
        "down_bias": torch.cat(example["down_biases"]),
        **vars(op.absorb(*(example[name] for name in made))),
    }


# ---- the table ---------------------------------------------------------------------------------


def rows(m: int, n: int) -> list[TrafficRow]:
    """With x as the query and with one of its own; bfloat16 with float32 parameters."""
    cases = {
        "query x": count(m, n, SIZES),
        "query and residual": count(m, n, SIZES, query=True, residual=True),
    }
    return [_row(call, name, way) for name, call in cases.items() for way in ("fwd", "bwd")]


def _row(counted: Counted, name: str, direction: str) -> TrafficRow:
    traffic = counted.traffic(direction)
    m, n = counted.y.shape
    return TrafficRow(
        op="adapter_fusion",
        direction=direction,
        plan=name,
        sizes=(m, n, n),
        launches=traffic.launches,
        extra_passes=counted.extra_passes(direction),
        bytes_moved=traffic.bytes_moved(),
        bytes_floor=counted.floor(direction),
        atomics=traffic.atomics,
    )
