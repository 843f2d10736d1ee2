"""AdapterFusion: attention over N adapters' outputs at each row, in bottleneck-sized products.

Pfeiffer et al. 2021, "AdapterFusion: Non-Destructive Task Composition", section 3.2. With
z_n = act(x D_n^T + d_n) and o_n = s_n (z_n U_n^T + u_n) the n-th adapter's output, before its
residual, and q the row's query:

    score_n = (Q q + b_q) . (K o_n + b_k)            p = softmax(score / T)
    y       = residual + sum of p_n V o_n

Computed as it stands, that is 1 + 2N products of hidden x hidden a row. But b_k adds the same to
every score and cancels, V commutes with the weighted sum, and Q, K and V can be multiplied with the
U_n beforehand (`absorb`). With R the sum of the bottleneck sizes, rows of R grouped by adapter:

    P = [s U^T K^T Q] / T,  e_n = s_n u_n^T K^T Q / T          [R, d], [N, d]   score_weight
    M = [s V U],            v_n = s_n V u_n                    [n, R], [N, n]   mix_weight, mix_bias

    a = act(x D^T + d)                                         [m, R]
    w = q [P, e]^T + score_bias                                [m, R + N]
    p = softmax over n of (sum of a w over n's columns + w_n)  [m, N]
    y = residual + (p a) M^T + p v                             [m, n]

The backward, with t = dy M and tau_n = sum of t a over n's columns + dy . v_n:

    dp = p (tau - sum of p tau)      the softmax's             [m, N]
    dw = [dp a, dp]                  dpre = act' (p t + dp w)  [m, R + N], [m, R]
    dM = dy^T (p a),  dv = p^T dy,  dS = dw^T q,  dD = dpre^T x,  dq = dw [P, e],  dx = dpre D
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels import _library
from peft_kernels.ops._activations import ACTIVATIONS, activation_name
from peft_kernels.ops._checks import (
    are_alike,
    check_adapter,
    check_devices,
    check_float,
    check_same,
)
from peft_kernels.ops._dispatch import define_call, wants_function
from peft_kernels.ops._dtypes import acc_dtype, autocast
from peft_kernels.ops._rows import in_shape_of, rows_of
from peft_kernels.ops._transforms import (
    gradients_of,
    wants_gradient_composition,
)

# query is x where it is None. sizes are the adapters' bottlenecks; they add up to R.
_INPUTS = (
    "Tensor x, Tensor? query, Tensor down_weight, Tensor down_bias, Tensor score_weight,"
    " Tensor score_bias, Tensor mix_weight, Tensor mix_bias, int[] sizes, str activation"
)
# y [m, n]; before the nonlinearity [m, R], w [m, R + N] and p [m, N] in float32
FWD_SCHEMA = f"({_INPUTS}, Tensor? residual) -> (Tensor, Tensor, Tensor, Tensor)"
# dx [m, k] and dq [m, d] in x's dtype (dq is within dx where query is x); dD, dd, dS and its
# bias's, dM and dv in float32. Of size 0 where not needed.
BWD_SCHEMA = (
    f"(Tensor dy, {_INPUTS}, Tensor z, Tensor w, Tensor p, bool needs_x, bool needs_query,"
    " bool needs_down, bool needs_score, bool needs_mix)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


# ---- reference -------------------------------------------------------------------------------


def _by_adapter(columns: Tensor, sizes: Sequence[int]) -> Tensor:
    """[m, N]: the sums over each adapter's columns of [m, R]."""
    return torch.stack([part.sum(1) for part in columns.split(list(sizes), 1)], 1)


def _to_columns(by_adapter: Tensor, sizes: Sequence[int]) -> Tensor:
    """[m, R] from [m, N]: each adapter's number at all of its columns."""
    parts = [by_adapter[:, n : n + 1].expand(-1, size) for n, size in enumerate(sizes)]
    return torch.cat(parts, 1)


