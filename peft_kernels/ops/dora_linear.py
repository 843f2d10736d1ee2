"""DoRA linear: ``y = g * (x @ W.T + scale * dropout(x) @ A.T @ B.T) + b``, ``g = m / norm``.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equation 5. The norm, of each row
of ``W + scale B A``, is held constant in the backward (section 4.3). No matrix of W's size is made:

    norm_i^2 = |W_i|^2 + 2 scale B_i . (A W_i^T) + scale^2 B_i (A A^T) B_i^T       [n]

which is one product with a [r, k] matrix, and |W_i|^2, which never changes. With

    S  = dropout(x) A^T              [m, r]   fp32, all that is saved beyond the inputs and y
    z  = x W^T + scale S B^T         [m, n]   never stored
    y  = g z + b

the backward reads dy and y once for what the gain adds, and goes on as ``lora_linear``'s:

    dz = g dy                        [m, n]
    dg = sum_m dy z                  [n]      z = (y - b) / g, or computed anew where g is 0
    dx, dA, dB                       of dz
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels import _library
from peft_kernels.ops._checks import check_devices
from peft_kernels.ops._dispatch import define_call, wants_function
from peft_kernels.ops._dropout import dropped
from peft_kernels.ops._dtypes import acc_dtype, autocast, scale_of
from peft_kernels.ops._quantized import QuantizedWeight
from peft_kernels.ops._rows import in_shape_of, rows_of
from peft_kernels.ops._sharded import are_sharded, lora_linear_sharded, norm_of_shards
from peft_kernels.ops._transforms import gradients_of, wants_gradient_composition
from peft_kernels.ops._weight_rows import cross_of_codes, squares_of_codes
from peft_kernels.ops.lora_linear import (
    check_lora,
    lora_linear,
    lora_linear_bwd_ref,
    read_options,
)
from peft_kernels.ops.lora_linear import example_inputs as lora_inputs

# gain is in the dtype of sums; the factor is scale_t [], where one is given, and scale otherwise.
FWD_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor gain,"
    " float scale, Tensor? scale_t, float dropout_p, Tensor? seed) -> (Tensor, Tensor)"
)
BWD_SCHEMA = (
    "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor gain,"
    " Tensor y, Tensor s, float scale, Tensor? scale_t, float dropout_p, Tensor? seed,"
    " bool needs_x, bool needs_a, bool needs_b, bool needs_gain)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
# Magnitudes that division by norms in the dtype of sums widens to that.
_WIDENED = (torch.float32, torch.float16, torch.bfloat16)
_ROWS = 1024  # of a 16-bit weight, widened at once for its product with A


# ---- reference -------------------------------------------------------------------------------


def dora_linear_fwd_ref(
    x, weight, bias, lora_a, lora_b, gain, scale, scale_t, dropout_p, seed
):  # fmt: skip
    acc = acc_dtype(x)
    s = dropped(x, dropout_p, seed) @ lora_a.to(acc).T
    y = gain * (F.linear(x, weight) + scale_of(scale, scale_t, x) * (s @ lora_b.to(acc).T))
    return (y if bias is None else y + bias.to(acc)).to(x.dtype), s


def dora_linear_bwd_ref(
    dy, x, weight, bias, lora_a, lora_b, gain, y, s, scale, scale_t, dropout_p, seed,
    needs_x, needs_a, needs_b, needs_gain,
):  # fmt: skip
    acc = acc_dtype(x)
    wide_dy = dy.to(acc)
    gradients = lora_linear_bwd_ref(
        (wide_dy * gain).to(dy.dtype), x, weight, lora_a, lora_b, s, scale, scale_t, dropout_p,
        seed, needs_x, needs_a, needs_b,
    )  # fmt: skip
    dgain = gain.new_empty(0)
    if needs_gain:
        z = (y.to(acc) if bias is None else y.to(acc) - bias.to(acc)) / gain
        zero = gain == 0
        if zero.any():
            low_rank = s @ lora_b[zero].to(acc).T
            base = x.to(acc) @ weight[zero].to(acc).T
            z[:, zero] = base + scale_of(scale, scale_t, x) * low_rank
        dgain = (wide_dy * z).sum(0)
    return *gradients, dgain


@_library.outside_autocast
def _composition(x, weight, bias, lora_a, lora_b, gain, scale, scale_t, dropout_p, seed) -> Tensor:
    """y by way of the dtype of sums, so that each gradient is rounded once."""
    acc = acc_dtype(x)
    wide_bias = None if bias is None else bias.to(acc)
    wide = x.to(acc), weight.to(acc), wide_bias, lora_a, lora_b, gain
    return dora_linear_fwd_ref(*wide, scale, scale_t, dropout_p, seed)[0].to(x.dtype)


# ---- shapes ----------------------------------------------------------------------------------


def _fwd_fake(x, weight, bias, lora_a, lora_b, gain, scale, scale_t, dropout_p, seed):
    m, n, r = x.shape[0], weight.shape[0], lora_a.shape[0]
    return x.new_empty(m, n), x.new_empty(m, r, dtype=acc_dtype(x))


def _bwd_fake(
    dy, x, weight, bias, lora_a, lora_b, gain, y, s, scale, scale_t, dropout_p, seed,
    needs_x, needs_a, needs_b, needs_gain,
):  # fmt: skip
    needed = ((x, needs_x), (lora_a, needs_a), (lora_b, needs_b), (gain, needs_gain))
    return tuple(like.new_empty(like.shape if needs else (0,)) for like, needs in needed)


_library.define(
    "dora_linear_fwd",
    FWD_SCHEMA,
    reference=dora_linear_fwd_ref,
    fake=_fwd_fake,
    triton="peft_kernels.triton.dora_linear.launch:dora_linear_fwd",
)
_library.define(
    "dora_linear_bwd",
    BWD_SCHEMA,
    reference=dora_linear_bwd_ref,
    fake=_bwd_fake,
    triton="peft_kernels.triton.dora_linear.launch:dora_linear_bwd",
)


# ---- autograd --------------------------------------------------------------------------------


class _DoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_a, lora_b, gain, *options):
        *settings, variant = options
        fwd = _library.get_op("dora_linear_fwd", variant)
        y, s = fwd(x, weight, bias, lora_a, lora_b, gain, *settings)
        scale, scale_t, dropout_p, seed = settings
        ctx.version = None
        kept = None
        if gain.requires_grad:  # y is there only for its gradient
            kept, ctx.version = _kept_beside(y)
        ctx.save_for_backward(x, weight, bias, lora_a, lora_b, gain, kept, s, scale_t, seed)
        ctx.scale, ctx.dropout_p, ctx.variant = scale, dropout_p, variant
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, lora_a, lora_b, gain, y, s, scale_t, seed = ctx.saved_tensors
        options = ctx.scale, scale_t, ctx.dropout_p, seed
        needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_gain = ctx.needs_input_grad[:6]
        db = dy.sum(0) if needs_bias else None
        if wants_gradient_composition(dy):

            def composed(x, weight, lora_a, lora_b, gain):
                return _composition(x, weight, None, lora_a, lora_b, gain, *options)

            needs = needs_x, needs_weight, needs_a, needs_b, needs_gain
            inputs = x, weight, lora_a, lora_b, gain
            dx, dw, d_a, d_b, dgain = gradients_of(composed, inputs, needs, dy)
            return dx, dw, db, d_a, d_b, dgain, *(None,) * 5
        dy = dy.contiguous()
        if ctx.version is not None and ctx.version.is_another():
            fwd = _library.get_op("dora_linear_fwd", ctx.variant)
            y, _ = fwd(x, weight, bias, lora_a, lora_b, gain, *options)
        bwd = _library.get_op("dora_linear_bwd", ctx.variant)
        dx, d_a, d_b, dgain = bwd(
            dy, x, weight, bias, lora_a, lora_b, gain, dy if y is None else y, s, *options,
            needs_x, needs_a, needs_b, needs_gain,
        )  # fmt: skip
        return (
            dx if needs_x else None,
            (dy * gain).to(x.dtype).T @ x if needs_weight else None,
            db,
            d_a if needs_a else None,
            d_b if needs_b else None,
            dgain if needs_gain else None,
            *(None,) * 5,
        )


class _Version:
    """Which version a tensor is in, without holding its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._counter = tensor.detach()  # shares the tensor's count of writes
        self._counter.data = tensor.new_empty(0)
        self._then = self._counter._version

    def is_another(self) -> bool:
        return self._counter._version != self._then


