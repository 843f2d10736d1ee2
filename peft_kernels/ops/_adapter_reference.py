"""The reference of ``adapter`` in PyTorch, and its shapes.

The maths is at the head of ``adapter.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels import _library
from peft_kernels.ops._activations import ACTIVATIONS
from peft_kernels.ops._dropout import dropout_factor
from peft_kernels.ops._dtypes import acc_dtype, scale_of


def _wide(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _normalized(x: Tensor, statistics: Tensor) -> Tensor:
    return (x - statistics[:, :1]) * statistics[:, 1:]


def _statistics(x: Tensor, eps: float) -> Tensor:
    """[m, 2]: the mean of each row, and one over its deviation."""
    variance, mean = torch.var_mean(x, 1, correction=0)
    return torch.stack([mean, torch.rsqrt(variance + eps)], 1)


def _affine(x_hat: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x_hat * weight.to(x_hat.dtype)
    return y if bias is None else y + bias.to(x_hat.dtype)


def _norm_backward(dy: Tensor, x_hat: Tensor, weight: Tensor, statistics: Tensor) -> Tensor:
    d = dy * weight.to(dy.dtype)
    mean, projection = d.mean(1, keepdim=True), (d * x_hat).mean(1, keepdim=True)
    return statistics[:, 1:] * (d - mean - x_hat * projection)


def _norm_gradient(dy: Tensor, x_hat: Tensor) -> Tensor:
    """[2, n]: the gradients of a LayerNorm's weight and bias."""
    return torch.stack([(dy * x_hat).sum(0), dy.sum(0)])


def _update(
    x, residual, z, up_weight, up_bias, scale, scale_t, activation, adds_x, dropout_p, seed
) -> Tensor:
    """t, in z's dtype."""
    acc = z.dtype
    u = F.linear(ACTIVATIONS[activation][0](z), up_weight.to(acc), _wide(up_bias, acc))
    t = u * scale_of(scale, scale_t, x)
    if seed is not None:
        m, n = u.shape
        t = t * dropout_factor(seed, dropout_p, m, n, acc).to(x.device)
    if adds_x:
        t = t + x.to(acc)
    return t if residual is None else t + residual.to(acc)


def adapter_fwd_ref(
    x, residual, down_weight, down_bias, up_weight, up_bias, scale, scale_t,
    pre_norm_weight, pre_norm_bias, pre_norm_eps, norm_weight, norm_bias, norm_eps,
    activation, adds_x, dropout_p, seed,
):  # fmt: skip
    acc = acc_dtype(x)
    h, statistics = x.to(acc), x.new_empty(x.shape[0], 0, dtype=acc)
    if pre_norm_weight is not None:
        statistics = _statistics(h, pre_norm_eps)
        h = _affine(_normalized(h, statistics), pre_norm_weight, pre_norm_bias)
    z = F.linear(h, down_weight.to(acc), _wide(down_bias, acc))
    options = activation, adds_x, dropout_p, seed
    y = _update(x, residual, z, up_weight, up_bias, scale, scale_t, *options)
    if norm_weight is not None:
        after = _statistics(y, norm_eps)
        y = _affine(_normalized(y, after), norm_weight, norm_bias)
        statistics = torch.cat([statistics, after], 1)
    return y.to(x.dtype), z, statistics


def adapter_bwd_ref(
    dy, x, residual, down_weight, down_bias, up_weight, up_bias, scale, scale_t,
    pre_norm_weight, pre_norm_bias, pre_norm_eps, norm_weight, norm_bias, norm_eps,
    z, statistics, activation, adds_x, dropout_p, seed,
    needs_x, needs_residual, needs_down, needs_up, needs_pre_norm, needs_norm,
):  # fmt: skip
    acc = z.dtype
    dx, dres = x.new_empty(0), x.new_empty(0)
    d_down, d_down_bias, up, up_sum, d_pre_norm, d_norm = (z.new_empty(0) for _ in range(6))
    act, derivative = ACTIVATIONS[activation]
    wide_x, dt = x.to(acc), dy.to(acc)
    if norm_weight is not None:
        options = activation, adds_x, dropout_p, seed
        t = _update(x, residual, z, up_weight, up_bias, scale, scale_t, *options)
        t_hat = _normalized(t, statistics[:, -2:])
        if needs_norm:
            d_norm = _norm_gradient(dt, t_hat)
        dt = _norm_backward(dt, t_hat, norm_weight, statistics[:, -2:])
        if needs_residual:
            dres = dt.to(x.dtype)
    g = dt
    if seed is not None:
        m, n = dy.shape
        g = g * dropout_factor(seed, dropout_p, m, n, acc).to(x.device)
    if needs_up:
        up, up_sum = g.T @ act(z), g.sum(0)
    dz = derivative(z) * ((g * scale_of(scale, scale_t, x)) @ up_weight.to(acc))
    h = wide_x
    if pre_norm_weight is not None:
        x_hat = _normalized(wide_x, statistics[:, :2])
        h = _affine(x_hat, pre_norm_weight, pre_norm_bias)
    if needs_down:
        d_down, d_down_bias = dz.T @ h, dz.sum(0)
    dh = dz @ down_weight.to(acc)
    if needs_pre_norm:
        d_pre_norm = _norm_gradient(dh, x_hat)
    if needs_x:
        if pre_norm_weight is not None:
            dh = _norm_backward(dh, x_hat, pre_norm_weight, statistics[:, :2])
        dx = (dh + dt if adds_x else dh).to(x.dtype)
    return dx, dres, d_down, d_down_bias, up, up_sum, d_pre_norm, d_norm


@_library.outside_autocast
def composition(x, *rest) -> Tensor:
    return adapter_fwd_ref(x, *rest)[0]


# ---- shapes ----------------------------------------------------------------------------------


def fwd_fake(
    x, residual, down_weight, down_bias, up_weight, up_bias, scale, scale_t,
    pre_norm_weight, pre_norm_bias, pre_norm_eps, norm_weight, norm_bias, norm_eps,
    activation, adds_x, dropout_p, seed,
):  # fmt: skip
    m, acc = x.shape[0], acc_dtype(x)
    norms = (pre_norm_weight is not None) + (norm_weight is not None)
    y, z = x.new_empty(m, up_weight.shape[0]), x.new_empty(m, down_weight.shape[0], dtype=acc)
    return y, z, x.new_empty(m, 2 * norms, dtype=acc)


def bwd_fake(
    dy, x, residual, down_weight, down_bias, up_weight, up_bias, scale, scale_t,
    pre_norm_weight, pre_norm_bias, pre_norm_eps, norm_weight, norm_bias, norm_eps,
    z, statistics, activation, adds_x, dropout_p, seed,
    needs_x, needs_residual, needs_down, needs_up, needs_pre_norm, needs_norm,
):  # fmt: skip
    (r, k), n = down_weight.shape, up_weight.shape[0]

    def shaped(needed: bool, *shape: int) -> Tensor:
        return z.new_empty(shape if needed else (0,))

    dx = x.new_empty(x.shape if needs_x else (0,))
    dres = x.new_empty(dy.shape if needs_residual else (0,))
    down, up = (shaped(needs_down, r, k), shaped(needs_down, r)), (shaped(needs_up, n, r),)
    norms = shaped(needs_pre_norm, 2, k), shaped(needs_norm, 2, n)
    return dx, dres, *down, *up, shaped(needs_up, n), *norms
