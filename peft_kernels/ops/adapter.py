"""Bottleneck adapter: ``y = LN(residual + scale * dropout(act(h @ D.T + b_d) @ U.T + b_u))``.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1, and what came
after it: He et al. 2022 (scaled, parallel), Pfeiffer et al. 2021 (one a layer, between a LayerNorm
and its second use). Both LayerNorms are optional:

    h  = x                           or  LN(x; pre_norm)      [m, k]
    z  = h D^T + b_d                                          [m, r]   fp32, saved
    u  = act(z) U^T + b_u                                     [m, n]
    t  = residual + scale dropout(u)                          [m, n]   scale: a number or [n]
    y  = t                           or  LN(t; norm)          [m, n]

The backward saves z and a mean and a reciprocal deviation by row and LayerNorm; h and t are
computed again.

    dt = dy                          or  LN'(dy; t)           [m, n]   the residual's gradient
    g  = dropout'(dt)                                         [m, n]
    G  = g^T act(z),  g0 = sum of g over rows                 [n, r], [n]
    dU = scale G,  db_u = scale g0,  dscale = U . G + b_u g0           by row of U
    dz = act'(z) ((scale g) U)                                [m, r]
    dD = dz^T h,  db_d = sum of dz over rows                  [r, k], [r]
    dx = dz D                        or  LN'(dz D; x)         [m, k]   + dt where x is a residual

The reference is in ``_adapter_reference.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels import _library
from peft_kernels.ops._activations import activation_name
from peft_kernels.ops._adapter_reference import (
    adapter_bwd_ref,
    adapter_fwd_ref,
    bwd_fake,
    composition,
    fwd_fake,
)
from peft_kernels.ops._checks import (
    check_adapter,
    check_devices,
    check_dropout,
    check_float,
    check_same,
)
from peft_kernels.ops._dispatch import define_call, wants_function
from peft_kernels.ops._dropout import seed_tensor
from peft_kernels.ops._dtypes import autocast, scale_of
from peft_kernels.ops._rows import in_shape_of, rows_of
from peft_kernels.ops._transforms import gradients_of, wants_gradient_composition

# residual [m, n] is what is added besides x; adds_x says that x is added too. The factor is scale_t
# [] or [n], where one is given, and scale otherwise.
_INPUTS = (
    "Tensor x, Tensor? residual, Tensor down_weight, Tensor? down_bias, Tensor up_weight,"
    " Tensor? up_bias, float scale, Tensor? scale_t, Tensor? pre_norm_weight,"
    " Tensor? pre_norm_bias, float pre_norm_eps, Tensor? norm_weight, Tensor? norm_bias,"
    " float norm_eps,"
)
_OPTIONS = "str activation, bool adds_x, float dropout_p, Tensor? seed"
# y [m, n], z [m, r], statistics [m, 2 x LayerNorms]: mean and 1 / deviation, pre_norm's first.
FWD_SCHEMA = f"({_INPUTS} {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
# dx [m, k] and dt [m, n] in x's dtype; dD [r, k], db_d [r], G [n, r], g0 [n], the gradients of
# pre_norm [2, k] and of norm [2, n] (weight, bias) in float32. Of size 0 where not needed.
BWD_SCHEMA = (
    f"(Tensor dy, {_INPUTS} Tensor z, Tensor statistics, {_OPTIONS}, bool needs_x,"
    " bool needs_residual, bool needs_down, bool needs_up, bool needs_pre_norm, bool needs_norm)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_library.define(
    "adapter_fwd",
    FWD_SCHEMA,
    reference=adapter_fwd_ref,
    fake=fwd_fake,
    triton="peft_kernels.triton.adapter.launch:adapter_fwd",
)
_library.define(
    "adapter_bwd",
    BWD_SCHEMA,
    reference=adapter_bwd_ref,
    fake=bwd_fake,
    triton="peft_kernels.triton.adapter.launch:adapter_bwd",
)


# ---- autograd --------------------------------------------------------------------------------


class _Adapter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, residual, down_weight, down_bias, up_weight, up_bias, scale, scale_t,
        pre_norm_weight, pre_norm_bias, pre_norm_eps, norm_weight, norm_bias, norm_eps,
        activation, adds_x, dropout_p, seed, variant,
    ):  # fmt: skip
        inputs = (
            x, residual, down_weight, down_bias, up_weight, up_bias, scale, scale_t,
            pre_norm_weight, pre_norm_bias, pre_norm_eps, norm_weight, norm_bias, norm_eps,
        )  # fmt: skip
        fwd = _library.get_op("adapter_fwd", variant)
        y, z, statistics = fwd(*inputs, activation, adds_x, dropout_p, seed)
        # The residual is needed for t, which only a LayerNorm's backward asks for.
        kept = residual if norm_weight is not None else None
        weights = down_weight, down_bias, up_weight, up_bias, scale_t
        norms = pre_norm_weight, pre_norm_bias, norm_weight, norm_bias
        ctx.save_for_backward(x, kept, *weights, *norms, z, statistics, seed)
        ctx.options = (scale, pre_norm_eps, norm_eps, activation, adds_x, dropout_p, variant)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, residual, *weights, norm_weight, norm_bias, z, statistics, seed = ctx.saved_tensors
        *parameters, scale_t, pre_norm_weight, pre_norm_bias = weights
        down_weight, down_bias, up_weight, up_bias = parameters
        scale, pre_norm_eps, norm_eps, activation, adds_x, dropout_p, variant = ctx.options
        needs = ctx.needs_input_grad
        needs_x, needs_residual, needs_scale = needs[0], needs[1], needs[7]
        if wants_gradient_composition(dy):

            def composed(x, residual, *weights):
                norms = (*weights[5:7], pre_norm_eps, *weights[7:], norm_eps)
                options = activation, adds_x, dropout_p, seed
                return composition(x, residual, *weights[:4], scale, weights[4], *norms, *options)

            tensors = (x, residual, *weights, norm_weight, norm_bias)
            asked = [*needs[:6], *needs[7:10], *needs[11:13]]
            asked[1] = needs_residual and norm_weight is not None
            found = gradients_of(composed, tensors, asked, dy)
            if needs_residual and norm_weight is None:
                found[1] = dy  # of a plain sum, whose terms aren't kept
            return *found[:6], None, *found[6:9], None, *found[9:], *(None,) * 6
        dy = dy.contiguous()
        bwd = _library.get_op("adapter_bwd", variant)
        dx, dt, d_down, d_down_bias, up, up_sum, d_pre_norm, d_norm = bwd(
            dy, x, residual, *parameters, scale, scale_t, pre_norm_weight, pre_norm_bias,
            pre_norm_eps, norm_weight, norm_bias, norm_eps,
            z, statistics, activation, adds_x, dropout_p, seed,
            needs_x, needs_residual and norm_weight is not None, needs[2] or needs[3],
            needs[4] or needs[5] or needs_scale, needs[8] or needs[9], needs[11] or needs[12],
        )  # fmt: skip
        d_scale = None
        if needs_scale:
            # In float64: what a scale's gradient sums up mostly cancels.
            d_scale = (up_weight.double() * up.double()).sum(1)
            if up_bias is not None:
                d_scale += up_bias.double() * up_sum.double()
            d_scale = (d_scale if scale_t.dim() else d_scale.sum()).to(scale_t.dtype)

        def gradient(needed: bool, like: Tensor | None, value) -> Tensor | None:
            return value().to(like.dtype) if needed and like is not None else None

        factor = scale_of(scale, scale_t, z)
        return (
            dx if needs_x else None,
            (dt if norm_weight is not None else dy) if needs_residual else None,
            gradient(needs[2], down_weight, lambda: d_down),
            gradient(needs[3], down_bias, lambda: d_down_bias),
            gradient(needs[4], up_weight, lambda: _of_rows(factor) * up),
            gradient(needs[5], up_bias, lambda: factor * up_sum),
            None,
            d_scale,
            gradient(needs[8], pre_norm_weight, lambda: d_pre_norm[0]),
            gradient(needs[9], pre_norm_bias, lambda: d_pre_norm[1]),
            None,
            gradient(needs[11], norm_weight, lambda: d_norm[0]),
            gradient(needs[12], norm_bias, lambda: d_norm[1]),
            *(None,) * 6,
        )


def _of_rows(factor: float | Tensor) -> float | Tensor:
    """A factor of a matrix's rows."""
    return factor[:, None] if isinstance(factor, Tensor) and factor.dim() else factor


