"""LoRA linear: ``y = x @ W.T + b + scale * dropout(x) @ A.T @ B.T``.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", equation 3. With

    S  = dropout(x) A^T              [m, r]   fp32, the only tensor saved beyond the inputs
    y  = x W^T + b + scale S B^T     [m, n]

the backward shares dS between dA and dx and reads dy once for dS and dB:

    dS = scale dy B                  [m, r]
    dB = scale dy^T S                [n, r]
    dA = dS^T dropout(x)             [r, k]
    dx = dy W + dropout'(dS A)       [m, k]   dropout' multiplies by the same factor as dropout
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels import _library
from peft_kernels.ops._checks import (
    are_alike,
    check_adapter,
    check_devices,
    check_dropout,
    check_float,
    check_same,
)
from peft_kernels.ops._dispatch import define_call, wants_function
from peft_kernels.ops._dropout import dropped, factor_of, seed_tensor
from peft_kernels.ops._dtypes import acc_dtype, autocast, scale_of
from peft_kernels.ops._quantized import (
    QuantizedWeight,
    check_codes,
    dequantize,
    lora_linear_codes,
)
from peft_kernels.ops._rows import in_shape_of, rows_of
from peft_kernels.ops._sharded import are_sharded, lora_linear_sharded
from peft_kernels.ops._transforms import (
    gradients_of,
    is_special,
    wants_composition,
    wants_gradient_composition,
)

# The factor is scale_t [], where one is given, and scale otherwise.
FWD_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scale,"
    " Tensor? scale_t, float dropout_p, Tensor? seed) -> (Tensor, Tensor)"
)
BWD_SCHEMA = (
    "(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor s, float scale,"
    " Tensor? scale_t, float dropout_p, Tensor? seed, bool needs_x, bool needs_a, bool needs_b)"
    " -> (Tensor, Tensor, Tensor)"
)


# ---- reference -------------------------------------------------------------------------------


def lora_linear_fwd_ref(x, weight, bias, lora_a, lora_b, scale, scale_t, dropout_p, seed):
    acc = acc_dtype(x)
    s = dropped(x, dropout_p, seed) @ lora_a.to(acc).T
    delta = scale_of(scale, scale_t, x) * (s @ lora_b.to(acc).T)
    return (F.linear(x, weight, bias) + delta).to(x.dtype), s


def lora_linear_bwd_ref(
    dy, x, weight, lora_a, lora_b, s, scale, scale_t, dropout_p, seed, needs_x, needs_a, needs_b
):
    acc = acc_dtype(x)
    scale = scale_of(scale, scale_t, x)
    wide_dy = dy.to(acc)
    ds = scale * (wide_dy @ lora_b.to(acc))
    dx, da, db = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    if needs_x:
        low_rank = ds @ lora_a.to(acc)
        if seed is not None:
            low_rank *= factor_of(x, dropout_p, seed)
        dx = (dy @ weight + low_rank).to(x.dtype)
    if needs_a:
        da = (ds.T @ dropped(x, dropout_p, seed)).to(lora_a.dtype)
    if needs_b:
        db = (scale * (wide_dy.T @ s)).to(lora_b.dtype)
    return dx, da, db


@_library.outside_autocast
def _composition(x, weight, bias, lora_a, lora_b, scale, scale_t, dropout_p, seed) -> Tensor:
    """y by way of the dtype of sums, so that each gradient is rounded once."""
    acc = acc_dtype(x)
    wide_bias = None if bias is None else bias.to(acc)
    wide = x.to(acc), weight.to(acc), wide_bias, lora_a, lora_b
    return lora_linear_fwd_ref(*wide, scale, scale_t, dropout_p, seed)[0].to(x.dtype)


# ---- shapes ----------------------------------------------------------------------------------


def _fwd_fake(x, weight, bias, lora_a, lora_b, scale, scale_t, dropout_p, seed):
    m, n, r = x.shape[0], weight.shape[0], lora_a.shape[0]
    return x.new_empty(m, n), x.new_empty(m, r, dtype=acc_dtype(x))


def _bwd_fake(
    dy, x, weight, lora_a, lora_b, s, scale, scale_t, dropout_p, seed, needs_x, needs_a, needs_b
):
    def shaped(like: Tensor, needed: bool) -> Tensor:
        return like.new_empty(like.shape if needed else (0,))

    return shaped(x, needs_x), shaped(lora_a, needs_a), shaped(lora_b, needs_b)


_library.define(
    "lora_linear_fwd",
    FWD_SCHEMA,
    reference=lora_linear_fwd_ref,
    fake=_fwd_fake,
    triton="peft_kernels.triton.lora_linear.launch:lora_linear_fwd",
)
_library.define(
    "lora_linear_bwd",
    BWD_SCHEMA,
    reference=lora_linear_bwd_ref,
    fake=_bwd_fake,
    triton="peft_kernels.triton.lora_linear.launch:lora_linear_bwd",
)


# ---- autograd --------------------------------------------------------------------------------


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, scale, scale_t, dropout_p, seed, variant):
        fwd = _library.get_op("lora_linear_fwd", variant)
        y, s = fwd(x, weight, bias, lora_a, lora_b, scale, scale_t, dropout_p, seed)
        ctx.save_for_backward(x, weight, lora_a, lora_b, s, scale_t, seed)
        ctx.scale, ctx.dropout_p, ctx.variant = scale, dropout_p, variant
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, lora_a, lora_b, s, scale_t, seed = ctx.saved_tensors
        options = ctx.scale, scale_t, ctx.dropout_p, seed
        needs_x, needs_weight, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        if wants_gradient_composition(dy):

            def composed(x, weight, lora_a, lora_b):
                return _composition(x, weight, None, lora_a, lora_b, *options)

            needs = needs_x, needs_weight, needs_a, needs_b
            dx, dw, da, db = gradients_of(composed, (x, weight, lora_a, lora_b), needs, dy)
            return dx, dw, dy.sum(0) if needs_bias else None, da, db, *(None,) * 5
        dy = dy.contiguous()
        bwd = _library.get_op("lora_linear_bwd", ctx.variant)
        dx, da, db = bwd(dy, x, weight, lora_a, lora_b, s, *options, needs_x, needs_a, needs_b)
        return (
            dx if needs_x else None,
            dy.T @ x if needs_weight else None,
            dy.sum(0) if needs_bias else None,
            da if needs_a else None,
            db if needs_b else None,
            *(None,) * 5,
        )


_call = define_call(
    "lora_linear",
    FWD_SCHEMA,
    outputs=(0,),
    fake=_fwd_fake,
    apply=_LoRALinear.apply,
    composition=_composition,
)


# ---- public ----------------------------------------------------------------------------------


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Frozen linear layer plus low-rank update, in one pass.

    ``y = x @ weight.T + bias + scale * dropout(x) @ lora_a.T @ lora_b.T``
    (Hu et al. 2021, equation 3). Sums are kept in float32 and rounded once; the intermediate
    ``dropout(x) @ lora_a.T`` is float32 and is all that the backward saves beyond the inputs.

    DTensors are computed with where they are: along each dimension of its mesh ``weight`` is
    Shard(0), Shard(1) or Replicate(), the others are brought into what goes with that, and y is
    Shard(-1), Partial() or as x is. A dropout's seed is then that of the mesh's first process.

    Args:
        x: ``[..., k]``, float32, float16, bfloat16 or float64, any strides.
        weight: ``[n, k]`` in the dtype of x (a transposed view of a ``[k, n]`` tensor is as good),
            or one in codes, which is widened piece by piece and receives no gradient. With x in
            bfloat16 it may be rounded to that as it is widened, where a CPU multiplies bfloat16.
        lora_a: ``[r, k]`` in float32 or the dtype of x, r >= 1.
        lora_b: ``[n, r]`` in the dtype of ``lora_a``.
        bias: ``[n]`` in the dtype of x.
        scale: the factor of the low-rank part, a float or a 0-d tensor without a gradient.
        dropout_p: the share of elements dropped, in [0, 1), on the low-rank branch only.
        seed: 64-bit seed of the dropout, an int or a 0-d int64 tensor; drawn from torch's
            generator when None. No mask is stored: the backward draws it again.

    Returns:
        ``[..., n]`` in the dtype of x, or in autocast's dtype under autocast.

    Raises:
        ValueError: shapes that don't fit, tensors on several devices, ``dropout_p`` outside [0, 1),
            a ``scale`` that requires a gradient.
        TypeError: dtypes that can't be mixed, DTensors beside plain tensors.
    """
    if isinstance(weight, QuantizedWeight):
        options = {"bias": bias, "scale": scale, "dropout_p": dropout_p, "seed": seed}
        return _over_codes(x, weight, lora_a, lora_b, **options)
    x, base, bias = autocast(x, weight, bias)
    check_lora(x, base, bias, lora_a, lora_b, scale, dropout_p)
    if are_sharded(x, base):
        return lora_linear_sharded(
            lora_linear, x, base, lora_a, lora_b,
            bias=bias, scale=scale, dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
    return _served(x, base, bias, lora_a, lora_b, *read_options(x, scale, dropout_p, seed))


def read_options(
    x: Tensor, scale: float | Tensor, dropout_p: float, seed: int | Tensor | None
) -> tuple[float, Tensor | None, float, Tensor | None]:
    """``scale``, ``scale_t``, ``dropout_p`` and ``seed`` as the ops take them."""
    seed = seed_tensor(seed, x.device) if dropout_p > 0.0 else None
    if not isinstance(scale, Tensor):
        return float(scale), None, float(dropout_p), seed
    if scale.requires_grad:
        _check_gradient_of_scale()
    return 1.0, scale, float(dropout_p), seed


def _over_codes(x, weight, lora_a, lora_b, *, bias, scale, dropout_p, seed) -> Tensor:
    """:func:`lora_linear` over a weight in codes."""
    x, _, bias = autocast(x, None, bias)
    check_codes(x, weight, bias, lora_a, lora_b)
    _check_options(scale, dropout_p)
    if is_special():
        base = dequantize(weight, x.dtype)
        if not lora_a.shape[0]:
            return F.linear(x, base, bias)
        options = {"bias": bias, "scale": scale, "dropout_p": dropout_p, "seed": seed}
        return lora_linear(x, base, lora_a, lora_b, **options)
    rest = bias, lora_a, lora_b, *read_options(x, scale, dropout_p, seed)
    return in_shape_of(x, lora_linear_codes(rows_of(x), weight, *rest))


def linear_of_codes(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """The layer alone, ``x @ weight.T + bias``: :func:`lora_linear` at rank 0."""
    n, k = weight.shape
    dtype = acc_dtype(x)
    a, b = x.new_empty(0, k, dtype=dtype), x.new_empty(n, 0, dtype=dtype)
    return lora_linear(x, weight, a, b, bias=bias)


def lora_linear_plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """:func:`lora_linear` for a module that knows its parameters, in less time a call.

    The caller has seen to it that these are no DTensors, in dtypes that go together, that matrices
    have two dimensions and the bias one, that there is no autocast, and that ``dropout_p`` is in
    [0, 1). Shapes and devices are looked at here; where they don't fit, :func:`lora_linear` raises
    its error.
    """
    (n, k), (r, a_k), (b_n, b_r) = weight.shape, lora_a.shape, lora_b.shape
    x_shape, device = x.shape, x.device
    if not (
        x_shape
        and x_shape[-1] == k == a_k
        and n == b_n
        and r == b_r > 0
        and device == weight.device == lora_a.device == lora_b.device
        and (bias is None or (bias.shape[0] == n and bias.device == device))
    ):
        return lora_linear(
            x, weight, lora_a, lora_b, bias=bias, scale=scale, dropout_p=dropout_p
        )  # fmt: skip
    seed = seed_tensor(None, device) if dropout_p > 0.0 else None
    return _served(x, weight, bias, lora_a, lora_b, scale, None, dropout_p, seed)


def _served(x: Tensor, *rest) -> Tensor:
    inputs = rows_of(x), *rest
    if wants_function(*inputs):
        y = _LoRALinear.apply(*inputs, _library.variant(x.dtype))
    else:
        y = _call(*inputs)
    return in_shape_of(x, y)


# The checks run on every call, so a message is only put together when it is raised.
def check_lora(x, weight, bias, lora_a, lora_b, scale, dropout_p) -> None:
    """Raises a ValueError or TypeError unless these are arguments of :func:`lora_linear`."""
    x_shape, w_shape, a_shape, b_shape = x.shape, weight.shape, lora_a.shape, lora_b.shape
    if not (len(w_shape) == len(a_shape) == len(b_shape) == 2):
        _refuse_dimensions(weight=weight, lora_a=lora_a, lora_b=lora_b)
    (n, k), (r, a_k) = w_shape, a_shape
    if not x_shape:
        raise ValueError("x must have at least 1 dimension; got a 0-d tensor")
    if x_shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x_shape)}, but must end in weight's k = {k}")
    if a_k != k:
        raise ValueError(f"lora_a has shape {(r, a_k)}, but must have weight's k = {k} columns")
    if r < 1:
        raise ValueError(f"lora_a must have at least 1 row (the rank); got shape {(r, a_k)}")
    if b_shape != (n, r):
        raise ValueError(f"lora_b has shape {tuple(b_shape)}, but must be [n, r] = [{n}, {r}]")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, but must be [n] = [{n}]")
    if not are_alike(x, weight, bias, lora_a, lora_b):
        _check_types(x, (("weight", weight), ("bias", bias)), lora_a, lora_b)
    _check_options(scale, dropout_p)