def adapter_fusion_fwd_ref(
    x, query, down_weight, down_bias, score_weight, score_bias, mix_weight, mix_bias,
    sizes, activation, residual,
):  # fmt: skip
    acc, ranks = acc_dtype(x), down_weight.shape[0]
    wide_x = x.to(acc)
    q = wide_x if query is None else query.to(acc)
    z = F.linear(wide_x, down_weight.to(acc), down_bias.to(acc))
    w = F.linear(q, score_weight.to(acc), score_bias.to(acc))
    a = ACTIVATIONS[activation][0](z)
    p = torch.softmax(_by_adapter(a * w[:, :ranks], sizes) + w[:, ranks:], 1)
    y = (_to_columns(p, sizes) * a) @ mix_weight.to(acc).T + p @ mix_bias.to(acc)
    y = y if residual is None else y + residual.to(acc)
    return y.to(x.dtype), z, w, p


def adapter_fusion_bwd_ref(
    dy, x, query, down_weight, down_bias, score_weight, score_bias, mix_weight, mix_bias,
    sizes, activation, z, w, p, needs_x, needs_query, needs_down, needs_score, needs_mix,
):  # fmt: skip
    acc, ranks = z.dtype, down_weight.shape[0]
    act, derivative = ACTIVATIONS[activation]
    wide_x, dy = x.to(acc), dy.to(acc)
    q = wide_x if query is None else query.to(acc)
    a, p_columns = act(z), _to_columns(p, sizes)
    t = dy @ mix_weight.to(acc)
    tau = _by_adapter(t * a, sizes) + dy @ mix_bias.to(acc).T
    dp = p * (tau - (p * tau).sum(1, keepdim=True))
    dp_columns = _to_columns(dp, sizes)
    dw = torch.cat([dp_columns * a, dp], 1)
    dpre = derivative(z) * (p_columns * t + dp_columns * w[:, :ranks])
    dx, dq = x.new_empty(0), x.new_empty(0)
    dd, dd_bias, ds, ds_bias, dm, dv = (z.new_empty(0) for _ in range(6))
    if needs_x:
        dx = dpre @ down_weight.to(acc)
        dx = (dx + dw @ score_weight.to(acc) if query is None else dx).to(x.dtype)
    if needs_query:
        dq = (dw @ score_weight.to(acc)).to(x.dtype)
    if needs_down:
        dd, dd_bias = dpre.T @ wide_x, dpre.sum(0)
    if needs_score:
        ds, ds_bias = dw.T @ q, dw.sum(0)
    if needs_mix:
        dm, dv = dy.T @ (p_columns * a), p.T @ dy
    return dx, dq, dd, dd_bias, ds, ds_bias, dm, dv


@_library.outside_autocast
def _composition(x, *rest) -> tuple[Tensor, Tensor]:
    y, _, _, p = adapter_fusion_fwd_ref(x, *rest)
    return y, p.detach()


# ---- shapes ----------------------------------------------------------------------------------


def _fwd_fake(
    x, query, down_weight, down_bias, score_weight, score_bias, mix_weight, mix_bias,
    sizes, activation, residual,
):  # fmt: skip
    m, acc, ranks, adapters = x.shape[0], acc_dtype(x), down_weight.shape[0], len(sizes)
    y = x.new_empty(m, mix_weight.shape[0])
    return y, *(x.new_empty(m, size, dtype=acc) for size in (ranks, ranks + adapters, adapters))


def _bwd_fake(
    dy, x, query, down_weight, down_bias, score_weight, score_bias, mix_weight, mix_bias,
    sizes, activation, z, w, p, needs_x, needs_query, needs_down, needs_score, needs_mix,
):  # fmt: skip
    def shaped(needed: bool, like: Tensor) -> Tensor:
        return z.new_empty(like.shape if needed else (0,))

    dx = x.new_empty(x.shape if needs_x else (0,))
    dq = x.new_empty((x if query is None else query).shape if needs_query else (0,))
    down = shaped(needs_down, down_weight), shaped(needs_down, down_bias)
    score = shaped(needs_score, score_weight), shaped(needs_score, score_bias)
    return dx, dq, *down, *score, shaped(needs_mix, mix_weight), shaped(needs_mix, mix_bias)


