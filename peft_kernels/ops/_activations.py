"""The nonlinearities of bottleneck adapters, and their derivatives.

Each is known by one name in every backend; the names that peers use for the same function are
accepted as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LEAKY_SLOPE = 0.01
_SQRT_HALF = math.sqrt(0.5)
_GELU_A, _GELU_B = math.sqrt(2 / math.pi), 0.044715


def _gelu_derivative(z: Tensor) -> Tensor:
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(z * _SQRT_HALF)) + z * density


def _gelu_tanh_derivative(z: Tensor) -> Tensor:
    t = torch.tanh(_GELU_A * (z + _GELU_B * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * _GELU_A * (1 + 3 * _GELU_B * z * z)


def _silu_derivative(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


# name: (function, derivative), both of the value before the nonlinearity
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "identity": (lambda z: z, torch.ones_like),
    "relu": (torch.relu, lambda z: (z > 0).to(z.dtype)),
    "leaky_relu": (
        lambda z: F.leaky_relu(z, LEAKY_SLOPE),
        lambda z: torch.where(z > 0, torch.ones_like(z), LEAKY_SLOPE),
    ),
    "gelu": (F.gelu, _gelu_derivative),
    "gelu_tanh": (lambda z: F.gelu(z, approximate="tanh"), _gelu_tanh_derivative),
    "silu": (F.silu, _silu_derivative),
    "tanh": (torch.tanh, lambda z: 1 - torch.tanh(z) ** 2),
    "sigmoid": (torch.sigmoid, lambda z: torch.sigmoid(z) * (1 - torch.sigmoid(z))),
}
_ALIASES = {
    "linear": "identity",
    "leakyrelu": "leaky_relu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "swish": "silu",
}


def activation_name(name: str) -> str:
    """The one name of an activation.

    Raises:
        ValueError: there is no such activation.
    """
    known = _ALIASES.get(name, name)
    if known not in ACTIVATIONS:
        names = ", ".join(sorted([*ACTIVATIONS, *_ALIASES]))
        raise ValueError(f"activation must be one of {names}; got {name!r}")
    return known
