"""A bottleneck adapter of `adapters` as a call finds it: what the op needs of it, or why it can't.

`adapters` changes its modules in place, and whoever likes puts hooks on them, so that every call
looks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from adapters.methods import modeling
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import get_activation

from peft_kernels.integrations.served import is_autocast, is_plain, is_whole, what_is_called

KINDS = (modeling.Adapter, modeling.ParallelAdapter)
_LINEARS = (nn.Linear,)
# The classes of the activations that the op knows, by the names that both use for them.
_ACTIVATIONS = {
    type(get_activation(name)): name
    for name in ("relu", "swish", "silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "tanh",
                 "sigmoid", "linear")
}  # fmt: skip


class Bottleneck(NamedTuple):
    """The parameters of one adapter."""

    down: Tensor  # [r, n]
    down_bias: Tensor | None
    up: Tensor  # [n, r]
    up_bias: Tensor | None
    activation: str
    scale: float | Tensor
    dropout_p: float
    norm_before: nn.LayerNorm | None
    norm_after: nn.LayerNorm | None


def read(adapter: nn.Module, x: Tensor) -> Bottleneck | str:
    """What the op needs to compute the adapter of x, or why it can't."""
    found = read_parts(adapter)
    if isinstance(found, str):
        return found
    own = found.down.dtype
    if not is_autocast(x):
        return found if own is x.dtype else f"x in {x.dtype} for an adapter in {own}"
    if own not in (torch.float32, torch.get_autocast_dtype(x.device.type)):
        return f"an adapter in {own} under autocast"
    # The host's LayerNorms keep wide what is added up before them.
    return "the adapter's LayerNorm under autocast" if found.norm_after is not None else found


def read_parts(adapter: Any) -> Bottleneck | str:
    """As :func:`read`, for rows in the adapter's own dtype."""
    if type(adapter) not in KINDS or not is_plain(adapter) or _has_any_global_hook():
        return f"adapter: {what_is_called(adapter, KINDS)}"
    if adapter.use_gating:
        return "gating"
    if "DropPath" in adapter._modules and adapter.training:
        return "stochastic depth"
    *norms, down, activation = adapter.adapter_down
    up, dropout = adapter.adapter_up, adapter.dropout
    for name, linear in (("adapter_down", down), ("adapter_up", up)):
        if type(linear) is not nn.Linear or not is_plain(linear):
            return f"{name}: {what_is_called(linear, _LINEARS)}"
    norm_before = norms[0] if norms else None
    norm_after = adapter.adapter_norm_after if adapter.add_layer_norm_after else None
    plain = (adapter.adapter_down, activation, dropout)
    if not all(map(is_plain, plain)) or type(dropout) is not nn.Dropout or len(norms) > 1:
        return "adapter: hooks"
    if not all(norm is None or fuses(norm) for norm in (norm_before, norm_after)):
        return "adapter: another LayerNorm"
    known = _name_of(activation.f)
    if known is None:
        return f"non_linearity: {type(activation.f).__name__}"
    matrices = (down.weight, up.weight)
    if not all(is_whole(matrix, 2) for matrix in matrices):
        return "weights that aren't whole matrices"
    if len({parameter.dtype for parameter in adapter.parameters()}) > 1:
        return "an adapter in several dtypes"
    p = dropout.p if dropout.training else 0.0
    if p >= 1.0:
        return "dropout of everything"
    return Bottleneck(
        down.weight,
        down.bias,
        up.weight,
        up.bias,
        known,
        adapter.scaling,
        p,
        norm_before,
        norm_after,
    )


def fuses(norm: Any) -> bool:
    """Whether the op can do this norm's work: a plain LayerNorm that nothing else listens to."""
    return type(norm) is nn.LayerNorm and norm.weight is not None and is_plain(norm)


def _name_of(activation: Any) -> str | None:
    if activation is F.leaky_relu:
        return "leaky_relu"
    if isinstance(activation, nn.Module) and not is_plain(activation):
        return None
    return _ACTIVATIONS.get(type(activation))