_call = define_call(
    "adapter",
    FWD_SCHEMA,
    outputs=(0,),
    fake=fwd_fake,
    apply=_Adapter.apply,
    composition=composition,
)


# ---- public ----------------------------------------------------------------------------------


def adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    activation: str = "relu",
    scale: float | Tensor = 1.0,
    residual: Tensor | tuple[Tensor, ...] | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    pre_norm_weight: Tensor | None = None,
    pre_norm_bias: Tensor | None = None,
    pre_norm_eps: float = 1e-5,
) -> Tensor:
    """Bottleneck adapter with its residual and LayerNorms, in one pass over the rows.

    ``y = LN(residual + scale * dropout(act(LN(x) @ down_weight.T + down_bias) @ up_weight.T
    + up_bias))`` (Houlsby et al. 2019, section 2.1), each LayerNorm only where its weight is given.
    Sums are kept in float32 and rounded once. The backward saves the bottleneck before its
    nonlinearity, in float32, and two numbers by row and LayerNorm.

    Args:
        x: ``[..., k]``, float32, float16, bfloat16 or float64, any strides.
        down_weight: ``[r, k]``, r >= 1, in float32 or the dtype of x, as all parameters.
        down_bias: ``[r]``.
        up_weight: ``[n, r]``.
        up_bias: ``[n]``.
        activation: identity, relu, leaky_relu (slope 0.01), gelu, gelu_tanh, silu, tanh or sigmoid;
            linear, leakyrelu, gelu_new, gelu_pytorch_tanh and swish are other names of them.
        scale: the factor of the update, a float or a tensor of 1 or n elements; a tensor may train.
        residual: ``[..., n]`` in the dtype of x, or several, which are added up. Giving x itself
            (by identity) costs no second read.
        dropout_p: the share of the update's elements dropped, in [0, 1).
        seed: 64-bit seed of the dropout, an int or a 0-d int64 tensor; drawn from torch's
            generator when None. No mask is stored.
        norm_weight, norm_bias, norm_eps: ``[n]``, of the LayerNorm of the sum.
        pre_norm_weight, pre_norm_bias, pre_norm_eps: ``[k]``, of the LayerNorm of x on its way
            down; a residual x stays as it was.

    Returns:
        ``[..., n]`` in the dtype of x, or in autocast's dtype under autocast.

    Raises:
        ValueError: shapes that don't fit, an unknown activation, tensors on several devices,
            ``dropout_p`` outside [0, 1), a LayerNorm's bias without its weight.
        TypeError: dtypes that can't be mixed.
    """
    activation = activation_name(activation)
    terms = () if residual is None else residual if isinstance(residual, tuple) else (residual,)
    adds_x = any(term is x for term in terms)
    if torch.compiler.is_compiling():  # Dynamo refuses a function that is given a tensor twice
        norm_weight, norm_bias = _aliases(norm_weight), _aliases(norm_bias)
    x, *others = autocast(x, *(term for term in terms if term is not x))
    parameters = (down_weight, down_bias, up_weight, up_bias)
    norms = (pre_norm_weight, pre_norm_bias, norm_weight, norm_bias)
    _check(x, others, adds_x, parameters, norms, scale, dropout_p)
    inputs = (
        rows_of(x),
        rows_of(sum(others[1:], others[0])) if others else None,
        *parameters,
        *_scale(scale),
        pre_norm_weight,
        pre_norm_bias,
        pre_norm_eps,
        norm_weight,
        norm_bias,
        norm_eps,
        activation,
        adds_x,
        float(dropout_p),
        seed_tensor(seed, x.device) if dropout_p > 0.0 else None,
    )
    if wants_function(*inputs):
        y = _Adapter.apply(*inputs, _library.variant(x.dtype))
    else:
        y = _call(*inputs)
    return in_shape_of(x, y)


