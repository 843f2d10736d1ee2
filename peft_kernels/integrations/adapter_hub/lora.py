"""The LoRA layers of `adapters` on this package's kernels: subclasses of theirs."""

from __future__ import annotations

from types import FunctionType
from typing import Any, NamedTuple

import torch
from adapters.composition import AdapterCompositionBlock, Average, BatchSplit, Parallel, Stack
from adapters.context import ForwardContext
from adapters.methods import lora as theirs
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from peft_kernels.integrations.peft.rows import rows_linear
from peft_kernels.integrations.peft.state import Adapter
from peft_kernels.integrations.served import (
    count,
    is_autocast,
    is_plain,
    is_whole,
    what_is_called,
)
from peft_kernels.ops import lora_linear

KERNEL, ROWS = "lora_linear", "multi_lora_linear"
_KINDS = (theirs.LoRA,)


class Plan(NamedTuple):
    """What a call computes: adapters of all rows, each at a share, or one for each row."""

    shares: dict[str, float]
    rows: list[str] | None


class LoRALinearTorch(theirs.LoRALinearTorch):
    """``y = x W^T + b + sum_j share_j scale_j dropout(x) A_j^T B_j^T``, in one pass.

    The sum has one adapter, or those of an Average. In a BatchSplit or a Parallel each row has its
    own, by :func:`peft_kernels.ops.multi_lora_linear`.
    """

    def forward(self, input_states: Tensor) -> Tensor:
        found = _read(self, input_states)
        if isinstance(found, str):
            if self._modules["loras"]:
                count(self, found)
            return super().forward(input_states)
        plan, adapters = found
        weight = self.weight.T if self.fan_in_fan_out else self.weight
        if plan.rows is not None:
            count(self, ROWS)
            return rows_linear(input_states, weight, self.bias, adapters, plan.rows)
        count(self, KERNEL)
        return _linear(input_states, weight, self.bias, _together(adapters))


class LoRAMergedLinear(theirs.LoRAMergedLinear):
    """The same for a layer that computes query, key and value at once: B is three blocks."""

    def forward(self, x: Tensor) -> Tensor:
        found = _read(self, x)
        if isinstance(found, str):
            if self._modules["loras"]:
                count(self, found)
            return super().forward(x)
        count(self, KERNEL)
        _, (adapter,) = found
        weight = self.weight.T if self.fan_in_fan_out else self.weight
        b = _spread(adapter.b, self.loras[adapter.name])
        return _linear(x, weight, self.bias, adapter._replace(b=b))


SERVED: dict[type, type] = {
    theirs.LoRALinearTorch: LoRALinearTorch,
    theirs.LoRAMergedLinear: LoRAMergedLinear,
}
OWN = {ours: their for their, ours in SERVED.items()}


# ---- which adapters ----------------------------------------------------------------------------


def _read(layer: Any, x: Tensor) -> tuple[Plan, list[Adapter]] | str:
    """What a call with x computes, or why no kernel does."""
    if layer.merged:
        return "merged"
    setup = layer.get_active_setup()
    if setup is None:
        return "no active adapter"
    plan = _plan(layer, setup, x.shape[0] if x.dim() > 1 else 0)
    if isinstance(plan, str):
        return plan
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    if not is_whole(weight, 2) or not (bias is None or is_whole(bias, 1)):
        return "a weight that isn't a whole matrix"
    dtypes: tuple[torch.dtype, ...] = (x.dtype,)
    if is_autocast(x):
        dtypes = (torch.float32, torch.get_autocast_dtype(x.device.type))
    if weight.dtype not in dtypes:
        return f"x in {x.dtype} on a base in {weight.dtype}"
    adapters = []
    for name, share in plan.shares.items():
        found = read_adapter(layer.loras[name], name)
        if isinstance(found, str):
            return found
        if found.a.dtype not in dtypes:
            return f"x in {x.dtype} for an adapter in {found.a.dtype}"
        adapters.append(found._replace(scale=found.scale * share))
    if len(adapters) > 1 and plan.rows is None and any(adapter.dropout_p for adapter in adapters):
        return "Average with dropout"
    return plan, adapters


