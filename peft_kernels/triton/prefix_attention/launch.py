"""Launchers of the Triton kernels of ``prefix_attention``: which kernel, grid and tile.

The maths and the schemas are in ``peft_kernels/ops/prefix_attention.py``, the kernels in
``kernels.py`` and ``bwd_kernels.py``. Nothing is expanded: not
the prefix over the batch, nor keys and values over the heads that share them, nor a mask. What is
written beyond out and the gradients is lse and delta, a float32 a row each; with few queries over
many keys, out and lse of some parts of the keys; and the parts of the prefixes' gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_kernels.ops.prefix_attention import prefix_attention_bwd_ref, prefix_attention_fwd_ref
from peft_kernels.triton.common import chips, dependent
from peft_kernels.triton.common.chips import Tile
from peft_kernels.triton.common.launch import MAX_SPLITS, launch, options, sum_partials
from peft_kernels.triton.common.sizes import cdiv, next_power_of_2
from peft_kernels.triton.prefix_attention import bwd_kernels as bwd_kernels
from peft_kernels.triton.prefix_attention import kernels, tiles

FEW_ROWS = 16
# A part of the keys has so many per row of its tile, so that storing its out in float32, and
# reading that again, is an eighth of reading its keys and values.
PART_KEYS_PER_ROW = 16
COMBINE_WARPS, DELTA_BLOCK_M, DELTA_WARPS = 4, 32, 4


def prefix_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_ids: Tensor | None,
    mask: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out ``[B, Hq, S, D]``, in memory ``[B, S, Hq, D]``, and lse ``[B, Hq, S]`` float32."""
    if not tiles.has_room(chips.arch_name(q.device), q.dtype, q.shape[-1]):
        return prefix_attention_fwd_ref(
            q, k, v, prefix_k, prefix_v, prefix_ids, mask, starts, ends, is_causal, scale
        )
    call = _Call(q, k, v, prefix_k, prefix_v, prefix_ids, mask, starts, ends, is_causal, scale)
    with torch.cuda.device_of(q):
        return call.forward()


def prefix_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_ids: Tensor | None,
    mask: Tensor | None,
    starts: Tensor | None,
    ends: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    needs_q: bool,
    needs_kv: bool,
    needs_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and the prefixes' dk and dv; of size 0 where not needed."""
    if not tiles.has_room(chips.arch_name(q.device), q.dtype, q.shape[-1]):
        return prefix_attention_bwd_ref(
            dout, q, k, v, prefix_k, prefix_v, prefix_ids, mask, starts, ends, out, lse,
            is_causal, scale, needs_q, needs_kv, needs_prefix,
        )  # fmt: skip
    call = _Call(q, k, v, prefix_k, prefix_v, prefix_ids, mask, starts, ends, is_causal, scale)
    dq, dk, dv = q.new_empty(0), k.new_empty(0), v.new_empty(0)
    d_prefix_k, d_prefix_v = (q.new_empty(0, dtype=torch.float32) for _ in "kv")
    with torch.cuda.device_of(q):
        if needs_q or needs_kv or needs_prefix:
            saved = call.saved(_by_columns(dout), out, lse)
        if needs_q:
            dq = call.query_grad(*saved)
        if needs_kv:
            dk, dv = call.text_grad(*saved)
        if needs_prefix:
            d_prefix_k, d_prefix_v = call.prefix_grad(*saved)
    return dq, dk, dv, d_prefix_k, d_prefix_v


# ---- what the launches of one call share -------------------------------------------------------


