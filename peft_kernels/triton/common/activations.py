# mypy: disable-error-code="no-untyped-def, valid-type, attr-defined"
"""The nonlinearities of ``peft_kernels/ops/_activations.py`` inside the Triton kernels.

Of float32 tiles; ``NAME`` is the one name that the op gives an activation.
"""

import triton
import triton.language as tl

LEAKY_SLOPE = tl.constexpr(0.01)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
GELU_A, GELU_B = tl.constexpr(0.7978845608028654), tl.constexpr(0.044715)
# Below this the quotient of tanh cancels; five terms of its series are exact to float32 there.
TANH_SERIES = tl.constexpr(0.3)


@triton.jit
def _tanh(z):
    e = tl.exp(-2 * tl.abs(z))
    quotient = (1 - e) / (1 + e)
    q = z * z
    series = 1 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835))))
    return tl.where(tl.abs(z) < TANH_SERIES, z * series, tl.where(z < 0, -quotient, quotient))


@triton.jit
def _tanh_derivative(z):
    """1 - tanh^2, without the cancellation."""
    e = tl.exp(-2 * tl.abs(z))
    return 4 * e / ((1 + e) * (1 + e))


@triton.jit
def _sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def _gelu_inner(z):
    return (z + z * z * z * GELU_B) * GELU_A


@triton.jit
def activation(z, NAME: tl.constexpr):
    if NAME == "identity":
        return z
    elif NAME == "relu":
        return tl.where(z > 0, z, 0.0)
    elif NAME == "leaky_relu":
        return tl.where(z > 0, z, z * LEAKY_SLOPE)
    elif NAME == "gelu":
        return 0.5 * z * (1 + tl.math.erf(z * SQRT_HALF))
    elif NAME == "gelu_tanh":
        return 0.5 * z * (1 + _tanh(_gelu_inner(z)))
    elif NAME == "silu":
        return z * _sigmoid(z)
    elif NAME == "tanh":
        return _tanh(z)
    else:
        tl.static_assert(NAME == "sigmoid")
        return _sigmoid(z)


@triton.jit
def activation_derivative(z, NAME: tl.constexpr):
    if NAME == "identity":
        return z * 0 + 1
    elif NAME == "relu":
        return tl.where(z > 0, 1.0, 0.0)
    elif NAME == "leaky_relu":
        return tl.where(z > 0, 1.0, LEAKY_SLOPE)
    elif NAME == "gelu":
        density = tl.exp(-0.5 * z * z) * INV_SQRT_2PI
        return 0.5 * (1 + tl.math.erf(z * SQRT_HALF)) + z * density
    elif NAME == "gelu_tanh":
        inner = _gelu_inner(z)
        slope = (z * z * (3 * GELU_B) + 1) * GELU_A
        return 0.5 * (1 + _tanh(inner)) + 0.5 * z * _tanh_derivative(inner) * slope
    elif NAME == "silu":
        s = _sigmoid(z)
        return s * (1 + z * (1 - s))
    elif NAME == "tanh":
        return _tanh_derivative(z)
    else:
        tl.static_assert(NAME == "sigmoid")
        s = _sigmoid(z)
        return s * (1 - s)
