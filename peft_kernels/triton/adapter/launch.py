"""Launchers of the Triton kernels of ``adapter``: which kernel, on which grid, in which order.

The maths and the schemas are in ``peft_kernels/ops/adapter.py``, the kernels in
``kernels.py`` and ``bwd_kernels.py``. A program owns a block of rows from x to y,
and from dy to dx; only the sums over rows (G, dD) are kernels of their own, split over the rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_kernels.ops._dropout import threshold
from peft_kernels.triton.adapter import bwd_kernels as bwd_kernels
from peft_kernels.triton.adapter import kernels, tiles
from peft_kernels.triton.common import chips
from peft_kernels.triton.common.blocks import INTERPRET
from peft_kernels.triton.common.chips import Tile
from peft_kernels.triton.common.launch import argument, chunks, launch, options, sum_partials
from peft_kernels.triton.common.sizes import cdiv
from peft_kernels.triton.lora_linear import kernels as lora_kernels

FOLD_BLOCK = 1024  # of k
DOWN_GRAD_BLOCK_K, DOWN_GRAD_BLOCK_R = 128, 16


# ---- forward -----------------------------------------------------------------------------------


def adapter_fwd(
    x: Tensor,
    residual: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    scale: float,
    scale_t: Tensor | None,
    pre_norm_weight: Tensor | None,
    pre_norm_bias: Tensor | None,
    pre_norm_eps: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    activation: str,
    adds_x: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y ``[m, n]`` in x's dtype, z ``[m, r]`` and the statistics ``[m, 2 x norms]`` in float32."""
    call = _Call(
        x, residual, down_weight, down_bias, up_weight, up_bias, scale, scale_t,
        pre_norm_weight, pre_norm_bias, norm_weight, norm_bias, activation, adds_x, dropout_p, seed,
    )  # fmt: skip
    y, z = x.new_empty(call.m, call.n), x.new_empty(call.m, call.r, dtype=torch.float32)
    statistics = z.new_empty(call.m, call.statistics)
    tile = call.tile("fwd")
    with torch.cuda.device_of(x):
        launch(
            kernels.adapter_fwd_kernel,
            (cdiv(call.m, tile.m),),
            x, residual, down_weight, call.down_bias, up_weight, call.up_bias, call.scale,
            call.pre_norm_weight, call.fold(), pre_norm_eps, call.norm_weight, call.norm_bias,
            norm_eps, y, z, statistics, *call.dropout, call.m, call.k, call.r, call.n,
            *x.stride(), *call.residual_strides, *down_weight.stride(), *up_weight.stride(),
            HAS_DOWN_BIAS=down_bias is not None, HAS_NORM_BIAS=norm_bias is not None,
            **call.flags, BLOCK_K=tile.k, **call.block(tile),
        )  # fmt: skip
    return y, z, statistics


# ---- backward ----------------------------------------------------------------------------------


def adapter_bwd(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    scale: float,
    scale_t: Tensor | None,
    pre_norm_weight: Tensor | None,
    pre_norm_bias: Tensor | None,
    pre_norm_eps: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    z: Tensor,
    statistics: Tensor,
    activation: str,
    adds_x: bool,
    dropout_p: float,
    seed: Tensor | None,
    needs_x: bool,
    needs_residual: bool,
    needs_down: bool,
    needs_up: bool,
    needs_pre_norm: bool,
    needs_norm: bool,
) -> tuple[Tensor, ...]:
    """dx, dt, dD, db_d, G, g0, the gradients of pre_norm and norm; of size 0 where not needed."""
    call = _Call(
        x, residual, down_weight, down_bias, up_weight, up_bias, scale, scale_t,
        pre_norm_weight, pre_norm_bias, norm_weight, norm_bias, activation, adds_x, dropout_p, seed,
    )  # fmt: skip
    z, statistics = z.contiguous(), statistics.contiguous()
    dx, d_residual = x.new_empty(0), x.new_empty(0)
    d_norm, up, up_sum, d_down, d_down_bias, d_pre_norm = (z.new_empty(0) for _ in range(6))
    with torch.cuda.device_of(x):
        g = dy
        if call.norm:
            g, d_residual, d_norm = _norm(call, dy, z, statistics, needs_residual, needs_norm)
        if needs_up:
            up, up_sum = _up(call, g, z)
        if needs_x or needs_down or needs_pre_norm:
            dx, dz, dz_sums = _rows(call, g, z, statistics, needs_x)
        if needs_down or needs_pre_norm:
            down, down_bias, pre_norm = _down(call, dz, dz_sums, needs_down)
            if needs_down:
                d_down, d_down_bias = down, down_bias
            if needs_pre_norm:
                d_pre_norm = pre_norm
    return dx, d_residual, d_down, d_down_bias, up, up_sum, d_pre_norm, d_norm


