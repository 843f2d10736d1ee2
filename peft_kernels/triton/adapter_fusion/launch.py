"""Launchers of the Triton kernels of ``adapter_fusion``: which kernel, grid and order.

The maths and the schemas are in ``peft_kernels/ops/adapter_fusion.py``, the kernels in
``kernels.py``, the grids and options in ``layouts.py``. What a row keeps between the kernels is of
the bottlenecks' size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from peft_kernels.triton.adapter_fusion import kernels, layouts
from peft_kernels.triton.common.launch import launch, launch_prepared, sum_partials

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
        launch_prepared(
            kernels.adapter_fusion_weights_kernel, call.layout.once(layouts.weights_launch),
            z, w, call.starts, p, mixed, call.m, call.ranks, call.adapters,
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
        grid, settings = call.layout.once(layouts.weights_launch)
        launch(
            kernels.adapter_fusion_weights_bwd_kernel, grid,
            z, w, p, t, from_v, call.starts, dpre, dw, mixed, call.m, call.ranks, call.adapters,
            NEEDS_ROWS=needs_rows, NEEDS_MIX=needs_mix, **settings,
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
    """The tensors and sizes of one call of the op, and the layout of its launches."""

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
        self.x, self.query = x, x if query is None else query
        self.starts = _starts(tuple(sizes), x.device)
        self.mix_weight = mix_weight.contiguous() if self.m >= MANY_ROWS else mix_weight
        self.layout = layouts.layout_of(x, parameters, sizes, activation)

    def empty(self, *shape: int) -> Tensor:
        return self.x.new_empty(*shape, dtype=torch.float32)

    def products(
        self,
        rows: tuple[Tensor, Tensor],
        weights: tuple[Tensor, Tensor],
        biases: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """rows[i] weights[i]^T + biases[i] for both i, in float32."""
        columns = weights[0].shape[0], weights[1].shape[0]
        outs = self.empty(self.m, columns[0]), self.empty(self.m, columns[1])
        pair = (None, None) if biases is None else (biases[0].contiguous(), biases[1].contiguous())
        prepared = self.layout.once(layouts.products_launch, *columns, biases is not None)
        launch_prepared(
            kernels.adapter_fusion_products_kernel, prepared,
            *rows, weights[0], pair[0], weights[1], pair[1], *outs,
            self.m, rows[0].shape[1], rows[1].shape[1], *columns,
            *rows[0].stride(), *rows[1].stride(), *weights[0].stride(), *weights[1].stride(),
        )  # fmt: skip
        return outs

    def mix(
        self,
        first: tuple[Tensor, Tensor],
        second: tuple[Tensor, Tensor] | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """P1 Q1 + P2 Q2 + residual in x's dtype; each P is [m, r] float32, each Q [r, n]."""
        (p1, q1), (p2, q2) = first, first if second is None else second
        (ranks, n), ranks2 = q1.shape, q2.shape[0]
        out = self.x.new_empty(self.m, n)
        prepared = self.layout.once(
            layouts.mix_launch, n, ranks, ranks2, second is not None, residual is not None
        )
        launch_prepared(
            kernels.adapter_fusion_mix_kernel, prepared,
            p1, q1, p2, q2, residual, out, self.m, n, ranks, ranks2,
            p1.stride(0), *q1.stride(), p2.stride(0), *q2.stride(),
            *((0, 0) if residual is None else residual.stride()),
        )  # fmt: skip
        return out

    def grad(
        self, rows: Tensor, g: Tensor, *, sums: bool = True, transposed: bool = False
    ) -> tuple[Tensor, Tensor]:
        """g^T rows, or rows^T g if transposed, and g's sums over rows; g is [m, r] float32."""
        k, r = rows.shape[1], g.shape[1]
        splits, chunk, prepared = self.layout.once(layouts.grad_launch, k, r, sums)
        shape, strides = ((k, r), (1, r)) if transposed else ((r, k), (k, 1))
        parts, sum_parts = self.empty(splits, *shape), self.empty(splits, r if sums else 0)
        launch_prepared(
            kernels.adapter_fusion_grad_kernel, prepared,
            rows, g, parts, sum_parts, self.m, k, r, chunk, *rows.stride(), *strides,
        )  # fmt: skip
        gradient = sum_partials(parts, self.empty(*shape), 1.0)
        return gradient, sum_partials(sum_parts, self.empty(sum_parts.shape[1]), 1.0)


@functools.lru_cache(maxsize=256)
def _starts(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """[N + 1] int32: the first column of each adapter, and R.

    Kept, since the copy to the device waits for it; so a CUDA graph needs a call before its own.
    """
    return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device)