def _kept_beside(y: Tensor) -> tuple[Tensor, _Version | None]:
    """y to be saved, so that its caller may change y in place, as that of a linear layer may.

    A saved output that was changed is an error of autograd's; this one is computed again.
    """
    if torch.compiler.is_compiling():  # a graph has no writes in place
        return y, None
    return y.data, _Version(y)


_call = define_call(
    "dora_linear",
    FWD_SCHEMA,
    outputs=(0,),
    fake=_fwd_fake,
    apply=_DoRALinear.apply,
    composition=_composition,
)


# ---- public ----------------------------------------------------------------------------------


def dora_linear(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    norm: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Frozen linear layer plus low-rank update, whose rows have learned magnitudes, in one pass.

    ``y = g * (x @ weight.T + scale * dropout(x) @ lora_a.T @ lora_b.T) + bias`` with
    ``g = magnitude / norm`` (Liu et al. 2024, equation 5; gradients as in section 4.3, to
    magnitude through ``g`` and none through the norm). A row of no length has ``g`` = 0. Sums are
    kept in float32 and rounded once. The backward saves ``dropout(x) @ lora_a.T`` in float32, and y
    where magnitude trains: if y is changed in place meanwhile, it is computed again.

    DTensors are computed with where they are, as in :func:`lora_linear`; magnitude and norm lie as
    ``lora_b`` does.

    Args:
        x: ``[..., k]``, float32, float16, bfloat16 or float64, any strides.
        weight: ``[n, k]`` in the dtype of x (a transposed view of a ``[k, n]`` tensor is as good),
            or one in codes, which is widened piece by piece and receives no gradient.
        lora_a: ``[r, k]`` in float32 or the dtype of x, r >= 1.
        lora_b: ``[n, r]`` in the dtype of ``lora_a``.
        magnitude: ``[n]``, any floating dtype.
        bias: ``[n]`` in the dtype of x.
        scale: the factor of the low-rank part, a float or a 0-d tensor without a gradient.
        norm: ``[n]``, what :func:`dora_norm` gives for these; computed here when None.
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
        return _over_codes(
            x, weight, lora_a, lora_b, magnitude,
            bias=bias, scale=scale, norm=norm, dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
    stored = weight
    x, base, bias = autocast(x, weight, bias)
    check_lora(x, base, bias, lora_a, lora_b, scale, dropout_p)
    _check_rows("magnitude", magnitude, base)
    if are_sharded(x, base):
        norm = dora_norm(stored, lora_a, lora_b, scale) if norm is None else norm
        return lora_linear_sharded(
            dora_linear, x, base, lora_a, lora_b, magnitude=magnitude, norm=norm,
            bias=bias, scale=scale, dropout_p=dropout_p, seed=seed,
        )  # fmt: skip
    options = read_options(x, scale, dropout_p, seed)
    if norm is None:
        norm = dora_norm(stored, lora_a, lora_b, scale)
    _check_rows("norm", norm, base)
    gain = _gain(magnitude, norm, acc_dtype(x))
    inputs = rows_of(x), base, bias, lora_a, lora_b, gain, *options
    if wants_function(*inputs):
        y = _DoRALinear.apply(*inputs, _library.variant(x.dtype))
    else:
        y = _call(*inputs)
    return in_shape_of(x, y)


def _over_codes(
    x, weight, lora_a, lora_b, magnitude, *, bias, scale, norm, dropout_p, seed
) -> Tensor:
    """:func:`dora_linear` over a weight in codes: z from these, in the dtype of x, and its gain."""
    x, bias = autocast(x, bias)
    z = lora_linear(x, weight, lora_a, lora_b, scale=scale, dropout_p=dropout_p, seed=seed)
    if bias is not None and (bias.shape != lora_b.shape[:1] or bias.dtype is not x.dtype):
        raise ValueError(
            f"bias must be [n] = [{lora_b.shape[0]}] in x's dtype {x.dtype}; got "
            f"{tuple(bias.shape)}, {bias.dtype}"
        )
    if norm is None:
        norm = dora_norm(weight, lora_a, lora_b, scale)
    _check_rows("magnitude", magnitude, lora_b)
    _check_rows("norm", norm, lora_b)
    acc = acc_dtype(x)
    y = z.to(acc) * _gain(magnitude, norm, acc)
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)


def _gain(magnitude: Tensor, norm: Tensor, acc: torch.dtype) -> Tensor:
    """magnitude / norm, and 0 for a row without a length, which has no direction either."""
    length = norm.detach() if norm.requires_grad else norm
    length = torch.threshold(length if length.dtype is acc else length.to(acc), 0.0, torch.inf)
    return (magnitude if magnitude.dtype in _WIDENED else magnitude.to(acc)) / length


def _check_rows(name: str, values: Tensor, weight: Tensor) -> None:
    n = weight.shape[0]
    if values.shape != (n,):
        raise ValueError(f"{name} has shape {tuple(values.shape)}, but must be [n] = [{n}]")
    if not values.is_floating_point():
        raise TypeError(f"{name} must be floating-point; got {values.dtype}")
    if values.device != weight.device:
        check_devices("weight", weight, [(name, values)])


# ---- the norm ----------------------------------------------------------------------------------


@torch.no_grad()
def dora_norm(
    weight: Tensor | QuantizedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float | Tensor = 1.0,
    base_squares: Tensor | None = None,
) -> Tensor:
    """The norms of the rows of ``weight + scale * lora_b @ lora_a``, without making that matrix.

    A row that the update takes away almost whole has the rounding error of what was there before.

    Args:
        weight: ``[n, k]``, any floating dtype, or in codes, which are widened piece by piece.
        lora_a: ``[r, k]``.
        lora_b: ``[n, r]``.
        scale: a float or a 0-d tensor.
        base_squares: ``[n]``, what :func:`dora_squares` gives for ``weight``; computed when None.

    Returns:
        ``[n]`` in float32, or float64 for a float64 weight, without a gradient.
    """
    if isinstance(weight, QuantizedWeight):
        return _norm(*_terms_of_codes(lora_a, weight, base_squares), lora_b, scale)
    if are_sharded(weight, lora_a):
        return norm_of_shards(_terms, _norm, weight, lora_a, lora_b, scale)
    return _norm(*_terms(weight, lora_a, base_squares), lora_b, scale)


@_library.outside_autocast
def _terms(weight, lora_a, base_squares=None) -> list[Tensor]:
    """What is summed over k: ``|W_i|^2``, ``W A^T`` and ``A A^T``."""
    acc = acc_dtype(weight)
    a = lora_a.to(acc)
    squares = dora_squares(weight) if base_squares is None else base_squares
    cross = torch.cat([rows.to(acc) @ a.T for rows in weight.split(_block(weight))])
    return [squares, cross, a @ a.T]


@_library.outside_autocast
def _terms_of_codes(lora_a, weight: QuantizedWeight, base_squares) -> list[Tensor]:
    """:func:`_terms` of a weight in codes."""
    a = lora_a.float()
    squares = squares_of_codes(weight) if base_squares is None else base_squares
    return [squares, cross_of_codes(weight, a), a @ a.T]


@_library.outside_autocast
def _norm(squares, cross, gram, lora_b, scale) -> Tensor:
    b = lora_b.to(squares.dtype) * scale
    return (squares + (b * (2 * cross + b @ gram)).sum(1)).clamp_min(0).sqrt()


@torch.no_grad()
def dora_squares(weight: Tensor | QuantizedWeight) -> Tensor:
    """The squared norms of the rows of ``weight [n, k]``, in float32 or float64."""
    if isinstance(weight, QuantizedWeight):
        return squares_of_codes(weight)
    acc = acc_dtype(weight)
    return torch.linalg.vector_norm(weight, dim=1, dtype=acc).square()


def _block(weight: Tensor) -> int:
    """The rows that are multiplied at once: all of them, where none are widened."""
    return max(weight.shape[0], 1) if weight.dtype is acc_dtype(weight) else _ROWS


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
    """Random arguments of :func:`dora_linear` at the scale of a trained layer (y is about 1)."""
    inputs = lora_inputs(
        m, n, k, r, dtype=dtype, adapter_dtype=adapter_dtype, bias=bias, device=device
    )
    norm = dora_norm(inputs["weight"], inputs["lora_a"], inputs["lora_b"])
    drawn = torch.rand(n, device=device, dtype=norm.dtype).add_(0.5)
    return inputs | {"magnitude": (norm * drawn).to(inputs["lora_a"].dtype)}
