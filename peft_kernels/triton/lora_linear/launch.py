"""Launchers of the Triton kernels of ``lora_linear``: which kernel, on which grid, in which order.

The maths and the schemas are in ``peft_kernels/ops/lora_linear.py``, the kernels in
``kernels.py``, the plans in ``plans.py``, the grids and options in ``layouts.py`` and the tiles in
``tilings.py`` and ``common/chips.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.triton.common import chips, cost
from peft_kernels.triton.common.launch import argument, in_terms, launch_prepared, sum_partials
from peft_kernels.triton.lora_linear import kernels, layouts, modelled, persistent, plans
from peft_kernels.triton.lora_linear.calls import Call, call_of
from peft_kernels.triton.lora_linear.layouts import Added

# ---- forward -----------------------------------------------------------------------------------


def lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    scale_t: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y ``[m, n]`` in x's dtype and S ``[m, r]`` in float32."""
    return with_gain(x, weight, bias, None, lora_a, lora_b, scale, scale_t, dropout_p, seed)


def with_gain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    scale_t: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same with ``y = gain (x W^T + scale S B^T) + bias``; gain ``[n]`` in float32."""
    factor = scale if scale_t is None else scale_t
    call = call_of("fwd", x, weight.shape[0], lora_a, dropout_p, seed, gain=gain is not None)
    bias = None if bias is None else bias.contiguous()
    run = functools.partial(_forward, call, x, weight, bias, gain, lora_a, lora_b, factor)
    with torch.cuda.device_of(x):
        return run(plans.choose(x.device, call.problem, run))


def _forward(
    call: Call,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    factor: Tensor | float,
    plan: str,
) -> tuple[Tensor, Tensor]:
    if plan in plans.TERM_PLANS:
        plan = plan.removesuffix(plans.IN_TERMS)
        lora_a = in_terms(lora_a, x.dtype, call.problem.terms())
    if plan == "ii":
        return _in_loop(call, x, weight, bias, gain, lora_a, lora_b, factor)
    if plan == "library":
        early, late = (bias, None) if gain is None else (None, bias)
        y, (p, s) = F.linear(x, weight, early), _shrink_for_add(call, x, lora_a)
        low_rank = LowRank(p, lora_b.T, factor, masked=False, total=None if p is s else s)
        return _add_low_rank(call, y, low_rank, y, late, gain, pdl=call.pdl), s
    tile = _tile_of(plan, call, x, weight.T)
    s = shrink(call, x, lora_a, pdl=call.pdl)
    y = x.new_empty(call.m, call.n)
    return tile(call, x, weight.T, bias, gain, s, lora_b.T, y, factor, masked=False), s


# ---- backward ----------------------------------------------------------------------------------


def lora_linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    scale: float,
    scale_t: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    needs_x: bool,
    needs_a: bool,
    needs_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx ``[m, k]``, dA ``[r, k]``, dB ``[n, r]``; of size 0 where not needed."""
    call = call_of("bwd", x, weight.shape[0], lora_a, dropout_p, seed)
    dx, da, db = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    with torch.cuda.device_of(x):
        factor = scale if scale_t is None else scale_t
        ds, db = from_dy(call, dy, lora_b, s.contiguous(), factor, needs_x or needs_a, needs_b, db)
        if needs_x:
            dx = grad_x(call, dy, weight, ds, lora_a)
        if needs_a:
            da = grad_a(call, x, ds, lora_a)
    return dx, da, db


def grad_x(call: Call, dy: Tensor, weight: Tensor, ds: Tensor, lora_a: Tensor) -> Tensor:
    """dx = dy W + dropout(dS A): the one part of the backward that plans differ in."""
    run = functools.partial(_grad_x, call, dy, weight, ds, lora_a)
    return run(plans.choose(dy.device, call.problem, run))


def _grad_x(
    call: Call, dy: Tensor, weight: Tensor, ds: Tensor, lora_a: Tensor, plan: str
) -> Tensor:
    factor = call.inv_keep
    if plan == "library":
        dx = torch.mm(dy, weight)
        return _add_low_rank(call, dx, LowRank(ds, lora_a, factor, masked=True), dx)
    dx = dy.new_empty(call.m, call.k, dtype=call.problem.dtype)
    tile = _tile_of(plan, call, dy, weight)
    return tile(call, dy, weight, None, None, ds, lora_a, dx, factor, masked=True)


