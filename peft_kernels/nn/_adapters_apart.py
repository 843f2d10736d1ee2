"""Whether one op can compute several bottleneck adapters, each of rows of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.nn.bottleneck import BottleneckAdapter, Norm, _fuses
from peft_kernels.ops._adapter_apart import AdapterFactors
from peft_kernels.ops._dispatch import wants_cpu_forward
from peft_kernels.ops._dtypes import acc_dtype

# What a module's instance has where something is put around its calls.
_CALLS = frozenset({"forward", "_call_impl"})


def factors_of(
    adapters: Sequence[nn.Module],
    x: Tensor,
    terms: tuple[Tensor, ...],
    pre_norm: Norm | None,
    norm: Norm | None,
) -> AdapterFactors | None:
    """What the op is given of several adapters, or None where each must be called by itself.

    The op knows of an adapter no more than its two linear layers, its activation and its scale.
    """
    if len(adapters) < 2 or not wants_cpu_forward(x) or not _are_fit(x, terms, {x.dtype}):
        return None
    norms: list[Any] = [one for one in (pre_norm, norm) if one is not None]
    if not all(_fuses(one, x.shape[-1]) for one in norms):
        return None
    found = [_factors(adapter) for adapter in adapters if _is_plain(adapter)]
    if len(found) < len(adapters):
        return None
    columns = AdapterFactors(*zip(*found, strict=True))
    tensors = [
        *itertools.chain(*columns[:4]),
        *(s for s in columns.scales if isinstance(s, Tensor)),
    ]
    tensors += [p for one in norms for p in one.parameters()]
    return columns if _are_fit(x, tensors, {x.dtype, acc_dtype(x)}) else None


def _are_fit(x: Tensor, tensors: Iterable[Tensor], dtypes: set[torch.dtype]) -> bool:
    """Whether these have one of the dtypes, and lie where x does."""
    return {tensor.dtype for tensor in tensors} <= dtypes and (
        {tensor.device for tensor in tensors} <= {x.device}
    )


def _is_plain(adapter: Any) -> bool:
    """Whether a call of the adapter is one call of the op, and nothing listens to it."""
    own = vars(adapter)
    if type(adapter).forward is not BottleneckAdapter.forward or not _CALLS.isdisjoint(own):
        return False
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or adapter._compiled_call_impl is not None
    ):
        return False
    if (
        adapter.norm_before is not None
        or adapter.norm_after is not None
        or adapter.gate is not None
    ):
        return False
    if adapter.training and adapter.dropout:
        return False
    parts = own["_modules"]
    return _is_read_alone(parts["down"]) and _is_read_alone(parts["up"])


def _is_read_alone(linear: nn.Module) -> bool:
    """Whether a linear layer is its own two parameters."""
    return (
        type(linear) is nn.Linear
        and not linear._forward_pre_hooks
        and linear._parameters["bias"] is not None
    )


def _factors(adapter: Any) -> tuple:
    """A row of :class:`AdapterFactors`."""
    down, up = (adapter._modules[name]._parameters for name in ("down", "up"))
    scaling = adapter.scaling
    return down["weight"], down["bias"], up["weight"], up["bias"], scaling, adapter.activation
