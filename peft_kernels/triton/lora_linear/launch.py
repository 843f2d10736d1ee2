"""Launchers of the Triton kernels of ``lora_linear``: which kernel, on which grid, in which order.

The maths and the schemas are in ``peft_kernels/ops/lora_linear.py``, the kernels in
``kernels.py``, the plans in ``plans.py`` and the tiles in ``tilings.py`` and ``common/chips.py``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels.ops._dropout import threshold
from peft_kernels.triton.common import chips, cost
from peft_kernels.triton.common.launch import (
    GROUP_M,
    MAX_SPLITS,
    argument,
    chunks,
    in_terms,
    launch,
    options,
    sum_partials,
)
from peft_kernels.triton.common.sizes import cdiv
from peft_kernels.triton.lora_linear import kernels, modelled, persistent, plans, tilings

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
    call = Call("fwd", x, weight.shape[0], lora_a, dropout_p, seed, gain=gain is not None)
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
        return _add_low_rank(call, y, low_rank, y, late, gain), s
    s = shrink(call, x, lora_a)
    y = x.new_empty(call.m, call.n)
    tile = _tile_of(plan, call, x, weight.T)
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
    call = Call("bwd", x, weight.shape[0], lora_a, dropout_p, seed)
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


# ---- what the launches of one call share -------------------------------------------------------


class Call:
    """The sizes, tiles and dropout of one call of the op."""

    def __init__(
        self,
        direction: str,
        x: Tensor,
        n: int,
        lora_a: Tensor,
        dropout_p: float,
        seed: Tensor | None,
        codes: str = "",
        gain: bool = False,
    ) -> None:
        self.m, self.k = x.shape
        self.n, self.r = n, lora_a.shape[0]
        self.dropout = seed is not None
        self.problem = _problem(
            direction, x.dtype, lora_a.dtype, self.m, n, self.k, self.r, self.dropout, codes, gain
        )
        device = x.device
        self.arch_name, self.cores = chips.arch_name(device), chips.cores(device)
        self.chip = cost.of_device(self.arch_name, device)
        self.block_r = chips.rank_block(self.r)
        self.rank_blocks = cdiv(self.r, self.block_r)
        self.inv_keep, self.threshold = (1.0, 0) if not dropout_p else _shares(dropout_p)
        self.seed, self.seed_on_device = argument(seed, 0)
        self.precision = chips.float32_precision(device)

    def over_dense(self) -> Call:
        """The same call where its weight isn't in codes."""
        call = copy.copy(self)
        call.problem = dataclasses.replace(self.problem, codes="")
        return call

    def tile(self, kernel: str) -> chips.Tile:
        return chips.tile(self.arch_name, kernel, self.problem.dtype, self.m)

    def tiling(self, kernel: str, product: cost.Product) -> tilings.Tiling:
        return tilings.tiling(self.arch_name, kernel, self.problem.dtype, product, self.chip)

    def slots(self, kernel: str) -> int:
        """In how many slots a kernel joins the terms of S or dS."""
        terms, dtype = self.problem.terms(), self.problem.dtype
        return chips.joined_slots(self.arch_name, kernel, dtype, terms, self.block_r)

    def slots_of_a(self, kernel: str, lora_a: Tensor) -> int:
        """Those of A: [terms, r, k], or joined by the kernel."""
        if lora_a.dim() == 3:
            return chips.slots(lora_a.shape[0])
        return self.slots(kernel) if lora_a.dtype is torch.float32 else 1

    def chunks(self, length: int, block: int, programs: int) -> tuple[int, int]:
        return chunks(self.cores, length, block, programs)

    def column_groups(self, block: int) -> tuple[int, int]:
        """Splits the columns of dy in groups: (blocks in a group, groups).

        G groups and C chunks of rows fill the GPU when G C is about twice the cores; their partial
        sums, (G m + C n) r numbers, are fewest at G / C = n / m.
        """
        blocks = cdiv(self.n, block)
        wanted = 2 * self.cores / max(self.rank_blocks, 1)
        groups = round(math.sqrt(wanted * self.n / max(self.m, 1)))
        group = cdiv(blocks, min(max(groups, 1), MAX_SPLITS))
        return group, cdiv(blocks, group) if blocks else 0


_problem = functools.lru_cache(maxsize=4096)(plans.Problem)
_in_loop_of = functools.lru_cache(maxsize=4096)(modelled.in_loop)


def _shares(dropout_p: float) -> tuple[float, int]:
    """What kept elements are multiplied by, and below what the words of dropped ones are."""
    return 1.0 / (1.0 - dropout_p), threshold(dropout_p)