# ---- launches ----------------------------------------------------------------------------------


def shrink(call: Call, x: Tensor, lora_a: Tensor, pdl: bool = False) -> Tensor:
    """S = dropout(x) A^T; A is [r, k], or [terms, r, k]. ``pdl``: what reads S is next."""
    return _sum_of(_shrink(call, x, lora_a, pdl), pdl)


def _shrink_for_add(call: Call, x: Tensor, lora_a: Tensor) -> tuple[Tensor, Tensor]:
    """S, or parts of it that the launch after the library's GEMM adds up, and where S is then."""
    in_terms = lora_a.dim() == 3
    splits = modelled.parts_of_s(call.arch_name, call.problem, in_terms, call.chip)
    parts = _shrink(call, x, lora_a, call.pdl, splits)
    if splits:
        return parts, torch.empty_like(parts[0])
    s = _sum_of(parts, call.pdl)
    return s, s


def _sum_of(parts: Tensor, pdl: bool) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return sum_partials(parts, torch.empty_like(parts[0]), 1.0, pdl)


def _shrink(call: Call, x: Tensor, lora_a: Tensor, pdl: bool, splits: int = 0) -> Tensor:
    """Parts of S, [splits, m, r] in float32; as many as fill the GPU where it isn't said."""
    splits, chunk, prepared = call.once(
        layouts.shrink_launch, lora_a.dim() == 3, splits, call.seed_on_device, pdl
    )
    parts = x.new_empty(splits, call.m, call.r, dtype=torch.float32)
    launch_prepared(
        kernels.shrink_kernel, prepared,
        x, lora_a, parts, call.seed, call.threshold, call.inv_keep, call.m, call.k, call.r, chunk,
        *x.stride(), *_strides(lora_a),
    )  # fmt: skip
    return parts


def _strides(lora_a: Tensor) -> tuple[int, ...]:
    """Of a term, a rank and a column."""
    strides = lora_a.stride()
    return strides if len(strides) == 3 else (0, *strides)


