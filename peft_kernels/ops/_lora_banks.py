"""What multi_lora_linear reads besides x and the weight, and the checks of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels.ops._dtypes import acc_dtype
from peft_kernels.ops._transforms import has_values, is_batched, wants_composition

PAGE = 8  # rank rows
PLANS = ("auto", "decode", "grouped", "single")


class LoRABank(NamedTuple):
    """Many adapters of one linear layer, or of one slice of its outputs, in pages of 8 rank rows.

    Rank row q of the adapter in ``slot`` is row ``table[slot, q // 8] * 8 + q % 8`` of ``a`` and of
    ``b``. Only ``ranks[slot]`` rows are ever read: neither the rest of a last page, nor the table
    beyond the last page, nor a free page.
    """

    a: Tensor  # [pages * 8, k], float32 or the dtype of x
    b: Tensor  # [pages * 8, n] in the dtype of a: B transposed
    table: Tensor  # [slots, max_pages] int32
    ranks: Tensor  # [slots] int32; 0 is an adapter that leaves this layer as it is
    scales: Tensor  # [slots] float32, or float64 beside matrices in float64


class Routing(NamedTuple):
    """Which adapter each row has, and what GPU kernels need to find an adapter's rows."""

    ids: Tensor  # int32, any shape: entry i serves the i-th of as many equal parts of the rows
    order: Tensor | None = None  # [ids.numel()] int32: entries by adapter, those without one last
    starts: Tensor | None = None  # [slots + 2] int32: where each adapter's entries begin in order


class BankDropout(NamedTuple):
    """The dropout of each adapter of a bank; a row's mask depends on its place among the rows of
    its own adapter, so that an adapter trains alike alone and among others."""

    p: Tensor  # [slots] float64, in [0, 1)
    seeds: Tensor  # [slots] int64


class Trained(NamedTuple):
    """The adapters of a bank that want gradients.

    ``a`` [r, k] and ``b`` [r, n] are the tensors that receive them, in an order that ``rows``
    gives: row q of an adapter's gradient is row ``rows[slot] + q`` of all of them on end. Forward
    and backward read the values in the bank; let these be views of its pages.
    """

    rows: Tensor  # [slots] int32; -1 for an adapter that wants none
    a: Sequence[Tensor]
    b: Sequence[Tensor]


def route(ids: Tensor, slots: int) -> Routing:
    """Sorts the rows by adapter, on the device of ``ids`` and without waiting for it.

    For a GPU compute it once and hand it to every layer with this number of slots; CPU kernels need
    no more than the ids.
    """
    ids = ids.to(torch.int32)
    return Routing(ids) if ids.device.type == "cpu" else Routing(ids, *sort_by_adapter(ids, slots))


# Rows of decoding, up to so many, have a plan of their own where at least every fourth brings
# another adapter: sorted, a tile of 64 would walk as many runs one after the other. Not measured.
SCATTERED_MAX_ROWS, SCATTERED_ROWS_PER_ADAPTER = 256, 4


def plan_of(ids: Sequence[int]) -> str:
    """The plan for rows of these adapters, one id each, as far as their variety tells."""
    if len(ids) > SCATTERED_MAX_ROWS:
        return "auto"
    adapters = len(set(ids) - {-1})
    return "decode" if adapters * SCATTERED_ROWS_PER_ADAPTER >= len(ids) > 0 else "auto"


def sort_by_adapter(ids: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """``order`` and ``starts`` of a :class:`Routing`; an id outside [0, slots) is none."""
    flat = ids.flatten()
    keys = torch.where((flat >= 0) & (flat < slots), flat, slots)
    keys, order = torch.sort(keys, stable=True)
    bounds = torch.arange(slots + 2, dtype=torch.int32, device=ids.device)
    return order.to(torch.int32), torch.searchsorted(keys, bounds, out_int32=True)


# ---- checks ----------------------------------------------------------------------------------


# The checks run on every call, so a message is only put together when it is raised.
def check_banks(x: Tensor, base: Tensor, banks: Sequence[LoRABank], n: int) -> None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"x must be float32, float16, bfloat16 or float64; got {x.dtype}")
    if base.device != x.device:
        raise ValueError(f"weight and y must be on x's device {x.device}; got {base.device}")
    if not banks:
        raise ValueError("banks must hold at least one LoRABank; got none")
    slots, width = banks[0].ranks.shape[0], 0
    for bank in banks:
        a, b = bank.a, bank.b
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[0] or a.shape[0] % PAGE:
            raise ValueError(
                f"a bank's a and b must be [pages * {PAGE}, k] and [pages * {PAGE}, n]; "
                f"got {tuple(a.shape)} and {tuple(b.shape)}"
            )
        if a.shape[1] != x.shape[-1]:
            raise ValueError(
                f"a bank's a must have x's k = {x.shape[-1]} columns; got {a.shape[1]}"
            )
        if a.dtype is not b.dtype or (a.dtype is not x.dtype and a.dtype is not acc_dtype(x)):
            raise TypeError(
                f"a bank's a and b must both be {acc_dtype(x)} or have x's dtype {x.dtype}; "
                f"got {a.dtype} and {b.dtype}"
            )
        if not (a.is_contiguous() and b.is_contiguous() and bank.table.is_contiguous()):
            raise ValueError("a bank's a, b and table must be contiguous")
        if bank.table.dim() != 2 or bank.table.shape[0] != slots:
            raise ValueError(
                f"a bank's table must be [slots, max_pages] with {slots} slots; "
                f"got {tuple(bank.table.shape)}"
            )
        if bank.ranks.shape != (slots,) or bank.scales.shape != (slots,):
            raise ValueError(
                f"a bank's ranks and scales must be [{slots}]; "
                f"got {tuple(bank.ranks.shape)} and {tuple(bank.scales.shape)}"
            )
        if bank.table.dtype is not torch.int32 or bank.ranks.dtype is not torch.int32:
            raise TypeError(
                f"a bank's table and ranks must be int32; got {bank.table.dtype} and "
                f"{bank.ranks.dtype}"
            )
        if bank.scales.dtype is not torch.float32 and not (
            bank.scales.dtype is a.dtype is torch.float64
        ):
            raise TypeError(
                "a bank's scales must be float32, or float64 beside matrices in float64; "
                f"got {bank.scales.dtype}"
            )
        for tensor in bank:
            if tensor.device != x.device:
                raise ValueError(f"a bank must be on x's device {x.device}; got {tensor.device}")
        if a.requires_grad or b.requires_grad:
            raise ValueError("a bank receives no gradients; name the tensors that do in `trained`")
        if bank.scales.requires_grad:
            raise ValueError("a bank's scales receive no gradients: hand in scales.detach()")
        width += b.shape[1]
    if width != n:
        raise ValueError(f"the banks' widths must add up to the {n} outputs; they are {width}")


def check_ids(x: Tensor, slots: int, routing: Routing) -> None:
    ids, m = routing.ids, x.shape[0]
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be int32 or int64; got {ids.dtype}")
    if ids.device != x.device:
        raise ValueError(f"ids must be on x's device {x.device}; got {ids.device}")
    count = ids.numel()
    if m and (count == 0 or m % count):
        raise ValueError(f"ids must serve x's {m} rows in equal parts; got {count} ids")
    if wants_composition() and is_batched(ids):
        raise ValueError(
            "ids can't be mapped over by vmap, for every row looks its adapter up by its id; map "
            "over x alone, or put the rows in one batch"
        )
    if has_values(ids):
        low, high = _bounds(ids)
        if low < -1 or high >= slots:
            raise ValueError(f"ids must be in [-1, {slots}); got {low if low < -1 else high}")


def _bounds(ids: Tensor) -> tuple[int, int]:
    """The least and the greatest: of a few, as of a batch that decodes, found sooner in Python."""
    if ids.numel() > 64:
        low, high = torch.aminmax(ids)
        return int(low), int(high)
    values = ids.flatten().tolist()
    return min(values), max(values)


def check_companions(banks, dropouts, trained, plan: str) -> None:
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}; got {plan!r}")
    for name, given in (("dropout", dropouts), ("trained", trained)):
        if given and len(given) != len(banks):
            raise ValueError(
                f"{name} must be given for each of {len(banks)} banks; got {len(given)}"
            )
    for bank, drop in zip(banks, dropouts or (), strict=False):
        slots = bank.ranks.shape
        if drop.p.shape != slots or drop.seeds.shape != slots:
            raise ValueError(
                f"dropout's p and seeds must be {list(slots)}; "
                f"got {list(drop.p.shape)} and {list(drop.seeds.shape)}"
            )
        if drop.p.dtype is not torch.float64 or drop.seeds.dtype is not torch.int64:
            raise TypeError(
                f"dropout's p must be float64 and seeds int64; got {drop.p.dtype} and "
                f"{drop.seeds.dtype}"
            )
    for bank, one in zip(banks, trained, strict=False):
        if one.rows.shape != bank.ranks.shape or one.rows.dtype is not torch.int32:
            raise ValueError(
                f"trained.rows must be int32 of shape {list(bank.ranks.shape)}; "
                f"got {one.rows.dtype} of shape {list(one.rows.shape)}"
            )
        for a, b in zip(one.a, one.b, strict=True):
            if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[0]:
                raise ValueError(
                    f"trained.a and trained.b must be [r, k] and [r, n]; got {tuple(a.shape)} "
                    f"and {tuple(b.shape)}"
                )
            if a.shape[1] != bank.a.shape[1] or b.shape[1] != bank.b.shape[1]:
                raise ValueError(
                    f"trained.a and trained.b must have the bank's {bank.a.shape[1]} and "
                    f"{bank.b.shape[1]} columns; got {a.shape[1]} and {b.shape[1]}"
                )