_library.define(
    "adapter_fusion_fwd",
    FWD_SCHEMA,
    reference=adapter_fusion_fwd_ref,
    fake=_fwd_fake,
    triton="peft_kernels.triton.adapter_fusion.launch:adapter_fusion_fwd",
)
_library.define(
    "adapter_fusion_bwd",
    BWD_SCHEMA,
    reference=adapter_fusion_bwd_ref,
    fake=_bwd_fake,
    triton="peft_kernels.triton.adapter_fusion.launch:adapter_fusion_bwd",
)


# ---- autograd --------------------------------------------------------------------------------


class _AdapterFusion(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, query, down_weight, down_bias, score_weight, score_bias, mix_weight, mix_bias,
        sizes, activation, residual, variant,
    ):  # fmt: skip
        tensors = (
            x, query, down_weight, down_bias, score_weight, score_bias, mix_weight, mix_bias,
        )  # fmt: skip
        fwd = _library.get_op("adapter_fusion_fwd", variant)
        y, z, w, p = fwd(*tensors, sizes, activation, residual)
        ctx.save_for_backward(*tensors, z, w, p)
        ctx.options = (sizes, activation, variant)
        ctx.mark_non_differentiable(p)
        return y, p

    @staticmethod
    def backward(ctx, dy, _):
        *tensors, z, w, p = ctx.saved_tensors
        sizes, activation, variant = ctx.options
        needs = ctx.needs_input_grad
        d_residual = dy if needs[10] else None
        if wants_gradient_composition(dy):

            def composed(*tensors):
                return _composition(*tensors, sizes, activation, None)[0]

            return *gradients_of(composed, tensors, needs[:8], dy), None, None, d_residual, None
        bwd = _library.get_op("adapter_fusion_bwd", variant)
        pairs = (needs[2] or needs[3], needs[4] or needs[5], needs[6] or needs[7])
        gradients = bwd(
            dy.contiguous(), *tensors, sizes, activation, z, w, p, needs[0], needs[1], *pairs
        )
        found = [
            gradient.to(tensor.dtype) if needed else None
            for gradient, tensor, needed in zip(gradients, tensors, needs, strict=False)
        ]
        return *found, None, None, d_residual, None


_call = define_call(
    "adapter_fusion",
    FWD_SCHEMA,
    outputs=(0, 3),
    fake=_fwd_fake,
    apply=_AdapterFusion.apply,
    composition=_composition,
)


# ---- absorbed matrices -----------------------------------------------------------------------


@dataclass(frozen=True)
class Absorbed:
    """Q, K and V multiplied into the adapters' matrices: all that the scores and the mixture need.

    score_weight ``[R + N, d]`` (rows of the bottlenecks, then one an adapter), score_bias
    ``[R + N]``, mix_weight ``[n, R]``, mix_bias ``[N, n]``.
    """

    score_weight: Tensor
    score_bias: Tensor
    mix_weight: Tensor
    mix_bias: Tensor