def _in_loop(
    call: Call,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """y and S from one loop over k, or from as many as its sum is split in, and what adds them."""
    in_terms = lora_a.dim() == 3
    tiling = call.tiling("in_loop", call.once(Call.product_in_loop, in_terms))
    factor, on_device = argument(scale, 1.0)
    added = Added(bias is not None, gain is not None, on_device, call.seed_on_device)
    splits, chunk, prepared = call.once(layouts.in_loop_launch, tiling, in_terms, added)
    y, s = x.new_empty(call.m, call.n), x.new_empty(call.m, call.r, dtype=torch.float32)
    y_parts, s_parts = y, s
    if splits > 1:
        y_parts, s_parts = s.new_empty(splits, *y.shape), s.new_empty(splits, *s.shape)
    by_input, by_output = weight.stride()[::-1]
    launch_prepared(
        kernels.in_loop_kernel, prepared,
        x, weight, bias, gain, lora_a, lora_b, y_parts, s_parts, factor,
        call.seed, call.threshold, call.inv_keep,
        call.m, call.n, call.k, call.r, chunk,
        *x.stride(), by_input, by_output, *_strides(lora_a), *lora_b.stride(),
    )  # fmt: skip
    if splits > 1:
        low_rank = LowRank(s_parts, lora_b.T, scale, masked=False, total=s)
        _add_low_rank(call, y_parts, low_rank, y, bias, gain, pdl=call.pdl)
    return y, s


def _tile_of(plan: str, call: Call, a: Tensor, w: Tensor) -> Callable[..., Tensor]:
    """What computes ``a w`` and the low-rank part in one tile."""
    can = plan == plans.PERSISTENT and persistent.serves(call.arch_name, a, w)
    return persistent.tile if can else _tile


def _tile(
    call: Call,
    a: Tensor,
    w: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    p: Tensor,
    q: Tensor,
    out: Tensor,
    factor: Tensor | float,
    masked: bool,
) -> Tensor:
    """out = gain (a w + mask o (factor P Q)) + bias."""
    dropout = masked and call.dropout
    # A gain takes registers as a mask does.
    narrow = dropout or (gain is not None and call.m > chips.FEW_ROWS)
    (m, n), depth = out.shape, a.shape[1]
    tiling = call.tiling("tile_masked" if narrow else "tile", cost.Product(m, n, depth))
    value, on_device = argument(factor, 1.0)
    added = Added(bias is not None, gain is not None, on_device, call.seed_on_device)
    # S is made in the launch before; what is before dx may have made dB.
    pdl = call.pdl and not masked
    splits, chunk, prepared = call.once(layouts.tile_launch, tiling, n, depth, dropout, added, pdl)
    parts = p.new_empty(splits, *out.shape) if splits > 1 else out
    launch_prepared(
        kernels.tile_kernel, prepared,
        a, w, bias, gain, p, q, parts, value, call.seed, call.threshold,
        m, n, depth, call.r, chunk, *a.stride(), *w.stride(), *q.stride(),
    )  # fmt: skip
    if splits > 1:
        _add_low_rank(call, parts, LowRank(p, q, factor, masked), out, bias, gain, call.pdl)
    return out


class LowRank(NamedTuple):
    """mask o (factor P Q); P [m, r], or [parts, m, r] whose sum goes to ``total``."""

    p: Tensor
    q: Tensor
    factor: Tensor | float
    masked: bool
    total: Tensor | None = None


def _add_low_rank(
    call: Call,
    base: Tensor,
    low_rank: LowRank,
    out: Tensor,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """out = gain (base + mask o (factor P Q)) + bias; base is out, or float32 parts to add up."""
    m, n = out.shape
    parts = base.shape[0] if base.dim() > out.dim() else 1
    p, q, factor, masked, total = low_rank
    value, on_device = argument(factor, 1.0)
    added = Added(bias is not None, gain is not None, on_device, call.seed_on_device)
    parts_of_p = 0 if total is None else p.shape[0]
    dropout = masked and call.dropout
    prepared = call.once(layouts.add_launch, n, parts, parts_of_p, dropout, added, pdl)
    launch_prepared(
        kernels.add_low_rank_kernel, prepared,
        base, bias, gain, p, q, total, out, value, call.seed, call.threshold, m, n, call.r,
        *q.stride(),
    )  # fmt: skip
    return out


def from_dy(
    call: Call,
    dy: Tensor,
    lora_b: Tensor,
    s: Tensor,
    scale: Tensor | float,
    needs_ds: bool,
    needs_db: bool,
    db: Tensor,
) -> tuple[Tensor, Tensor]:
    """dS = scale dy B and dB = scale dy^T S; what isn't needed is left as it is."""
    groups, group, splits, chunk, prepared = call.once(layouts.from_dy_launch, needs_ds, needs_db)
    ds = s.new_empty(call.m if needs_ds else 0, call.r)
    ds_parts = s.new_empty(groups, *ds.shape)
    db = lora_b.new_empty(call.n if needs_db else 0, call.r) if needs_db else db
    db_parts = s.new_empty(splits, *db.shape)
    if needs_ds or needs_db:
        launch_prepared(
            kernels.from_dy_kernel, prepared,
            dy, lora_b, s, ds_parts, db_parts, call.m, call.n, call.r, group, chunk,
            *dy.stride(), *lora_b.stride(),
        )  # fmt: skip
    return sum_partials(ds_parts, ds, scale), sum_partials(db_parts, db, scale)


def grad_a(call: Call, x: Tensor, ds: Tensor, lora_a: Tensor) -> Tensor:
    """dA = dS^T dropout(x)."""
    splits, chunk, prepared = call.once(layouts.grad_a_launch, call.seed_on_device)
    parts = ds.new_empty(splits, call.r, call.k)
    launch_prepared(
        kernels.grad_a_kernel, prepared,
        x, ds, parts, call.seed, call.threshold, call.inv_keep, call.m, call.k, call.r, chunk,
        *x.stride(),
    )  # fmt: skip
    return sum_partials(parts, lora_a.new_empty(lora_a.shape), 1.0)