def _plan(layer: Any, setup: Any, rows: int) -> Plan | str:
    """What a setup asks of the layer, or why that is theirs."""
    loras = layer.loras
    if type(layer) is LoRAMergedLinear:
        first = setup[0]
        return Plan({first: 1.0}, None) if len(setup) == 1 and first in loras else _name_of(setup)
    while type(setup) is Stack:
        here = [part for part in setup if not isinstance(part, str) or part in loras]
        if len(here) != 1:
            return "Stack of several"
        if isinstance(here[0], str):
            return Plan({here[0]: 1.0}, None)
        setup = here[0]
    if not all(isinstance(part, str) and part in loras for part in setup):
        return f"{_name_of(setup)} of others than LoRA"
    names = list(setup)
    if type(setup) is Average and len(set(names)) == len(names):
        # Their weights are a mean's, of products with the given ones in float32.
        shares = (torch.tensor(setup.weights) / len(names)).tolist()
        return Plan(dict(zip(names, shares, strict=True)), None)
    if type(setup) is BatchSplit and sum(setup.batch_sizes) == rows:
        sizes = setup.batch_sizes
    elif type(setup) is Parallel and _is_repeated(rows, len(names)):
        sizes = [rows // len(names)] * len(names)
    else:
        return _name_of(setup)
    each = [name for name, size in zip(names, sizes, strict=True) for _ in range(size)]
    return Plan(dict.fromkeys(names, 1.0), each)


def _is_repeated(rows: int, channels: int) -> bool:
    """Whether a batch has been repeated already for each channel of a Parallel."""
    context = ForwardContext.get_context()
    if context is None or not context.adapters_parallelized or rows % channels:
        return False
    return rows != getattr(context, "original_batch_size", -1)


def _name_of(setup: AdapterCompositionBlock) -> str:
    return type(setup).__name__


def read_adapter(lora: Any, name: str) -> Adapter | str:
    """An adapter of a layer, or why a kernel can't take it."""
    if type(lora) is not theirs.LoRA or not is_plain(lora) or _has_any_global_hook():
        return f"lora: {what_is_called(lora, _KINDS)}"
    if lora.use_gating:
        return "gating"
    if lora.use_dora:
        return "DoRA"
    dropout = lora.lora_dropout
    p = 0.0
    if isinstance(dropout, nn.Module):
        if type(dropout) is not nn.Dropout or not is_plain(dropout):
            return f"lora_dropout: {what_is_called(dropout, (nn.Dropout,))}"
        p = dropout.p if dropout.training else 0.0
    elif type(dropout) is not FunctionType or dropout.__module__ != theirs.__name__:
        return "lora_dropout: another function"
    a, b = lora._parameters.get("lora_A"), lora._parameters.get("lora_B")
    if not (is_whole(a, 2) and is_whole(b, 2)) or a.dtype is not b.dtype:
        return "lora_A, lora_B: not whole matrices of one dtype"
    return "dropout of everything" if p >= 1.0 else Adapter(name, a, b, None, lora.scaling, p)


# ---- calls -------------------------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> Tensor:
    return lora_linear(
        x,
        weight,
        adapter.a,
        adapter.b,
        bias=bias,
        scale=adapter.scale,
        dropout_p=adapter.dropout_p,
    )


def _together(adapters: list[Adapter]) -> Adapter:
    """One adapter that adds what all of these do."""
    if len(adapters) == 1:
        return adapters[0]
    a = torch.cat([adapter.a for adapter in adapters])
    b = torch.cat([adapter.b * adapter.scale for adapter in adapters], dim=1)
    return Adapter("", a, b, None, 1.0, 0.0)


def _spread(b: Tensor, lora: Any) -> Tensor:
    """``[n, heads r]`` of ``[n / 3 heads, r]``: the rows of each block meet their own rank only."""
    blocks = torch.block_diag(*b.chunk(sum(lora.enable_lora)))
    if all(lora.enable_lora):
        return blocks
    rows = lora.lora_ind.to(b.device)
    whole = blocks.new_zeros(rows.shape[0], blocks.shape[1])
    whole[rows] = blocks
    return whole