def absorb(
    up_weights: Sequence[Tensor],
    up_biases: Sequence[Tensor],
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    key_weight: Tensor | None,
    value_weight: Tensor | None,
    *,
    scales: Sequence[float | Tensor] | None = None,
    temperature: float = 1.0,
    absorb_query: bool = True,
) -> Absorbed:
    """The matrices of the module's docstring; gradients flow to all that they are made of.

    A weight that is None is the identity. Without ``absorb_query`` the caller gives ``Q q + b_q``
    as the query: fewer flops where there are few rows of many adapters that train.

    Args:
        up_weights: N of ``[n, r_i]``.
        up_biases: N of ``[n]``.
        query_weight, query_bias: ``[n, d]`` and ``[n]``.
        key_weight, value_weight: ``[n, n]``. The key's bias cancels in the softmax.
        scales: N factors of the adapters' outputs: numbers, or tensors of one or n elements.
        temperature: the scores are divided by it.
        absorb_query: whether the query's weight goes into the scores' matrix too.
    """
    scales = [1.0] * len(up_weights) if scales is None else scales
    columns = [*up_weights, *(bias[:, None] for bias in up_biases)]
    scaled = [_scaled(u, s) for u, s in zip(columns, [*scales, *scales], strict=True)]
    ups = torch.cat(scaled, 1)  # [n, R + N]
    keys = _scaled((ups if key_weight is None else key_weight @ ups).T, 1.0 / temperature)
    mixed = ups if value_weight is None else value_weight @ ups
    score_weight, score_bias = keys, None
    if absorb_query and query_weight is not None:
        score_weight = keys @ query_weight
        score_bias = None if query_bias is None else keys @ query_bias
    if score_bias is None:
        score_bias = keys.new_zeros(keys.shape[0])
    ranks = ups.shape[1] - len(up_weights)
    return Absorbed(score_weight, score_bias, mixed[:, :ranks], mixed[:, ranks:].T)


def _scaled(columns: Tensor, scale: float | Tensor) -> Tensor:
    """[n, r] times a number, or one for each of its rows."""
    if isinstance(scale, Tensor):
        return columns * (scale[:, None] if scale.dim() == 1 else scale)
    return columns if scale == 1.0 else columns * scale


# ---- public ----------------------------------------------------------------------------------