def _norm(
    call: _Call, dy: Tensor, z: Tensor, statistics: Tensor, needs_residual: bool, needs_norm: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dt in float32, the residual's gradient (dt in x's dtype) and those of norm."""
    tile, x = call.tile("norm_bwd"), call.x
    blocks = cdiv(call.m, tile.m)
    dt = z.new_empty(call.m, call.n)
    stores_residual = needs_residual and x.dtype is not torch.float32
    d_residual = x.new_empty(call.m, call.n) if stores_residual else dt
    sums = z.new_empty(blocks, 2, call.n if needs_norm else 0)
    launch(
        bwd_kernels.adapter_norm_bwd_kernel,
        (blocks,),
        dy, x, call.residual, call.up_weight, call.up_bias, call.scale, call.norm_weight, z,
        statistics, dt, d_residual, sums, *call.dropout, call.m, call.n, call.r,
        *dy.stride(), *x.stride(), *call.residual_strides, *call.up_weight.stride(),
        NEEDS_RESIDUAL=stores_residual, NEEDS_NORM=needs_norm,
        **call.named("ADDS_X", "HAS_RESIDUAL", "HAS_UP_BIAS", "PRE_NORM", "CHANNELS",
                     "SCALE_ON_DEVICE", "ONE_BLOCK", "WIDE"),
        **call.block(tile),
    )  # fmt: skip
    d_norm = sum_partials(sums, z.new_empty(2, call.n), 1.0) if needs_norm else z.new_empty(0)
    return dt, d_residual if needs_residual else x.new_empty(0), d_norm


def _rows(
    call: _Call, g: Tensor, z: Tensor, statistics: Tensor, needs_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dz (times the reciprocal deviation with pre_norm), and by block dz's sums over rows."""
    tile, x = call.tile("bwd"), call.x
    blocks = cdiv(call.m, tile.m)
    dx = x.new_empty(x.shape if needs_x else (0,))
    dz, dz_sums = z.new_empty(call.m, call.r), z.new_empty(blocks, 2, call.r)
    launch(
        bwd_kernels.adapter_bwd_kernel,
        (blocks,),
        g, x, call.down_weight, call.up_weight, call.scale, call.pre_norm_weight, call.fold(), z,
        statistics, dz, dx, dz_sums, *call.dropout, call.m, call.k, call.r, call.n,
        *g.stride(), *x.stride(), *call.down_weight.stride(), *call.up_weight.stride(),
        NEEDS_X=needs_x,
        **call.named("ADDS_X", "PRE_NORM", "NORM", "CHANNELS", "SCALE_ON_DEVICE", "ONE_BLOCK",
                     "WIDE", "TERMS"),
        BLOCK_K=tile.k, **call.block(tile),
    )  # fmt: skip
    return dx, dz, dz_sums


