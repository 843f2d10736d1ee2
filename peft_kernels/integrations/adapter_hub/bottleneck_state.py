"""A bottleneck adapter of `adapters` as a call finds it: what the op needs of it, or why it can't.

`adapters` changes its modules in place, and whoever likes puts hooks on them, so that every call
looks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from adapters.context import ForwardContext
from adapters.methods import modeling
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.activations import get_activation

from peft_kernels.integrations.served import is_autocast, is_plain, is_whole, what_is_called

KINDS = (modeling.Adapter, modeling.ParallelAdapter)
# Beyond this size the library's own backward, of products of whole matrices, is faster on a CPU.
WIDE = 128
_LINEARS = (nn.Linear, modeling.PHMLayer)
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


def read(adapter: Any, x: Tensor) -> Bottleneck | str:
    """What the op needs to compute the adapter of x, or why it can't."""
    reason = why_not(adapter)
    if reason is not None:
        return reason
    *norms, down, activation = adapter.adapter_down
    (d, d_bias), (u, u_bias) = _matrix(down), _matrix(adapter.adapter_up)
    p = adapter.dropout.p if adapter.dropout.training else 0.0
    known: Any = _name_of(activation.f)
    before, after = norms[0] if norms else None, _norm_after(adapter)
    if d.shape[0] > WIDE and x.device.type == "cpu" and d.requires_grad and torch.is_grad_enabled():
        return "a wide bottleneck in training"
    found = Bottleneck(d, d_bias, u, u_bias, known, adapter.scaling, p, before, after)
    if not is_autocast(x):
        return found if d.dtype is x.dtype else f"x in {x.dtype} for an adapter in {d.dtype}"
    if d.dtype not in (torch.float32, torch.get_autocast_dtype(x.device.type)):
        return f"an adapter in {d.dtype} under autocast"
    # The host's LayerNorms keep wide what is added up before them.
    return "the adapter's LayerNorm under autocast" if after is not None else found


def why_not(adapter: Any) -> str | None:
    """Why the op can't compute an adapter, whatever it is given, or None."""
    if type(adapter) not in KINDS or not is_plain(adapter) or _has_any_global_hook():
        return f"adapter: {what_is_called(adapter, KINDS)}"
    if "DropPath" in adapter._modules and adapter.training:
        return "stochastic depth"
    *norms, down, activation = adapter.adapter_down
    for name, linear in (("adapter_down", down), ("adapter_up", adapter.adapter_up)):
        if type(linear) not in _LINEARS or not is_plain(linear):
            return f"{name}: {what_is_called(linear, _LINEARS)}"
        if type(linear) is nn.Linear and not is_whole(linear._parameters.get("weight"), 2):
            return "weights that aren't whole matrices"
    dropout = adapter.dropout
    called = [
        adapter.adapter_down,
        activation,
        dropout,
        *([adapter.gate] if adapter.use_gating else []),
    ]
    plain = all(map(is_plain, called))
    if not plain or type(dropout) is not nn.Dropout or len(norms) > 1:
        return "adapter: hooks"
    if not all(norm is None or fuses(norm) for norm in (*norms, _norm_after(adapter))):
        return "adapter: another LayerNorm"
    if _name_of(activation.f) is None:
        return f"non_linearity: {type(activation.f).__name__}"
    if len({parameter.dtype for parameter in adapter.parameters()}) > 1:
        return "an adapter in several dtypes"
    return "dropout of everything" if dropout.training and dropout.p >= 1.0 else None


def _norm_after(adapter: Any) -> nn.LayerNorm | None:
    return adapter.adapter_norm_after if adapter.add_layer_norm_after else None


def _matrix(linear: Any) -> tuple[Tensor, Tensor | None]:
    """``[out, in]`` and the bias of a projection."""
    if type(linear) is nn.Linear:
        return linear.weight, linear.bias
    rule = _factor(linear, "phm_rule", linear.shared_phm_rule, linear.factorized_phm_rule)
    name = f"W_{linear.position}" if linear.shared_W_phm else "W"
    weight = _factor(linear, name, linear.shared_W_phm, linear.factorized_phm_W)
    # sum over i of rule_i x W_i, the Kronecker product: [in, out]
    blocks = torch.einsum("iab,icd->acbd", rule, weight)
    return blocks.reshape(linear.in_features, linear.out_features).T, linear.b


def _factor(linear: Any, name: str, shared: bool, factorized: bool) -> Tensor:
    """A stack of matrices of Compacter's, which may be of low rank, and of all layers together."""

    def part(name: str) -> Tensor:
        if shared:
            return ForwardContext.get_context().shared_parameters[linear.name][name]
        return getattr(linear, name)

    return torch.bmm(part(f"{name}_left"), part(f"{name}_right")) if factorized else part(name)


def fuses(norm: Any) -> bool:
    """Whether the op can do this norm's work: a plain LayerNorm that nothing else listens to."""
    return type(norm) is nn.LayerNorm and norm.weight is not None and is_plain(norm)


def _name_of(activation: Any) -> str | None:
    if activation is F.leaky_relu:
        return "leaky_relu"
    if isinstance(activation, nn.Module) and not is_plain(activation):
        return None
    return _ACTIVATIONS.get(type(activation))