def adapter_fusion(
    x: Tensor,
    down_weights: Sequence[Tensor],
    down_biases: Sequence[Tensor],
    absorbed: Absorbed,
    *,
    query: Tensor | None = None,
    activation: str = "relu",
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the outputs of N bottleneck adapters, in one pass over the rows.

    ``y = residual + sum over n of p_n V o_n`` with ``p = softmax((Q query + b_q) . (K o_n + b_k) /
    T)`` and ``o_n`` the n-th adapter's output before its residual (Pfeiffer et al. 2021, section
    3.2); see :func:`absorb` for Q, K and V. Sums are kept in float32 and rounded once. The backward
    saves ``2 R + 2 N`` float32 numbers a row.

    Args:
        x: ``[..., k]``, the adapters' input, float32, float16, bfloat16 or float64.
        down_weights: N of ``[r_i, k]`` in float32 or the dtype of x, as all parameters; N >= 1.
        down_biases: N of ``[r_i]``.
        absorbed: what :func:`absorb` made of the adapters' up-projections and of Q, K and V.
        query: ``[..., d]`` in the dtype of x, or None where it is x.
        activation: the adapters' nonlinearity, as in :func:`peft_kernels.ops.adapter`.
        residual: ``[..., n]`` in the dtype of x.

    Returns:
        y ``[..., n]`` in the dtype of x, and the weights p ``[..., N]`` in float32, which get no
        gradient of their own.

    Raises:
        ValueError: no adapter, shapes that don't fit, an unknown activation, several devices.
        TypeError: dtypes that can't be mixed.
    """
    activation = activation_name(activation)
    query = None if query is x else query
    x, query, residual = autocast(x, query, residual)
    _check(x, down_weights, down_biases, absorbed, query, residual)
    inputs = (
        rows_of(x),
        None if query is None else rows_of(query),
        torch.cat(list(down_weights)),
        torch.cat(list(down_biases)),
        absorbed.score_weight,
        absorbed.score_bias,
        absorbed.mix_weight,
        absorbed.mix_bias,
        [weight.shape[0] for weight in down_weights],
        activation,
        None if residual is None else rows_of(residual),
    )
    if wants_function(*inputs):
        y, p = _AdapterFusion.apply(*inputs, _library.variant(x.dtype))
    else:
        y, p = _call(*inputs)
    return in_shape_of(x, y), in_shape_of(x, p)


# The checks run on every call, so a message is only put together when it is raised.
def _check(x, down_weights, down_biases, absorbed, query, residual) -> None:
    if x.dim() < 1:
        raise ValueError("x must have at least 1 dimension; got a 0-d tensor")
    if not down_weights:
        raise ValueError("down_weights must have at least one adapter to fuse; got none")
    if len(down_biases) != len(down_weights):
        counts = f"{len(down_biases)} for {len(down_weights)} down_weights"
        raise ValueError(f"down_biases must be one for each adapter; got {counts}")
    k, adapters = x.shape[-1], len(down_weights)
    for i, (weight, bias) in enumerate(zip(down_weights, down_biases, strict=True)):
        if weight.dim() != 2 or weight.shape[1] != k or weight.shape[0] < 1:
            shape = tuple(weight.shape)
            raise ValueError(f"down_weights[{i}] has shape {shape}, but must be [r, k] = [r, {k}]")
        if bias.shape != weight.shape[:1]:
            shape, size = tuple(bias.shape), weight.shape[0]
            raise ValueError(f"down_biases[{i}] has shape {shape}, but must be [r] = [{size}]")
    ranks = sum(weight.shape[0] for weight in down_weights)
    n, d = absorbed.mix_weight.shape[0], k if query is None else query.shape[-1]
    for name, shape in (
        ("score_weight", (ranks + adapters, d)),
        ("score_bias", (ranks + adapters,)),
        ("mix_weight", (n, ranks)),
        ("mix_bias", (adapters, n)),
    ):
        found = getattr(absorbed, name).shape
        if found != shape:
            raise ValueError(f"absorbed.{name} has shape {tuple(found)}, but must be {shape}")
    for name, tensor, last in (("query", query, d), ("residual", residual, n)):
        if tensor is not None and tensor.shape != (*x.shape[:-1], last):
            found, shape = tuple(tensor.shape), (*x.shape[:-1], last)
            raise ValueError(f"{name} has shape {found}, but must be {shape}")
    _check_types(x, down_weights, down_biases, absorbed, query, residual)


def _check_types(x, down_weights, down_biases, absorbed, query, residual) -> None:
    if are_alike(x, *down_weights, *down_biases, *vars(absorbed).values(), query, residual):
        return
    check_float("x", x)
    parameters = [
        *((f"down_weights[{i}]", weight) for i, weight in enumerate(down_weights)),
        *((f"down_biases[{i}]", bias) for i, bias in enumerate(down_biases)),
        *((f"absorbed.{name}", tensor) for name, tensor in vars(absorbed).items()),
    ]
    activations = [("query", query), ("residual", residual)]
    check_adapter("x", x, parameters)
    check_same("x", x, activations)
    check_devices("x", x, [*parameters, *activations])


# ---- example inputs, for tests and benchmarks ------------------------------------------------


def example_inputs(
    m: int,
    n: int,
    sizes: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor | list[Tensor]]:
    """Random x, N adapters, and Q, K and V, at the scale of trained layers (scores are about 1)."""
    adapter_dtype = adapter_dtype or dtype

    def normal(*shape: int, std: float, dtype: torch.dtype = adapter_dtype) -> Tensor:
        return (torch.randn(*shape, device=device) * std).to(dtype)

    return {
        "x": normal(m, n, std=1.0, dtype=dtype),
        "down_weights": [normal(r, n, std=n**-0.5) for r in sizes],
        "down_biases": [normal(r, std=0.5) for r in sizes],
        "up_weights": [normal(n, r, std=r**-0.5) for r in sizes],
        "up_biases": [normal(n, std=0.5) for _ in sizes],
        "query_weight": normal(n, n, std=n**-0.75),
        "query_bias": normal(n, std=n**-0.25),
        "key_weight": normal(n, n, std=n**-0.75),
        "value_weight": torch.eye(n, device=device, dtype=adapter_dtype)
        + normal(n, n, std=0.1 * n**-0.5),
    }
