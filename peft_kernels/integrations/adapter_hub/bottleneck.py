"""The bottleneck layers of `adapters` on this package's kernels.

Such a layer is a module of its own, or, in BERT and T5, the sublayer itself, of a class that has
``BottleneckLayer`` among its bases. Each class gets a subclass, made when it is first met.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from adapters.composition import AdapterCompositionBlock, BatchSplit, Fuse, Stack
from adapters.context import ForwardContext
from adapters.methods.bottleneck import BottleneckLayer, BottleneckState
from adapters.methods.modeling import ParallelAdapter
from torch import Tensor, nn

from peft_kernels.integrations.adapter_hub.bottleneck_state import (
    Bottleneck,
    fuses,
    read,
)
from peft_kernels.integrations.adapter_hub.fusion import KEPT, fuse, read_fusion
from peft_kernels.integrations.adapter_hub.stand_in import StandIn
from peft_kernels.integrations.served import count, is_autocast
from peft_kernels.nn._kept import Kept
from peft_kernels.ops.adapter import adapter as adapter_op

KERNEL, FUSION = "adapter", "adapter_fusion"


class Served(StandIn, BottleneckLayer):
    """What is put before a class of bottleneck layers: forward passes by kernels.

    ``y = LN(residual + scale dropout(act(LN(x) D^T + b_d) U^T + b_u))``, with the norms and the
    residuals that the adapter's configuration asks for, is one call of
    :func:`peft_kernels.ops.adapter` where one adapter is active. In compositions each adapter is
    a call, without the sublayer's norm.
    """

    def bottleneck_layer_forward(
        self, hidden_states: Tensor, residual_input: Tensor | None, layer_norm: nn.Module | None
    ) -> Tensor:
        setup = self.get_active_setup()
        if setup is None:
            if self._modules["adapters"]:
                count(self, "no active adapter")
        elif (parts := _parts(setup, self._modules["adapters"], hidden_states)) is not None:
            y = _whole(parts, hidden_states, residual_input, layer_norm)
            if y is not None:
                for _ in parts.adapters:
                    count(self, KERNEL)
                return y
        return super().bottleneck_layer_forward(hidden_states, residual_input, layer_norm)

    def compose_single(self, adapter_setup: str, state: BottleneckState, lvl: int = 0) -> Any:
        x, residual = state.hidden_states, state.adapter_residual
        adapter = self.adapters[adapter_setup]
        found = read(adapter, x)
        if isinstance(found, str):
            count(self, found)
            state = super().compose_single(adapter_setup, state, lvl=lvl)
            return state if self._fuses(adapter_setup) else state._replace(bottleneck_up=None)
        count(self, KERNEL)
        gate = _gate(adapter, x)
        context = ForwardContext.get_context()
        if gate is not None and context is not None and context.output_adapter_gating_scores:
            self._store_gating_score(adapter_setup, gate)
        up = None
        if gate is not None or self._fuses(adapter_setup):  # which attends to the update alone
            y, up = _with_up(adapter, found, x, residual, gate)
            up = up if self._fuses(adapter_setup) else None
        else:
            y = _alone(adapter, found, x, residual)
        return state._replace(hidden_states=y, bottleneck_up=up, last=adapter_setup)

    def _fuses(self, name: str) -> bool:
        return _is_fused(name, self.get_active_setup())

    def compose_batch_split(
        self, adapter_setup: BatchSplit, state: BottleneckState, lvl: int = 0
    ) -> BottleneckState:
        sizes, x = adapter_setup.batch_sizes, state.hidden_states
        plain = all(isinstance(child, str) and child in self.adapters for child in adapter_setup)
        if not plain or sum(sizes) != x.shape[0] or self._fuses(adapter_setup[0]):
            return super().compose_batch_split(adapter_setup, state, lvl=lvl)
        state = self.pre_block(adapter_setup, state)
        parts = []
        residuals = state.adapter_residual.split(sizes)
        rows = zip(adapter_setup, state.hidden_states.split(sizes), residuals, strict=True)
        for child, part, residual in rows:
            given = state._replace(hidden_states=part, adapter_residual=residual)
            parts.append(self.compose_single(child, given, lvl=lvl + 1))
        # Which adapter of each row computed what is in one tensor; the rest is of all rows yet.
        return state._replace(
            hidden_states=torch.cat([part.hidden_states for part in parts]), last=parts[-1].last
        )

    def compose_fuse(self, adapter_setup: Fuse, state: BottleneckState, lvl: int = 0) -> Any:
        found = self._fused(adapter_setup, state)
        if isinstance(found, str):
            count(self, found)
            return super().compose_fuse(adapter_setup, state, lvl=lvl)
        count(self, FUSION)
        return found

    def _fused(self, setup: Fuse, state: BottleneckState) -> BottleneckState | str:
        """The state after a Fuse, or why it is theirs."""
        adapters, last = self._modules["adapters"], setup.last()
        if not all(isinstance(child, str) for child in setup):
            return "Fuse of compositions"
        if last not in adapters or setup.name not in self.adapter_fusion_layer:
            return "Fuse of adapters that the layer doesn't have"
        config, _ = self.adapters_config.get_fusion(setup.name)
        x, query, residual = adapters[last].pre_forward(
            state.hidden_states, state.input_tensor, state.layer_norm, fusion_config=config
        )
        fusion = self.adapter_fusion_layer[setup.name]
        children = [adapters[child] for child in setup if child in adapters]
        found = read_fusion(fusion, children, x)
        if isinstance(found, str):
            return found
        kept = self.__dict__.setdefault(KEPT, {}).setdefault(setup.name, Kept())
        result = fuse(found, kept, x, query, residual)
        if isinstance(result, str):
            return result
        y, p = result
        fusion.T = max(fusion.T - fusion.reduction, 1.0)  # as its own forward does
        context = ForwardContext.get_context()
        if context is not None and context.output_adapter_fusion_attentions:
            self._store_fusion_attentions(setup.name, p.cpu().numpy())
        return state._replace(hidden_states=y, adapter_residual=residual, last=last)


# ---- which adapter -----------------------------------------------------------------------------


class Parts(NamedTuple):
    """The adapters of a layer, each of its own rows."""

    adapters: list[Any]
    sizes: list[int] | None  # None: there is one, of all rows


def _parts(setup: AdapterCompositionBlock, adapters: Any, x: Tensor) -> Parts | None:
    """What a setup asks of a layer, if it is one adapter for each row."""
    if type(setup) not in (Stack, BatchSplit) or not all(isinstance(name, str) for name in setup):
        return None
    here = [adapters[name] for name in setup if name in adapters]
    if type(setup) is Stack:
        return Parts(here, None) if len(here) == 1 else None
    sizes = setup.batch_sizes
    if len(here) < len(setup) or sum(sizes) != x.shape[0]:
        return None
    # The library has the first do what comes before all, and the last what comes after.
    return Parts(here, sizes) if len({_order(adapter) for adapter in here}) == 1 else None


def _order(adapter: Any) -> tuple:
    """Which norm and which residual come where."""
    return (
        type(adapter),
        adapter.residual_before_ln,
        adapter.original_ln_before,
        adapter.original_ln_after,
        adapter.use_gating,
        adapter.add_layer_norm_after,
    )


def _is_fused(name: str, setup: Any) -> bool:
    """Whether an adapter is one of those that a Fuse attends to."""
    if not isinstance(setup, AdapterCompositionBlock):
        return False
    if isinstance(setup, Fuse) and name in setup.flatten():
        return True
    return any(_is_fused(name, child) for child in setup)


# ---- calls of the op ---------------------------------------------------------------------------


def _whole(parts: Parts, f: Tensor, i: Tensor | None, norm: nn.Module | None) -> Tensor | None:
    """All that the layer does, or None if that is no single call of the op for each adapter.

    Args:
        f, i: the sublayer's output and its input.
        norm: the sublayer's LayerNorm.
    """
    if is_autocast(f) or (norm is not None and not fuses(norm)):
        return None
    if i is not None and not _is_alike(f, i):
        return None
    found = [read(adapter, f) for adapter in parts.adapters]
    served = [each for each in found if not isinstance(each, str) and each.norm_after is None]
    if len(served) < len(found) or parts.adapters[0].use_gating:
        return None
    if parts.sizes is None:
        return _whole_of(parts.adapters[0], served[0], f, i, norm)
    inputs = [None] * len(served) if i is None else i.split(parts.sizes)
    rows = zip(parts.adapters, served, f.split(parts.sizes), inputs, strict=True)
    results = []
    for adapter, each, part, skip in rows:
        y = _whole_of(adapter, each, part, skip, norm)
        if y is None:
            return None
        results.append(y)
    return torch.cat(results)


def _whole_of(
    adapter: Any, found: Bottleneck, f: Tensor, i: Tensor | None, norm: Any
) -> Tensor | None:
    """The same for one adapter."""
    terms = _terms(adapter, f, i, norm)
    if terms is None or (terms[2] and found.norm_before is not None):
        return None
    x, term, comes_before = terms
    residual: Tensor | tuple[Tensor, ...] = term
    after = None
    if adapter.original_ln_after:
        if i is None:
            return None
        # What is added twice over is x, which the op reads anyway.
        residual = x if comes_before and term is f else (term, i)
        after = norm
    return _op(x, found, residual, norm if comes_before else found.norm_before, after)


def _terms(
    adapter: Any, f: Tensor, i: Tensor | None, norm: nn.Module | None
) -> tuple[Tensor, Tensor, bool] | None:
    """The adapter's input, its residual, and whether the sublayer's norm comes before it."""
    early = adapter.residual_before_ln
    if type(adapter) is ParallelAdapter:
        return None if i is None else (i, f, False)
    if norm is None or not adapter.original_ln_before:
        if early not in (True, False):  # "post_add", to the norm's input
            return None
        x = f + i if adapter.original_ln_before and i is not None else f
        return x, f if early else x, False
    if i is None or not early:  # what the norm gives is the residual too
        return None
    x = f + i
    return x, f if early is True else x, True


def _alone(adapter: Any, found: Bottleneck, x: Tensor, residual: Tensor) -> Tensor:
    """What the adapter itself does: its update, its norm and its residual."""
    if type(adapter) is ParallelAdapter:  # the layer adds the residual
        return _op(x, found, None, found.norm_before, found.norm_after)
    inside = found.norm_after is None or adapter.adapter_residual_before_ln
    if not _is_alike(x, residual) or is_autocast(x):
        if found.norm_after is not None:
            return _with_up(adapter, found, x, residual, None)[0]
        inside = False
    y = _op(x, found, residual if inside else None, found.norm_before, found.norm_after)
    return y if inside else y + residual


def _with_up(
    adapter: Any, found: Bottleneck, x: Tensor, residual: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same, times a gate, and the update before dropout, gate, norm and residual."""
    y = up = _op(x, found._replace(dropout_p=0.0), None, found.norm_before, None)
    if found.dropout_p:
        y = adapter.dropout(y)
    if gate is not None:
        y = y * gate
    added = type(adapter) is not ParallelAdapter
    if found.norm_after is None:
        return (y + residual if added else y), up
    inside = added and adapter.adapter_residual_before_ln
    y = found.norm_after(y + residual if inside else y)
    return (y + residual if added and not inside else y), up


def _gate(adapter: Any, x: Tensor) -> Tensor | None:
    """``[B, 1, 1]``: what the update of each row is multiplied with."""
    if not adapter.use_gating:
        return None
    return torch.sigmoid(adapter.gate(x)).mean(1).unsqueeze(-1)


def _op(
    x: Tensor,
    found: Bottleneck,
    residual: Tensor | tuple[Tensor, ...] | None,
    before: Any,
    after: Any,
) -> Tensor:
    return adapter_op(
        x,
        found.down,
        found.down_bias,
        found.up,
        found.up_bias,
        activation=found.activation,
        scale=found.scale,
        residual=residual,
        dropout_p=found.dropout_p,
        **_arguments("pre_norm", before),
        **_arguments("norm", after),
    )


def _arguments(prefix: str, norm: Any) -> dict[str, Any]:
    """The op's arguments for a LayerNorm, or for none."""
    if norm is None:
        return {}
    parts = {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}
    return {f"{prefix}_{name}": value for name, value in parts.items()}


def _is_alike(x: Tensor, other: Tensor) -> bool:
    return x.shape == other.shape and x.dtype is other.dtype