def _check_options(scale: float | Tensor, dropout_p: float) -> None:
    if isinstance(scale, Tensor) and scale.dim() != 0:
        raise ValueError(f"scale must be a float or a 0-d tensor; got shape {tuple(scale.shape)}")
    check_dropout(dropout_p)


def _refuse_dimensions(**matrices: Tensor) -> None:
    for name, tensor in matrices.items():
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions; got shape {tuple(tensor.shape)}")


def _check_types(x, base, lora_a, lora_b) -> None:
    check_float("x", x)
    check_same("x", x, base)
    check_adapter("x", x, [("lora_a", lora_a)])
    check_same("lora_a", lora_a, [("lora_b", lora_b)])
    check_devices("x", x, (*base, ("lora_a", lora_a), ("lora_b", lora_b)))


def _check_gradient_of_scale() -> None:
    """Raises a ValueError where the gradient that scale requires would be none."""
    if torch.is_grad_enabled() and not wants_composition():
        raise ValueError(
            "scale must not require a gradient, for it gets none: give scale.detach(), or multiply "
            "lora_b by what is to be trained"
        )


# ---- example inputs, for tests and benchmarks ------------------------------------------------


def example_inputs(
    m: int,
    n: int,
    k: int,
    r: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Random arguments of :func:`lora_linear` at the scale of a trained layer (y is about 1)."""

    def normal(*shape: int, std: float, dtype: torch.dtype) -> Tensor:
        return (torch.randn(*shape, device=device) * std).to(dtype)

    adapter_dtype = adapter_dtype or dtype
    inputs = {
        "x": normal(m, k, std=1.0, dtype=dtype),
        "weight": normal(n, k, std=max(k, 1) ** -0.5, dtype=dtype),
        "lora_a": normal(r, k, std=max(k, 1) ** -0.5, dtype=adapter_dtype),
        "lora_b": normal(n, r, std=r**-0.5, dtype=adapter_dtype),
    }
    if bias:
        inputs["bias"] = normal(n, std=1.0, dtype=dtype)
    return inputs