# ---- launches ----------------------------------------------------------------------------------


def shrink(call: Call, x: Tensor, lora_a: Tensor) -> Tensor:
    """S = dropout(x) A^T; A is [r, k], or [terms, r, k]."""
    return _sum_of(_shrink(call, x, lora_a))


def _shrink_for_add(call: Call, x: Tensor, lora_a: Tensor) -> tuple[Tensor, Tensor]:
    """S, or parts of it that the launch after the library's GEMM adds up, and where S is then."""
    in_terms = lora_a.dim() == 3
    splits = modelled.parts_of_s(call.arch_name, call.problem, in_terms, call.chip)
    parts = _shrink(call, x, lora_a, splits)
    if splits:
        return parts, torch.empty_like(parts[0])
    s = _sum_of(parts)
    return s, s


def _sum_of(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else sum_partials(parts, torch.empty_like(parts[0]), 1.0)


def _shrink(call: Call, x: Tensor, lora_a: Tensor, splits: int = 0) -> Tensor:
    """Parts of S, [splits, m, r] in float32; as many as fill the GPU where it isn't said."""
    tile = call.tile("shrink")
    block_r = min(call.block_r, chips.MAX_TERMS_BLOCK_R if lora_a.dim() == 3 else call.block_r)
    programs = cdiv(call.m, tile.m) * cdiv(call.r, block_r)
    if splits:
        chunk = _chunk(call.k, tilings.Tiling(tile, splits))
    else:
        chunk, splits = call.chunks(call.k, tile.k, programs)
        splits = max(splits, 1)  # k = 0 still has an S, of zeros
    parts = x.new_empty(splits, call.m, call.r, dtype=torch.float32)
    launch(
        kernels.shrink_kernel,
        (programs, splits),
        x, lora_a, parts, call.seed, call.threshold, call.inv_keep, call.m, call.k, call.r, chunk,
        *x.stride(), *_strides(lora_a),
        DROPOUT=call.dropout, SEED_ON_DEVICE=call.seed_on_device, TERMS=call.problem.terms(),
        SLOTS=call.slots_of_a("shrink", lora_a), PRECISION=call.precision,
        BLOCK_M=tile.m, BLOCK_K=tile.k, BLOCK_R=block_r, **options(tile),
    )  # fmt: skip
    return parts


def _strides(lora_a: Tensor) -> tuple[int, ...]:
    """Of a term, a rank and a column."""
    return (*(0,) * (3 - lora_a.dim()), *lora_a.stride())


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
    product = _in_loop_of(call.arch_name, call.problem, lora_a.dim() == 3)
    tiling = call.tiling("in_loop", product)
    tile, split = tiling.tile, tiling.splits > 1
    y, s = x.new_empty(call.m, call.n), x.new_empty(call.m, call.r, dtype=torch.float32)
    y_parts = s.new_empty(tiling.splits, *y.shape) if split else y
    s_parts = s.new_empty(tiling.splits, *s.shape) if split else s
    factor, on_device = argument(scale, 1.0)
    launch(
        kernels.in_loop_kernel,
        (cdiv(call.m, tile.m) * cdiv(call.n, tile.n), tiling.splits),
        x, weight, bias, gain, lora_a, lora_b, y_parts, s_parts, factor,
        call.seed, call.threshold, call.inv_keep,
        call.m, call.n, call.k, call.r, _chunk(call.k, tiling),
        *x.stride(), weight.stride(1), weight.stride(0), *_strides(lora_a), *lora_b.stride(),
        HAS_BIAS=bias is not None, HAS_GAIN=gain is not None,
        DROPOUT=call.dropout, SCALE_ON_DEVICE=on_device,
        SEED_ON_DEVICE=call.seed_on_device, TERMS=call.problem.terms(),
        SLOTS=call.slots_of_a("in_loop", lora_a),
        PRECISION=call.precision, SPLIT=split, GROUP_M=GROUP_M,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, BLOCK_R=call.block_r, **options(tile),
    )  # fmt: skip
    if split:
        low_rank = LowRank(s_parts, lora_b.T, scale, masked=False, total=s)
        _add_low_rank(call, y_parts, low_rank, y, bias, gain)
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
    m, n = out.shape
    product = cost.Product(m, n, a.shape[1])
    tiling = call.tiling("tile_masked" if narrow else "tile", product)
    tile, split = tiling.tile, tiling.splits > 1
    parts = p.new_empty(tiling.splits, *out.shape) if split else out
    value, on_device = argument(factor, 1.0)
    launch(
        kernels.tile_kernel,
        (cdiv(m, tile.m) * cdiv(n, tile.n), tiling.splits),
        a, w, bias, gain, p, q, parts, value, call.seed, call.threshold,
        m, n, a.shape[1], call.r, _chunk(a.shape[1], tiling),
        *a.stride(), *w.stride(), *q.stride(),
        HAS_BIAS=bias is not None, HAS_GAIN=gain is not None,
        DROPOUT=dropout, FACTOR_ON_DEVICE=on_device,
        SEED_ON_DEVICE=call.seed_on_device, PRECISION=call.precision,
        SPLIT=split, GROUP_M=GROUP_M,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        BLOCK_R=min(call.block_r, chips.MAX_TILE_BLOCK_R), **options(tile),
    )  # fmt: skip
    if split:
        _add_low_rank(call, parts, LowRank(p, q, factor, masked), out, bias, gain)
    return out


def _chunk(length: int, tiling: tilings.Tiling) -> int:
    """What each split sums over, in whole blocks; the last splits may have nothing left."""
    block = tiling.tile.k
    return block * cdiv(cdiv(length, block), tiling.splits)


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
) -> Tensor:
    """out = gain (base + mask o (factor P Q)) + bias; base is out, or float32 parts to add up."""
    m, n = out.shape
    parts = base.shape[0] if base.dim() > out.dim() else 1
    p, q, factor, masked, total = low_rank
    tile = call.tile("add_low_rank") if total is None else tilings.ADDED_S
    tile = tilings.ADDED if parts > 1 else tile
    value, on_device = argument(factor, 1.0)
    launch(
        kernels.add_low_rank_kernel,
        (cdiv(m, tile.m) * cdiv(n, tile.n),),
        base, bias, gain, p, q, total, out, value, call.seed, call.threshold, m, n, call.r,
        *q.stride(),
        HAS_BIAS=bias is not None, HAS_GAIN=gain is not None,
        DROPOUT=masked and call.dropout, FACTOR_ON_DEVICE=on_device,
        SEED_ON_DEVICE=call.seed_on_device, PRECISION=call.precision,
        PARTS=parts, P_PARTS=1 if total is None else p.shape[0], GROUP_M=GROUP_M,
        BLOCK_M=tile.m, BLOCK_N=tile.n,
        BLOCK_R=min(call.block_r, chips.MAX_TILE_BLOCK_R), **options(tile),
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
    tile = call.tile("from_dy")
    group, groups = call.column_groups(tile.n)
    chunk, splits = call.chunks(call.m, tile.m, groups * call.rank_blocks)
    ds = s.new_empty(call.m if needs_ds else 0, call.r)
    ds_parts = s.new_empty(groups, *ds.shape)
    db = lora_b.new_empty(call.n if needs_db else 0, call.r) if needs_db else db
    db_parts = s.new_empty(splits, *db.shape)
    if needs_ds or needs_db:
        launch(
            kernels.from_dy_kernel,
            (groups * call.rank_blocks, splits),
            dy, lora_b, s, ds_parts, db_parts, call.m, call.n, call.r, group, chunk,
            *dy.stride(), *lora_b.stride(),
            NEEDS_DS=needs_ds, NEEDS_DB=needs_db, TERMS=call.problem.terms(),
            SLOTS=call.slots("from_dy"), PRECISION=call.precision,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_R=call.block_r, **options(tile),
        )  # fmt: skip
    return sum_partials(ds_parts, ds, scale), sum_partials(db_parts, db, scale)


def grad_a(call: Call, x: Tensor, ds: Tensor, lora_a: Tensor) -> Tensor:
    """dA = dS^T dropout(x)."""
    tile = call.tile("grad_a")
    programs = cdiv(call.k, tile.k) * call.rank_blocks
    chunk, splits = call.chunks(call.m, tile.m, programs)
    parts = ds.new_empty(splits, call.r, call.k)
    launch(
        kernels.grad_a_kernel,
        (programs, splits),
        x, ds, parts, call.seed, call.threshold, call.inv_keep, call.m, call.k, call.r, chunk,
        *x.stride(),
        DROPOUT=call.dropout, SEED_ON_DEVICE=call.seed_on_device, TERMS=call.problem.terms(),
        SLOTS=call.slots("grad_a"), PRECISION=call.precision,
        BLOCK_M=tile.m, BLOCK_K=tile.k, BLOCK_R=call.block_r, **options(tile),
    )  # fmt: skip
    return sum_partials(parts, lora_a.new_empty(lora_a.shape), 1.0)
