"""Bottleneck adapters by row: one op for adapters in tensors of their own, read where they lie.

With ``a = ids[i]`` the adapter of row i, its matrices D_a and U_a, and biases b_a and c_a:

    y_i = LN(residual_i + scale_a act_a(LN(x_i; pre_norm) D_a^T + b_a) U_a^T + c_a; norm)     a >= 0
    y_i = 0                                                                                  a = -1

It has no gradient. The rows of an adapter are computed as ``adapter`` computes them by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from peft_kernels import _library
from peft_kernels.ops._adapter_reference import adapter_fwd_ref
from peft_kernels.ops._rows import in_shape_of, rows_of
from peft_kernels.ops.adapter import _scale

# Fewer ids than rows serve equal parts each. What isn't of an adapter is as of adapter_fwd.
SCHEMA = (
    "(Tensor x, Tensor? residual, Tensor[] down_weights, Tensor[] down_biases, Tensor[] up_weights,"
    " Tensor[] up_biases, float[] scales, Tensor?[] scale_ts, str[] activations,"
    " Tensor? pre_norm_weight, Tensor? pre_norm_bias, float pre_norm_eps, Tensor? norm_weight,"
    " Tensor? norm_bias, float norm_eps, bool adds_x, Tensor ids) -> Tensor"
)


class AdapterFactors(NamedTuple):
    """Adapters of one place of a model; number i is the i-th of each."""

    down_weights: Sequence[Tensor]  # [r, k], each adapter of its own r
    down_biases: Sequence[Tensor]  # [r]
    up_weights: Sequence[Tensor]  # [n, r]
    up_biases: Sequence[Tensor]  # [n]
    scales: Sequence[float | Tensor]  # floats, or tensors of 1 or n elements
    activations: Sequence[str]  # as activation_name gives them


def adapter_apart(
    x: Tensor,
    adapters: AdapterFactors,
    ids: Tensor,
    *,
    residual: tuple[Tensor, ...] = (),
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    pre_norm_weight: Tensor | None = None,
    pre_norm_bias: Tensor | None = None,
    pre_norm_eps: float = 1e-5,
) -> Tensor:
    """y, of rows on a CPU. The caller has seen to shapes, dtypes and devices.

    Args:
        x: ``[B, ..., k]``.
        adapters: in float32 or the dtype of x, which is float64 for none or all.
        ids: ``[B]`` int32, -1 for none.
        residual and the rest: as of :func:`peft_kernels.ops.adapter`.
    """
    others = [term for term in residual if term is not x]
    scales, scale_ts = zip(*map(_scale, adapters.scales), strict=True)
    y = _library.get_op("adapter_apart", _library.variant(x.dtype))(
        rows_of(x),
        rows_of(sum(others[1:], others[0])) if others else None,
        *map(list, adapters[:4]),
        list(scales),
        list(scale_ts),
        list(adapters.activations),
        pre_norm_weight,
        pre_norm_bias,
        pre_norm_eps,
        norm_weight,
        norm_bias,
        norm_eps,
        len(others) < len(residual),
        ids,
    )
    return in_shape_of(x, y)


def _adapter_apart_ref(
    x, residual, down_weights, down_biases, up_weights, up_biases, scales, scale_ts, activations,
    pre_norm_weight, pre_norm_bias, pre_norm_eps, norm_weight, norm_bias, norm_eps, adds_x, ids,
):  # fmt: skip
    y = x.new_zeros(x.shape[0], up_weights[0].shape[0])
    row_ids = ids.repeat_interleave(x.shape[0] // max(len(ids), 1))
    for i in row_ids.unique().tolist():
        if i < 0:
            continue
        rows = (row_ids == i).nonzero().flatten()
        y[rows] = adapter_fwd_ref(
            x[rows], None if residual is None else residual[rows], down_weights[i], down_biases[i],
            up_weights[i], up_biases[i], scales[i], scale_ts[i], pre_norm_weight, pre_norm_bias,
            pre_norm_eps, norm_weight, norm_bias, norm_eps, activations[i], adds_x, 0.0, None,
        )[0]  # fmt: skip
    return y


def _adapter_apart_fake(x, residual, down_weights, down_biases, up_weights, *_):
    return x.new_empty(x.shape[0], up_weights[0].shape[0])


_library.define(
    "adapter_apart",
    SCHEMA,
    reference=_adapter_apart_ref,
    fake=_adapter_apart_fake,
    triton=None,
)