def _up(call: _Call, g: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """G = g^T act(z) and the sum of g over rows."""
    tile = call.tile("up")
    rank_blocks = cdiv(call.r, call.block_r)
    programs = cdiv(call.n, tile.n) * rank_blocks
    chunk, splits = call.chunks(call.m, tile.m, programs)
    parts, sums = z.new_empty(splits, call.n, call.r), z.new_empty(splits, call.n)
    launch(
        bwd_kernels.adapter_up_kernel,
        (programs, splits),
        g, z, parts, sums, *call.dropout, call.m, call.n, call.r, chunk, *g.stride(),
        **call.named("TERMS"), **call.block(tile),
    )  # fmt: skip
    up, up_sum = z.new_empty(call.n, call.r), z.new_empty(call.n)
    return sum_partials(parts, up, 1.0), sum_partials(sums, up_sum, 1.0)


def _down(
    call: _Call, dz: Tensor, parts_of_sums: Tensor, needs_down: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dD, db_d and the gradients of pre_norm's weight and bias."""
    tile = chips.tile(call.arch_name, "grad_a", call.x.dtype, call.m)
    programs = cdiv(call.k, tile.k) * cdiv(call.r, call.block_r)
    chunk, splits = call.chunks(call.m, tile.m, programs)
    parts = dz.new_empty(splits, call.r, call.k)
    slots = chips.joined_slots(call.arch_name, "grad_a", call.x.dtype, call.terms, call.block_r)
    launch(
        lora_kernels.grad_a_kernel,
        (programs, splits),
        call.x, dz, parts, 0, 0, 1.0, call.m, call.k, call.r, chunk, *call.x.stride(),
        DROPOUT=False, SEED_ON_DEVICE=False, TERMS=call.terms, SLOTS=slots,
        PRECISION=chips.float32_precision(call.x.device),
        BLOCK_M=tile.m, BLOCK_K=tile.k, BLOCK_R=call.block_r, **options(tile),
    )  # fmt: skip
    d_down, d_pre_norm = dz.new_empty(call.r, call.k), dz.new_empty(2, call.k)
    dz_sums = sum_partials(parts_of_sums, dz.new_empty(2, call.r), 1.0)
    if call.pre_norm_weight is None:
        return sum_partials(parts, d_down, 1.0), dz_sums[0], d_pre_norm
    launch(
        bwd_kernels.adapter_down_kernel,
        (cdiv(call.k, DOWN_GRAD_BLOCK_K),),
        parts, dz_sums, call.down_weight, call.pre_norm_weight, call.pre_norm_bias, d_down,
        d_pre_norm, splits, call.k, call.r, *call.down_weight.stride(),
        HAS_PRE_BIAS=call.pre_norm_bias is not None, NEEDS_DOWN=needs_down,
        BLOCK_K=DOWN_GRAD_BLOCK_K, BLOCK_R=DOWN_GRAD_BLOCK_R,
    )  # fmt: skip
    return d_down, dz_sums[0], d_pre_norm


# ---- what the launches of one call share -------------------------------------------------------


class _Call:
    """The tensors, sizes, tiles and kernel flags of one call of the op."""

    def __init__(
        self,
        x: Tensor,
        residual: Tensor | None,
        down_weight: Tensor,
        down_bias: Tensor | None,
        up_weight: Tensor,
        up_bias: Tensor | None,
        scale: float,
        scale_t: Tensor | None,
        pre_norm_weight: Tensor | None,
        pre_norm_bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        activation: str,
        adds_x: bool,
        dropout_p: float,
        seed: Tensor | None,
    ) -> None:
        self.m, self.k = x.shape
        self.n, self.r = up_weight.shape
        self.x, self.residual = x, residual
        self.down_weight, self.up_weight = down_weight, up_weight
        vectors = (down_bias, up_bias, pre_norm_weight, pre_norm_bias, norm_weight, norm_bias)
        (
            self.down_bias, self.up_bias, self.pre_norm_weight, self.pre_norm_bias,
            self.norm_weight, self.norm_bias,
        ) = (None if vector is None else vector.contiguous() for vector in vectors)  # fmt: skip
        self.residual_strides = (0, 0) if residual is None else residual.stride()
        self.norm, pre_norm = norm_weight is not None, pre_norm_weight is not None
        self.statistics = 2 * (self.norm + pre_norm)
        parameters = (down_weight, up_weight, *vectors)
        self.wide = any(p is not None and p.dtype is not x.dtype for p in parameters)
        self.terms = chips.terms(x.dtype, torch.float32 if self.wide else x.dtype)
        self.arch_name = chips.arch_name(x.device)
        self.block_r = chips.rank_block(self.r)
        self.scale: Any
        channels, scale_on_device = scale_t is not None and scale_t.dim() == 1, False
        if scale_t is not None and channels:
            self.scale = scale_t.to(x.device).contiguous()
        else:
            self.scale, scale_on_device = argument(scale_t, scale)
        key, seed_on_device = argument(seed, 0)
        self.dropout = (key, threshold(dropout_p), 1.0 / (1.0 - dropout_p))
        self.flags = {
            "ACTIVATION": activation,
            "ADDS_X": adds_x,
            "HAS_RESIDUAL": residual is not None,
            "HAS_UP_BIAS": up_bias is not None,
            "PRE_NORM": pre_norm,
            "NORM": self.norm,
            "DROPOUT": seed is not None,
            "CHANNELS": channels,
            "SCALE_ON_DEVICE": scale_on_device,
            "SEED_ON_DEVICE": seed_on_device,
            "ONE_BLOCK": self.r <= self.block_r,
            "WIDE": self.wide,
            "TERMS": self.terms,
            "PRECISION": self._precision(),
        }

    def _precision(self) -> str:
        """Of products of float32 tiles; beside a 16-bit x they are split for the tensor cores."""
        parts = "bf16x6" if self.wide and self.norm else "bf16x3"
        return chips.precision(self.x.device, self.x.dtype, "ieee" if INTERPRET.value else parts)

    def tile(self, kernel: str) -> Tile:
        return tiles.tile(self.arch_name, kernel, self.x.dtype, wide=self.wide)

    def named(self, *names: str) -> dict[str, Any]:
        """These flags, and those that every kernel of tiles has."""
        names += ("ACTIVATION", "DROPOUT", "SEED_ON_DEVICE", "PRECISION")
        return {name: self.flags[name] for name in names}

    def block(self, tile: Tile) -> dict[str, int]:
        return {
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "BLOCK_R": self.block_r,
            **options(tile),
        }

    def chunks(self, length: int, block: int, programs: int) -> tuple[int, int]:
        return chunks(chips.cores(self.x.device), length, block, programs)

    def fold(self) -> Tensor | None:
        """[2, r]: pre_norm's weight and bias through D, the bias with b_d."""
        if self.pre_norm_weight is None:
            return None
        fold = self.x.new_empty(2, self.r, dtype=torch.float32)
        launch(
            kernels.adapter_fold_kernel,
            (self.r,),
            self.down_weight, self.pre_norm_weight, self.pre_norm_bias, self.down_bias, fold,
            self.k, self.r, *self.down_weight.stride(),
            HAS_PRE_BIAS=self.pre_norm_bias is not None, HAS_DOWN_BIAS=self.down_bias is not None,
            BLOCK_K=FOLD_BLOCK,
        )  # fmt: skip
        return fold
