"""Launchers of the Triton kernels of ``adapter_fusion``: which kernel, grid and order.

The maths and the schemas are in ``peft_kernels/ops/adapter_fusion.py``, the kernels in
``kernels.py``. What a row keeps between the kernels is of the bottlenecks' size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from peft_kernels.triton.adapter_fusion import kernels, tiles
from peft_kernels.triton.common import chips
from peft_kernels.triton.common.blocks import INTERPRET
from peft_kernels.triton.common.chips import Tile
from peft_kernels.triton.common.launch import chunks, launch, options, sum_partials
from peft_kernels.triton.common.sizes import cdiv, next_power_of_2

WEIGHTS_BLOCK_M = 16
# A copy of M to aligned rows pays for itself from here on.
MANY_ROWS = 512


def adapter_fusion_fwd(
    x: Tensor,
    query: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    mix_weight: Tensor,
    mix_bias: Tensor,
    sizes: Sequence[int],
    activation: str,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y ``[m, n]`` in x's dtype, z ``[m, R]``, w ``[m, R + N]`` and p ``[m, N]`` in float32."""
    parameters = (down_weight, down_bias, score_weight, score_bias, mix_weight, mix_bias)
    call = _Call(x, query, parameters, sizes, activation)
    with torch.cuda.device_of(x):
        z, w = call.products((x, call.query), (down_weight, score_weight), (down_bias, score_bias))
        p, mixed = call.empty(call.m, call.adapters), torch.empty_like(z)
        launch(
            kernels.adapter_fusion_weights_kernel,
            (cdiv(call.m, WEIGHTS_BLOCK_M),),
            z, w, call.starts, p, mixed, call.m, call.ranks, call.adapters,
            **call.weights_block(),
        )  # fmt: skip
        y = call.mix((mixed, call.mix_weight.T), (p, mix_bias), residual)
    return y, z, w, p


def adapter_fusion_bwd(
    dy: Tensor,
    x: Tensor,
    query: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor,
    score_weight: Tensor,
    score_bias: Tensor,
    mix_weight: Tensor,
    mix_bias: Tensor,
    sizes: Sequence[int],
    activation: str,
    z: Tensor,
    w: Tensor,
    p: Tensor,
    needs_x: bool,
    needs_query: bool,
    needs_down: bool,
    needs_score: bool,
    needs_mix: bool,
) -> tuple[Tensor, ...]:
    """dx, dq, dD, db_d, dS and its bias's, dM and dv; of size 0 where not needed."""
    parameters = (down_weight, down_bias, score_weight, score_bias, mix_weight, mix_bias)
    call = _Call(x, query, parameters, sizes, activation)
    z, w, p = z.contiguous(), w.contiguous(), p.contiguous()
    needs_rows = needs_x or needs_query or needs_down or needs_score
    dx, dq = x.new_empty(0), x.new_empty(0)
    d_down, d_down_bias, d_score, d_score_bias, d_mix, d_mix_bias = (
        call.empty(0) for _ in range(6)
    )
    if not needs_rows and not needs_mix:
        return dx, dq, d_down, d_down_bias, d_score, d_score_bias, d_mix, d_mix_bias
    with torch.cuda.device_of(x):
        # 1. by row
        t = from_v = dpre = dw = mixed = None
        if needs_rows:
            t, from_v = call.products((dy, dy), (call.mix_weight.T, mix_bias), None)
            dpre, dw = torch.empty_like(z), torch.empty_like(w)
        if needs_mix:
            mixed = torch.empty_like(z)
        launch(
            kernels.adapter_fusion_weights_bwd_kernel,
            (cdiv(call.m, WEIGHTS_BLOCK_M),),
            z, w, p, t, from_v, call.starts, dpre, dw, mixed, call.m, call.ranks, call.adapters,
            NEEDS_ROWS=needs_rows, NEEDS_MIX=needs_mix, **call.weights_block(),
        )  # fmt: skip
        # 2. dx and dq
        if dpre is not None and dw is not None:
            from_scores = (dw, score_weight)
            if needs_x:
                dx = call.mix((dpre, down_weight), None if query is not None else from_scores)
            if needs_query:
                dq = call.mix(from_scores)
            # 3. the parameters' gradients
            if needs_down:
                d_down, d_down_bias = call.grad(x, dpre)
            if needs_score:
                d_score, d_score_bias = call.grad(call.query, dw)
        if mixed is not None:
            d_mix, _ = call.grad(dy, mixed, sums=False, transposed=True)
            d_mix_bias, _ = call.grad(dy, p, sums=False)
    return dx, dq, d_down, d_down_bias, d_score, d_score_bias, d_mix, d_mix_bias


# ---- what the launches of one call share -------------------------------------------------------