def _by_columns(tensor: Tensor) -> Tensor:
    """With the elements of a row side by side: the tensor itself, but for odd views."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


class _Call:
    """The tensors, sizes, tiles and kernel flags of one call of the op."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        prefix_ids: Tensor | None,
        mask: Tensor | None,
        starts: Tensor | None,
        ends: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> None:
        self.q, self.k, self.v = _by_columns(q), _by_columns(k), _by_columns(v)
        self.prefix_k, self.prefix_v = _by_columns(prefix_k), _by_columns(prefix_v)
        # The kernels know a boolean mask by its bytes.
        bools = mask is not None and mask.dtype is torch.bool
        self.mask = mask.view(torch.uint8) if mask is not None and bools else mask
        self.prefix_ids, self.starts, self.ends = prefix_ids, starts, ends
        self.batch, self.query_heads, self.queries, self.size = q.shape
        _, self.heads, self.keys, _ = k.shape
        self.prefixes, _, self.length, _ = prefix_k.shape
        self.group = self.query_heads // self.heads
        self.rows = self.queries * self.group  # of a KV head
        self.scale, self.factor = scale, scale * 1.4426950408889634
        self.arch_name = chips.arch_name(q.device)
        self.cores = chips.cores(q.device)
        self.block_d = max(16, next_power_of_2(self.size))
        self.causal = is_causal

    def tile(self, kernel: str) -> Tile:
        has_mask = self.mask is not None
        return tiles.tile(self.arch_name, kernel, self.q.dtype, self.block_d, has_mask=has_mask)

    def flags(self, tile: Tile) -> dict[str, Any]:
        return {
            "GROUP": self.group,
            "PADDED": self.block_d != self.size,
            "PRECISION": chips.precision(self.q.device, self.q.dtype),
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "BLOCK_D": self.block_d,
            **options(tile),
        }

    def sources(self) -> tuple[Tensor | None, ...]:
        return (
            self.q, self.k, self.v, self.prefix_k, self.prefix_v, self.prefix_ids, self.mask,
            self.starts, self.ends,
        )  # fmt: skip

    def strides(self) -> tuple[tuple[int, ...], ...]:
        """Of q, k, v, the prefixes and the mask; the columns of the former lie side by side."""
        tensors = (self.q, self.k, self.v, self.prefix_k, self.prefix_v)
        return *(tensor.stride()[:3] for tensor in tensors), self.mask_strides()

    def mask_strides(self) -> tuple[int, ...]:
        return (0, 0, 0, 0) if self.mask is None else self.mask.stride()

    def by_query(self, *lead: int, dtype: torch.dtype) -> Tensor:
        return self.q.new_empty(*lead, self.queries, self.query_heads, self.size, dtype=dtype)

    def by_row(self, *lead: int) -> Tensor:
        shape = (*lead, self.query_heads, self.queries)
        return self.q.new_empty(shape, dtype=torch.float32)

    # -- forward

    def forward(self) -> tuple[Tensor, Tensor]:
        tile = self.tile("few" if self.rows <= FEW_ROWS else "fwd")
        splits, chunk = self.parts_of_keys(tile)
        out, lse = self.by_query(self.batch, dtype=self.q.dtype), self.by_row(self.batch)
        out_parts, lse_parts = out, lse
        if splits > 1:
            out_parts = self.by_query(self.batch, splits, dtype=torch.float32)
            lse_parts = self.by_row(self.batch, splits)
        pdl = splits > 1 and dependent.launches(self.arch_name, self.q.device)
        launch(
            kernels.prefix_attention_fwd_kernel,
            (cdiv(self.rows, tile.m) * splits * self.heads * self.batch,),
            *self.sources(), out_parts, lse_parts,
            self.heads, self.queries, self.keys, self.length, self.size, splits, chunk,
            self.factor, *self.strides(),
            CAUSAL=self.causal, **self.flags(tile), **dependent.first(pdl),
        )  # fmt: skip
        if splits > 1:
            launch(
                kernels.prefix_attention_combine_kernel,
                (self.batch * self.queries * self.query_heads,),
                out_parts, lse_parts, out, lse, self.query_heads, self.queries, self.size, splits,
                SPLITS=next_power_of_2(splits), BLOCK_D=self.block_d,
                num_warps=COMBINE_WARPS, **dependent.second(pdl),
            )  # fmt: skip
        return out.transpose(1, 2), lse

    def parts_of_keys(self, tile: Tile) -> tuple[int, int]:
        """(parts, text keys a part): more than one where few rows don't fill the GPU."""
        if self.rows > tile.m:
            return 1, self.keys
        wanted = 2 * self.cores // max(self.heads * self.batch, 1)
        wanted = min(wanted, self.keys // (PART_KEYS_PER_ROW * tile.m), MAX_SPLITS)
        if wanted < 2:
            return 1, self.keys
        chunk = tile.n * cdiv(cdiv(self.keys, tile.n), wanted)
        return cdiv(self.keys, chunk), chunk

    # -- backward

    def saved(self, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dout, lse and delta."""
        out = out.transpose(1, 2).contiguous()
        delta, rows = self.by_row(self.batch), self.batch * self.queries * self.query_heads
        launch(
            bwd_kernels.prefix_attention_delta_kernel,
            (cdiv(rows, DELTA_BLOCK_M),),
            dout, out, delta, rows, self.query_heads, self.queries, self.size, dout.stride()[:3],
            BLOCK_M=DELTA_BLOCK_M, BLOCK_D=self.block_d, num_warps=DELTA_WARPS,
        )  # fmt: skip
        return dout, lse.contiguous(), delta

    def query_grad(self, dout: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
        tile = self.tile("query_grad")
        dq = self.by_query(self.batch, dtype=self.q.dtype)
        launch(
            bwd_kernels.prefix_attention_query_grad_kernel,
            (cdiv(self.rows, tile.m) * self.heads * self.batch,),
            dout, *self.sources(), lse, delta, dq,
            self.heads, self.queries, self.keys, self.length, self.size, self.scale, self.factor,
            dout.stride()[:3], *self.strides(),
            CAUSAL=self.causal, **self.flags(tile),
        )  # fmt: skip
        return dq.transpose(1, 2)

    def text_grad(self, dout: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        tile = self.tile("text_grad")
        shape = (self.batch, self.keys, self.heads, self.size)
        dk, dv = self.k.new_empty(shape), self.v.new_empty(shape)
        launch(
            bwd_kernels.prefix_attention_text_grad_kernel,
            (cdiv(self.keys, tile.n) * self.heads * self.batch,),
            dout, self.q, self.k, self.v, self.mask, self.starts, self.ends, lse, delta, dk, dv,
            self.heads, self.queries, self.keys, self.size, self.scale, self.factor,
            dout.stride()[:3], *(tensor.stride()[:3] for tensor in (self.q, self.k, self.v)),
            self.mask_strides(),
            CAUSAL=self.causal, **self.flags(tile),
        )  # fmt: skip
        return dk.transpose(1, 2), dv.transpose(1, 2)

    def prefix_grad(self, dout: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        tile = self.tile("prefix_grad")
        shape = (self.prefixes, self.heads, self.length, self.size)
        dk, dv = (self.q.new_empty(shape, dtype=torch.float32) for _ in "kv")
        programs = cdiv(self.length, tile.n) * self.heads * self.prefixes
        batch_parts, batch_chunk, row_parts, row_chunk = self.parts_of_rows(tile, programs)
        parts = batch_parts * row_parts
        dk_parts, dv_parts = dk, dv
        if parts > 1:
            dk_parts, dv_parts = (dk.new_empty(parts, *shape) for _ in "kv")
        launch(
            bwd_kernels.prefix_attention_prefix_grad_kernel,
            (programs, row_parts, batch_parts),
            dout, self.q, self.prefix_k, self.prefix_v, self.prefix_ids, lse, delta,
            dk_parts, dv_parts, self.batch, self.heads, self.prefixes, self.queries, self.length,
            self.size, batch_chunk, row_chunk, self.scale, self.factor,
            *(tensor.stride()[:3] for tensor in (dout, self.q, self.prefix_k, self.prefix_v)),
            TERMS=chips.terms(self.q.dtype, torch.float32), **self.flags(tile),
        )  # fmt: skip
        if parts > 1:
            sum_partials(dk_parts, dk, 1.0)
            sum_partials(dv_parts, dv, 1.0)
        return dk, dv

    def parts_of_rows(self, tile: Tile, programs: int) -> tuple[int, int, int, int]:
        """Parts of the batch and its rows in each, parts of a row's tiles and rows in each."""
        wanted = 2 * self.cores // max(programs, 1)
        wanted = max(min(wanted, MAX_SPLITS), 1)
        batch_chunk = max(cdiv(self.batch, wanted), 1)
        batch_parts = max(cdiv(self.batch, batch_chunk), 1)
        blocks = max(cdiv(self.rows, tile.m), 1)
        row_chunk = cdiv(blocks, min(blocks, max(wanted // batch_parts, 1)))
        return batch_parts, batch_chunk, cdiv(blocks, row_chunk), row_chunk * tile.m
