"""multi_lora_linear over adapters in tensors of their own, as modules keep them.

Without gradients the CPU's kernel reads them where they lie; anything else copies them into a bank
first, for that call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import pad

from peft_kernels import _library
from peft_kernels.ops._dtypes import acc_dtype
from peft_kernels.ops._lora_banks import (
    PAGE,
    BankDropout,
    LoRABank,
    Routing,
    Trained,
    check_ids,
)
from peft_kernels.ops._rows import in_shape_of, rows_of
from peft_kernels.ops._transforms import is_special

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor[] a, Tensor[] b, float[] scales, Tensor ids)"
    " -> Tensor"
)


class LoRAFactors(NamedTuple):
    """Adapters of one linear layer, each in tensors of its own; slot i is the i-th of each list."""

    a: Sequence[Tensor]  # [r, k] in float32 or the dtype of x, all in one dtype
    b: Sequence[Tensor]  # [n, r] in the dtype of a
    scales: Sequence[float | Tensor]  # floats, or 0-d tensors without a gradient


def check_factors(x: Tensor, n: int, factors: LoRAFactors) -> None:
    """Raises a ValueError or TypeError unless these are adapters of a layer of n outputs."""
    a, b, scales = factors
    if not a or len(b) != len(a) or len(scales) != len(a):
        raise ValueError(
            "LoRAFactors must hold a, b and a scale for each of at least one adapter; "
            f"got {len(a)}, {len(b)} and {len(scales)}"
        )
    dtype, k = a[0].dtype, x.shape[-1]
    if dtype is not x.dtype and dtype is not acc_dtype(x):
        raise TypeError(f"a must be {acc_dtype(x)} or have x's dtype {x.dtype}; got {dtype}")
    device = x.device
    for one, other in zip(a, b, strict=True):
        a_shape, b_shape = one.shape, other.shape
        if len(a_shape) != 2 or a_shape[1] != k or b_shape != (n, a_shape[0]):
            raise ValueError(
                f"a and b of an adapter must be [r, {k}] and [{n}, r]; "
                f"got {tuple(a_shape)} and {tuple(b_shape)}"
            )
        if one.dtype is not dtype or other.dtype is not dtype:
            raise TypeError(f"all a and b must have one dtype; got {one.dtype} and {other.dtype}")
        if one.device != device or other.device != device:
            raise ValueError(f"a and b must be on x's device {device}; got {one.device}")


def linear_of_factors(
    linear: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    factors: LoRAFactors,
    ids: Tensor | Routing,
    bias: Tensor | None,
    dropout: BankDropout | Sequence[BankDropout] | None,
    trained: Trained | Sequence[Trained] | None,
    plan: str,
) -> Tensor:
    """y, from the adapters where they lie or from a bank of them.

    Args:
        linear: multi_lora_linear, whose checks of x, the weight and the bias have been made.
    """
    check_factors(x, weight.shape[0], factors)
    if trained is not None:
        raise ValueError("trained must be None with LoRAFactors: their own tensors are trained")
    grad = torch.is_grad_enabled()
    learns = grad and any(map(_requires_grad, (x, weight, bias, *factors.a, *factors.b)))
    if not learns and dropout is None and not is_special() and _reads_in_place(x, factors):
        return in_shape_of(x, _apart(rows_of(x), weight, bias, factors, ids))
    return linear(
        x, weight, bank_of(factors), ids,
        bias=bias, dropout=dropout, trained=trained_of(factors) if grad else None, plan=plan,
    )  # fmt: skip


def _requires_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def _reads_in_place(x: Tensor, factors: LoRAFactors) -> bool:
    return (
        x.device.type == "cpu"
        and _library.variant(x.dtype) != "_triton"
        and not any(isinstance(scale, Tensor) for scale in factors.scales)
    )


def _apart(x, weight, bias, factors: LoRAFactors, ids: Tensor | Routing) -> Tensor:
    routing = ids if isinstance(ids, Routing) else Routing(ids)
    check_ids(x, len(factors.a), routing)
    op = _library.get_op("multi_lora_linear_apart", _library.variant(x.dtype))
    a = [one if one.is_contiguous() else one.contiguous() for one in factors.a]
    b = [one if one.is_contiguous() else one.contiguous() for one in factors.b]
    return op(x, weight, bias, a, b, list(factors.scales), routing.ids.to(torch.int32))


# ---- a bank ------------------------------------------------------------------------------------


@torch.no_grad()
def bank_of(factors: LoRAFactors) -> LoRABank:
    """The adapters copied into pages, one after the other."""
    device = factors.a[0].device
    sizes = [a.shape[0] for a in factors.a]
    pages, first = [], 0
    for size in sizes:
        pages.append(range(first, first - (-size // PAGE)))
        first = pages[-1].stop
    most = max(map(len, pages))
    table = torch.tensor([[*own, *(0,) * (most - len(own))] for own in pages], dtype=torch.int32)
    ranks = torch.tensor(sizes, dtype=torch.int32)
    a = torch.cat([_whole_pages(a) for a in factors.a])
    b = torch.cat([_whole_pages(b.T) for b in factors.b])
    wide = torch.float64 if a.dtype is torch.float64 else torch.float32
    scales = _scales(factors.scales, device, wide)
    return LoRABank(a, b, table.to(device), ranks.to(device), scales)


def trained_of(factors: LoRAFactors) -> Trained | None:
    """A and B of those adapters whose matrices require gradients."""
    rows, a, b, end = [], [], [], 0
    for one, other in zip(factors.a, factors.b, strict=True):
        wanted = one.requires_grad or other.requires_grad
        rows.append(end if wanted else -1)
        if wanted:
            a.append(one)
            b.append(other.T)
            end += one.shape[0]
    if not a:
        return None
    return Trained(torch.tensor(rows, dtype=torch.int32, device=a[0].device), a, b)


def _scales(scales: Sequence[float | Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    if any(isinstance(scale, Tensor) for scale in scales):
        return torch.stack([torch.as_tensor(s, dtype=dtype, device=device) for s in scales])
    return torch.tensor(scales, dtype=dtype, device=device)


def _whole_pages(rows: Tensor) -> Tensor:
    missing = -rows.shape[0] % PAGE
    return pad(rows, (0, 0, 0, missing)) if missing else rows


# ---- reference ---------------------------------------------------------------------------------


def _apart_ref(x, weight, bias, a, b, scales, ids):
    acc, m = acc_dtype(x), x.shape[0]
    row_ids = ids.flatten().repeat_interleave(m // max(ids.numel(), 1))
    y = F.linear(x, weight, bias).to(acc)
    for slot in row_ids.unique().tolist():
        if slot >= 0:
            rows = (row_ids == slot).nonzero().flatten()
            s = x[rows].to(acc) @ a[slot].to(acc).T
            y[rows] += scales[slot] * (s @ b[slot].to(acc).T)
    return y.to(x.dtype)


def _apart_fake(x, weight, *_):
    return x.new_empty(x.shape[0], weight.shape[0])


_library.define(
    "multi_lora_linear_apart", SCHEMA, reference=_apart_ref, fake=_apart_fake, triton=None
)