class _Call:
    """The tensors, sizes, tiles and kernel flags of one call of the op."""

    def __init__(
        self,
        x: Tensor,
        query: Tensor | None,
        parameters: tuple[Tensor, ...],
        sizes: Sequence[int],
        activation: str,
    ) -> None:
        mix_weight = parameters[4]
        self.m, self.ranks, self.adapters = x.shape[0], mix_weight.shape[1], len(sizes)
        self.x, self.query, self.activation = x, x if query is None else query, activation
        self.starts = _starts(tuple(sizes), x.device)
        self.widest = max(sizes)
        self.mix_weight = mix_weight.contiguous() if self.m >= MANY_ROWS else mix_weight
        self.wide = any(p.dtype is not x.dtype for p in parameters)
        self.terms = chips.terms(x.dtype, torch.float32 if self.wide else x.dtype)
        self.arch_name = chips.arch_name(x.device)
        self.precision = self._precision()

    def _precision(self) -> str:
        """Of products of float32 tiles; beside a 16-bit x they are split for the tensor cores."""
        if self.x.dtype is torch.float32:
            return chips.float32_precision(self.x.device)
        return "ieee" if INTERPRET.value else "bf16x3"

    def tile(self, kernel: str) -> Tile:
        return tiles.tile(self.arch_name, kernel, self.x.dtype, wide=self.wide)

    def empty(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=torch.float32)

    def weights_block(self) -> dict[str, int | str]:
        return {
            "ACTIVATION": self.activation,
            "BLOCK_M": WEIGHTS_BLOCK_M,
            "BLOCK_R": chips.rank_block(self.widest),
            "ADAPTERS": next_power_of_2(self.adapters),
            "num_warps": 8 if self.x.dtype is torch.float32 else 4,
        }

    def products(
        self,
        rows: tuple[Tensor, Tensor],
        weights: tuple[Tensor, Tensor],
        biases: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """rows[i] weights[i]^T + biases[i] for both i, in float32."""
        tile = self.tile("products")
        columns = [weight.shape[0] for weight in weights]
        outs = [self.empty(self.m, size) for size in columns]
        pair = (None, None) if biases is None else tuple(bias.contiguous() for bias in biases)
        block_n = min(tile.n, max(16, next_power_of_2(max(columns))))
        blocks = sum(cdiv(size, block_n) for size in columns)
        launch(
            kernels.adapter_fusion_products_kernel,
            (cdiv(self.m, tile.m) * blocks,),
            *rows, weights[0], pair[0], weights[1], pair[1], *outs,
            self.m, *(row.shape[1] for row in rows), *columns,
            *rows[0].stride(), *rows[1].stride(), *weights[0].stride(), *weights[1].stride(),
            HAS_BIAS=biases is not None, TERMS=self.terms, PRECISION=self.precision,
            BLOCK_M=tile.m, BLOCK_N=block_n, BLOCK_K=tile.k, **options(tile),
        )  # fmt: skip
        return outs[0], outs[1]

    def mix(
        self,
        first: tuple[Tensor, Tensor],
        second: tuple[Tensor, Tensor] | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """P1 Q1 + P2 Q2 + residual in x's dtype; each P is [m, r] float32, each Q [r, n]."""
        tile = self.tile("mix")
        (p1, q1), (p2, q2) = first, first if second is None else second
        n = q1.shape[1]
        out = self.x.new_empty(self.m, n)
        launch(
            kernels.adapter_fusion_mix_kernel,
            (cdiv(self.m, tile.m) * cdiv(n, tile.n),),
            p1, q1, p2, q2, residual, out, self.m, n, q1.shape[0], q2.shape[0],
            p1.stride(0), *q1.stride(), p2.stride(0), *q2.stride(),
            *((0, 0) if residual is None else residual.stride()),
            HAS_SECOND=second is not None, HAS_RESIDUAL=residual is not None,
            PRECISION=self.precision, BLOCK_M=tile.m, BLOCK_N=tile.n,
            BLOCK_R=chips.rank_block(q1.shape[0]), BLOCK_R2=chips.rank_block(q2.shape[0]),
            **options(tile),
        )  # fmt: skip
        return out

    def grad(
        self, rows: Tensor, g: Tensor, *, sums: bool = True, transposed: bool = False
    ) -> tuple[Tensor, Tensor]:
        """g^T rows, or rows^T g if transposed, and g's sums over rows; g is [m, r] float32."""
        tile = self.tile("grad")
        k, r = rows.shape[1], g.shape[1]
        block_r = chips.rank_block(r)
        programs = cdiv(k, tile.k) * cdiv(r, block_r)
        chunk, splits = chunks(chips.cores(self.x.device), self.m, tile.m, programs)
        shape, strides = ((k, r), (1, r)) if transposed else ((r, k), (k, 1))
        parts, sum_parts = self.empty(splits, *shape), self.empty(splits, r if sums else 0)
        launch(
            kernels.adapter_fusion_grad_kernel,
            (programs, splits),
            rows, g, parts, sum_parts, self.m, k, r, chunk, *rows.stride(), *strides,
            NEEDS_SUMS=sums, TERMS=self.terms, PRECISION=self.precision,
            BLOCK_M=tile.m, BLOCK_K=tile.k, BLOCK_R=block_r, **options(tile),
        )  # fmt: skip
        gradient = sum_partials(parts, self.empty(*shape), 1.0)
        return gradient, sum_partials(sum_parts, self.empty(sum_parts.shape[1]), 1.0)


@functools.lru_cache(maxsize=256)
def _starts(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[N + 1] int32: the first column of each adapter, and R.

    Kept, since the copy to the device waits for it; so a CUDA graph needs a call before its own.
    """
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device)