def _aliases(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.view_as(tensor)


def _scale(scale: float | Tensor) -> tuple[float, Tensor | None]:
    """``scale`` and ``scale_t`` as the ops take them."""
    if not isinstance(scale, Tensor):
        return float(scale), None
    return 1.0, scale.reshape(()) if scale.numel() == 1 else scale


# The checks run on every call, so a message is only put together when it is raised.
def _check(x, others, adds_x, parameters, norms, scale, dropout_p) -> None:
    down_weight, down_bias, up_weight, up_bias = parameters
    pre_norm_weight, pre_norm_bias, norm_weight, norm_bias = norms
    if x.dim() < 1:
        raise ValueError("x must have at least 1 dimension; got a 0-d tensor")
    for name, tensor in (("down_weight", down_weight), ("up_weight", up_weight)):
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions; got shape {tuple(tensor.shape)}")
    (r, k), (n, up_r) = down_weight.shape, up_weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must end in down_weight's k = {k}")
    if r < 1:
        raise ValueError(f"down_weight must have at least 1 row; got shape {(r, k)}")
    if up_r != r:
        raise ValueError(f"up_weight has shape {(n, up_r)}, but must be [n, r] = [n, {r}]")
    if adds_x and n != k:
        raise ValueError(f"residual is x, which ends in {k}, but must end in up_weight's n = {n}")
    for term in others:
        if term.shape != (*x.shape[:-1], n):
            shape = (*x.shape[:-1], n)
            raise ValueError(f"residual has shape {tuple(term.shape)}, but must be {shape}")
    vectors = (
        ("down_bias", down_bias, r),
        ("up_bias", up_bias, n),
        ("pre_norm_weight", pre_norm_weight, k),
        ("pre_norm_bias", pre_norm_bias, k),
        ("norm_weight", norm_weight, n),
        ("norm_bias", norm_bias, n),
    )
    for name, vector, size in vectors:
        if vector is not None and vector.shape != (size,):
            raise ValueError(f"{name} has shape {tuple(vector.shape)}, but must be [{size}]")
    for name, weight, bias in (
        ("pre_norm", pre_norm_weight, pre_norm_bias),
        ("norm", norm_weight, norm_bias),
    ):
        if weight is None and bias is not None:
            raise ValueError(f"{name}_bias needs {name}_weight, which is None")
    if isinstance(scale, Tensor) and scale.numel() != 1 and scale.shape != (n,):
        shape = tuple(scale.shape)
        raise ValueError(f"scale must be a float or a tensor of 1 or n = {n} elements; got {shape}")
    check_dropout(dropout_p)
    matrices = (("down_weight", down_weight), ("up_weight", up_weight))
    parameters = (*matrices, *((name, vector) for name, vector, _ in vectors))
    residuals = [("residual", term) for term in others]
    check_float("x", x)
    check_same("x", x, residuals)
    check_adapter("x", x, parameters)
    check_devices("x", x, (*residuals, *parameters))


# ---- example inputs, for tests and benchmarks ------------------------------------------------


def example_inputs(
    m: int,
    k: int,
    r: int,
    n: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    residual: bool = True,
    norm: bool = False,
    pre_norm: bool = False,
    bias: bool = True,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor | None]:
    """Random arguments of :func:`adapter` at the scale of a trained layer (the update is about 1).

    With ``residual``, a tensor besides x is added; the caller adds x where that is wanted.
    """
    n = k if n is None else n
    adapter_dtype = adapter_dtype or dtype

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0, dtype=adapter_dtype) -> Tensor:
        return (torch.randn(*shape, device=device) * std + mean).to(dtype)

    inputs = {
        "x": normal(m, k, dtype=dtype),
        "down_weight": normal(r, k, std=max(k, 1) ** -0.5),
        "down_bias": normal(r, std=0.5) if bias else None,
        "up_weight": normal(n, r, std=r**-0.5),
        "up_bias": normal(n, std=0.5) if bias else None,
    }
    if residual:
        inputs["residual"] = normal(m, n, dtype=dtype)
    for prefix, wanted, size in (("pre_norm", pre_norm, k), ("norm", norm, n)):
        if wanted:
            inputs[f"{prefix}_weight"] = normal(size, std=0.2, mean=1.0)
            inputs[f"{prefix}_bias"] = normal(size, std=0.2)
    return inputs
