"""Prefixes under gradient checkpointing: a layer that runs again in the backward finds its own.

Transformers' layers call ``_gradient_checkpointing_func``; :class:`CarryingCheckpoint` stands in
front of it and takes what the running forward carries into the checkpointed function.

Reentrant checkpointing differentiates each layer's second run by itself, so a prefix that all
layers share through one graph (an MLP's output) would have that graph walked once a layer. The
layers are given leaves instead, in whose ``grad`` their gradients collect, and the hidden states
pass through :class:`_Deliver` before the first layer: its backward, which runs after that of every
layer, hands the collected gradients to the one graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peft_kernels.calls.carried import Frames, carried, carrying
from peft_kernels.calls.off import CarriesOff
from peft_kernels.integrations.transformers.attention.prefixed import (
    Prefixes,
    Recording,
    State,
    current_state,
    using,
)

_FUNCTION = "_gradient_checkpointing_func"


class CarryingCheckpoint(CarriesOff):
    """A checkpointing function that takes along all that the running forward carries.

    What is recorded isn't checkpointed: what reentrant checkpointing keeps has no graph.
    """

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        state = current_state()
        if isinstance(state, Recording):
            return function(*args, **kwargs)
        if isinstance(state, Prefixes) and torch.is_grad_enabled() and self.is_reentrant():
            state, args = _with_leaves(state, args)
        return self.checkpoint(partial(_resume, carried(), state, function), *args, **kwargs)

    def is_reentrant(self) -> bool:
        return bool(self.keywords.get("use_reentrant", True))


def carry(module: nn.Module) -> None:
    """Puts a :class:`CarryingCheckpoint` before the module's function, if it has one."""
    function = module.__dict__.get(_FUNCTION)
    if function is not None and not isinstance(function, CarryingCheckpoint):
        module.__dict__[_FUNCTION] = CarryingCheckpoint(function)


def stop_carrying(module: nn.Module) -> None:
    """Undoes :func:`carry`."""
    function = module.__dict__.get(_FUNCTION)
    if isinstance(function, CarryingCheckpoint):
        module.__dict__[_FUNCTION] = function.checkpoint


def _resume(frames: Frames, state: State | None, function: Callable, *args: Any) -> Any:
    with carrying(frames), using(state):
        return function(*args)


def _with_leaves(state: Prefixes, args: tuple) -> tuple[Prefixes, tuple]:
    """The prefixes as leaves; the first layer's hidden states deliver the leaves' gradients."""
    if state.leaves is not None:
        return state.leaves, args
    shared = [x for pair in state.pairs.values() for x in pair]
    if not any(x.requires_grad for x in shared):
        return state, args
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in shared]
    pairs = zip(leaves[::2], leaves[1::2], strict=True)
    of_module = dict(zip(state.pairs, pairs, strict=True))
    state.leaves = Prefixes(of_module, state.ids, state.need_weights, lengths=state.lengths)
    return state.leaves, (_Deliver.apply(args[0], leaves, *shared), *args[1:])


class _Deliver(torch.autograd.Function):
    """Identity of the hidden states; ``shared[i]`` gets the gradient collected in ``leaves[i]``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, leaves: list[Tensor], *shared: Tensor) -> Tensor:
        ctx.leaves = leaves
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        collected = [leaf.grad for leaf in ctx.leaves]
        for leaf in ctx.leaves:
            leaf.grad = None
        return (grad if ctx.needs_input_grad[0] else None, None, *collected)
