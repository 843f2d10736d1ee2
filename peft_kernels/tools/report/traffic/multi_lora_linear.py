"""The traffic of `multi_lora_linear`'s plans: launches, full-size activation passes, bytes.

The floor holds what no plan can leave out: the weight, the bias, x and y, and every adapter that
has rows, once and at its true rank; in the backward dy, dx and the gradients, and x in the rows of
trained adapters only. S and dS, which are handed from launch to launch, and the ids, tables, ranks
and scales are in the bytes moved alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from peft_kernels.ops._lora_banks import LoRABank
from peft_kernels.tools.report.traffic.counted import BASE_PASSES, Traffic, TrafficRow
from peft_kernels.triton.common import chips
from peft_kernels.triton.multi_lora_linear import launch as launchers
from peft_kernels.triton.multi_lora_linear import plans

# The module: the package exports the function of this name.
op = importlib.import_module("peft_kernels.ops.multi_lora_linear")

# Of seven adapters four have rows; a quarter of the rows have none.
RANKS = (8, 12, 16, 12, 24, 8, 16)
IDS = (0, -1, 2, 4, 2, -1, 1, 4)
# (plan, whether the base product is the library's)
PLANS = (("grouped", False), ("grouped", True), ("single", False), ("decode", False))


@dataclass
class Counted:
    """One call of the op with its gradients, and what they moved. No backward decodes."""

    inputs: dict[str, Any]
    slot_of_row: Tensor
    dy: Tensor
    y: Tensor
    s: Tensor
    dx: Tensor
    gradients: list[Tensor]
    trained: tuple[int, ...]
    forward: Traffic
    backward: Traffic

    @property
    def banks(self) -> list[LoRABank]:
        return self.inputs["banks"]

    def traffic(self, direction: str) -> Traffic:
        return self.forward if direction == "fwd" else self.backward

    def ranks(self, bank: LoRABank) -> dict[int, int]:
        """The true ranks of the adapters that have rows, those of rank 0 left out."""
        slots = sorted(set(self.slot_of_row.tolist()) - {-1})
        return {slot: rank for slot in slots if (rank := int(bank.ranks[slot]))}

    def rows_of(self, slots: Sequence[int]) -> int:
        """How many rows have one of these adapters, with a rank in some bank."""
        ranked = {slot for bank in self.banks for slot in self.ranks(bank)}
        return sum(slot in ranked and slot in slots for slot in self.slot_of_row.tolist())

    def adapter_bytes(self) -> int:
        """A and B of the adapters that have rows, each once and at its true rank."""
        return sum(
            sum(self.ranks(bank).values()) * (bank.a[0].nbytes + bank.b[0].nbytes)
            for bank in self.banks
        )

    def floor(self, direction: str) -> int:
        x, weight, bias = self.inputs["x"], self.inputs["weight"], self.inputs["bias"]
        if direction == "fwd":
            return _bytes(x, weight, bias, self.y) + self.adapter_bytes()
        trained_x = self.rows_of(self.trained) * x[0].nbytes
        return _bytes(self.dy, weight, self.dx, *self.gradients) + self.adapter_bytes() + trained_x

    def extra_passes(self, direction: str) -> float:
        activations = {
            "fwd": (self.inputs["x"], self.y),
            "bwd": (self.dy, self.inputs["x"], self.dx),
        }
        passes = sum(
            (access.read + access.written) / tensor.numel()
            for tensor in activations[direction]
            for access in self.traffic(direction).of(tensor)
        )
        return round(passes - BASE_PASSES, 6)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def count(
    plan: str,
    inputs: dict[str, Any],
    *,
    trained: Sequence[int] = (),
    library_base: bool = False,
    dropout_p: float = 0.0,
    arch: str = "sm_90",
) -> Counted:
    """Runs forward and backward of ``example_inputs`` under ``plan`` with the tiles of ``arch``.

    The rows' order by adapter is an input: it is made once a batch and serves every layer. Without
    ``library_base`` base and delta are one kernel, whatever the sizes.
    """
    x, weight, banks, ids = (inputs[name] for name in ("x", "weight", "banks", "ids"))
    m = x.shape[0]
    shared = _shared_arguments(banks, ids, dropout_p) | {"plan": plan}
    receivers = [op.example_trained(bank, trained) for bank in banks]
    grad_rows = [one.rows for one in receivers]
    sizes = [sum(len(a) for a in one.a) for one in receivers]
    dy = torch.randn(m, weight.shape[0]).to(x.dtype)

    with _tiles_of(arch, library_base):
        with Traffic() as forward:
            y, s = launchers.multi_lora_linear_fwd(x, weight, inputs["bias"], **shared)
        with Traffic() as backward:
            dx, da, db = launchers.multi_lora_linear_bwd(
                dy, x, weight, s=s, grad_rows=grad_rows, grad_sizes=sizes, needs_x=True, **shared
            )
    slot_of_row = ids.repeat_interleave(m // ids.numel())
    return Counted(inputs, slot_of_row, dy, y, s, dx, [*da, *db], tuple(trained), forward, backward)


def _shared_arguments(banks: Sequence[LoRABank], ids: Tensor, dropout_p: float) -> dict[str, Any]:
    """What forward and backward take alike."""
    slots = banks[0].ranks.shape[0]
    order, starts = op.sort_by_adapter(ids, slots)
    rates = torch.full((slots,), dropout_p, dtype=torch.float64)
    return {
        "a": [bank.a for bank in banks],
        "b": [bank.b for bank in banks],
        "tables": [bank.table for bank in banks],
        "ranks": [bank.ranks for bank in banks],
        "scales": [bank.scales for bank in banks],
        "ids": ids,
        "order": order,
        "starts": starts,
        "dropout_p": [rates for _ in banks] if dropout_p else [],
        "seeds": [torch.arange(slots) for _ in banks] if dropout_p else [],
    }


@contextmanager
def _tiles_of(arch: str, library_base: bool) -> Iterator[None]:
    def fuses_base(*sizes: object) -> bool:
        return not library_base

    with (
        patch.object(chips, "arch_name", lambda device: arch),
        patch.object(plans, "fuses_base", fuses_base),
    ):
        yield


# ---- the table ---------------------------------------------------------------------------------


def rows(m: int, n: int, k: int) -> list[TrafficRow]:
    """Every plan's traffic; "decode" with as many rows as it serves, "single" with an id a part."""
    if m % len(IDS):
        raise ValueError(f"m must be a multiple of {len(IDS)}; got {m}")
    found = []
    trained = sorted(set(IDS) - {-1})
    for plan, library_base in PLANS:
        rows_of_x = min(m, plans.DECODE_MAX_ROWS) if plan == "decode" else m
        ids = torch.tensor(IDS, dtype=torch.int32)
        inputs = op.example_inputs(
            rows_of_x, n, k, RANKS, dtype=torch.bfloat16, adapter_dtype=torch.float32,
            ids=ids if plan == "single" else ids.repeat(rows_of_x // len(ids)),
        )  # fmt: skip
        counted = count(plan, inputs, trained=trained, library_base=library_base)
        name = f"{plan}, library base" if library_base else plan
        # The backward of "decode" is another plan's.
        for direction in ("fwd",) if plan == "decode" else ("fwd", "bwd"):
            found.append(_row(counted, name, direction))
    return found


def _row(counted: Counted, plan: str, direction: str) -> TrafficRow:
    traffic = counted.traffic(direction)
    (m, k), n = counted.inputs["x"].shape, counted.y.shape[1]
    return TrafficRow(
        op="multi_lora_linear",
        direction=direction,
        plan=plan,
        sizes=(m, n, k),
        launches=traffic.launches,
        extra_passes=counted.extra_passes(direction),
        bytes_moved=traffic.bytes_moved(),
        bytes_floor=counted.floor(direction),
        atomics=traffic.atomics,
    )
