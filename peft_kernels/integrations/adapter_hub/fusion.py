"""AdapterFusion of `adapters` on this package's kernel: what it attends to, or why it can't."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from adapters.methods.modeling import BertFusion
from torch import Tensor, nn

from peft_kernels.integrations.adapter_hub.bottleneck_state import Bottleneck, read
from peft_kernels.integrations.served import is_autocast, is_plain, what_is_called
from peft_kernels.nn._kept import Kept, can_keep
from peft_kernels.ops.adapter_fusion import Absorbed, absorb, adapter_fusion

KEPT = "_peft_kernels_absorbed"  # in a layer's __dict__: by fusion, what its matrices multiply to


class Fusion(NamedTuple):
    """Q, K and V, and the adapters whose outputs they weigh."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear | None
    temperature: float
    adapters: list[Bottleneck]

    def sources(self) -> list[Tensor]:
        """The parameters that absorbed matrices are made of."""
        parts = [self.query.weight, self.query.bias, self.key.weight]
        parts += [] if self.value is None else [self.value.weight]
        for adapter in self.adapters:
            parts += [part for part in (adapter.up, adapter.up_bias, adapter.scale)
                      if isinstance(part, Tensor)]  # fmt: skip
        return parts


def read_fusion(fusion: Any, children: list[Any], x: Tensor) -> Fusion | str:
    """What the op needs to fuse these adapters' outputs for x, or why it can't."""
    if type(fusion) is not BertFusion or not is_plain(fusion):
        return f"fusion: {what_is_called(fusion, (BertFusion,))}"
    config = fusion.config
    if not (config["query"] and config["key"]) or config["residual_before"]:
        return "fusion: another configuration"
    parts = [fusion.query, fusion.key, *([fusion.value] if config["value"] else [])]
    if any(type(part) is not nn.Linear or not is_plain(part) for part in parts):
        return "fusion: another projection"
    if not is_plain(fusion.dropout) or (fusion.dropout.training and fusion.dropout.p):
        return "fusion: dropout of scores"
    found = []
    for child in children:
        adapter = read(child, x)
        if isinstance(adapter, str):
            return adapter
        if child.use_gating:
            return "fusion: gating"
        if adapter.norm_before is not None:
            return "fusion: the adapter's LayerNorm"
        found.append(adapter)
    if len({adapter.activation for adapter in found}) > 1:
        return "fusion: several activations"
    if {part.weight.dtype for part in parts} != {adapter.down.dtype for adapter in found}:
        return "fusion: several dtypes"
    value = fusion.value if config["value"] else None
    return Fusion(fusion.query, fusion.key, value, fusion.T, found)


def fuse(
    found: Fusion, kept: Kept[Absorbed], x: Tensor, query: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor] | str:
    """The fusion's output and the weights ``[..., N]``, or why theirs is the better plan."""
    sources = found.sources()
    trains = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
    keeps = not trains and all(map(can_keep, sources))
    plan = "absorbed" if keeps else _plan(found, x.numel() // max(x.shape[-1], 1))
    if plan == "direct":
        return "fusion: few rows"
    absorbs = plan == "absorbed"
    if trains:
        matrices = _with_bias_of(found.key, _absorb(found, absorbs))
    else:
        scales = tuple(a.scale for a in found.adapters if not isinstance(a.scale, Tensor))
        matrices = kept.get(
            lambda: _absorb(found, absorbs), sources, (scales, found.temperature, absorbs)
        )
    asked = query if absorbs else F.linear(query, found.query.weight, found.query.bias)
    inside = not is_autocast(x)
    y, p = adapter_fusion(
        x,
        [adapter.down for adapter in found.adapters],
        [_bias(adapter.down, adapter.down_bias) for adapter in found.adapters],
        matrices,
        query=asked,
        activation=found.adapters[0].activation,
        residual=residual if inside else None,
    )
    return (y if inside else y + residual), p


def _absorb(found: Fusion, absorb_query: bool) -> Absorbed:
    with torch.autocast(found.query.weight.device.type, enabled=False):
        return absorb(
            [adapter.up for adapter in found.adapters],
            [_bias(adapter.up, adapter.up_bias) for adapter in found.adapters],
            found.query.weight,
            found.query.bias,
            found.key.weight,
            None if found.value is None else found.value.weight,
            scales=[adapter.scale for adapter in found.adapters],
            temperature=found.temperature,
            absorb_query=absorb_query,
        )


def _with_bias_of(key: nn.Linear, matrices: Absorbed) -> Absorbed:
    """The same, with the key's bias among what it is made of.

    That bias cancels in the softmax: its gradient is zero, which DDP waits for.
    """
    return replace(matrices, score_bias=matrices.score_bias + 0.0 * key.bias.sum())


def _bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_zeros(weight.shape[0]) if bias is None else bias


def _plan(found: Fusion, rows: int) -> str:
    """The plan with the fewest products; see :meth:`peft_kernels.nn.AdapterFusion.plan`."""
    size, adapters = found.query.weight.shape[0], len(found.adapters)
    ranks = sum(adapter.down.shape[0] for adapter in found.adapters) + adapters
    projections = 1 if found.value is None else 2
    scores = rows * ranks / size
    costs = {
        "absorbed": (1 + projections) * ranks + scores,
        "query": projections * ranks + rows + scores,
        "direct": rows * (1 + projections * adapters),
    }
    return min(costs, key=lambda name: costs[name])
