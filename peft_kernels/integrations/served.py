"""What is alike in the layers of every library: whose calls are counted, and what a call runs."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from peft_kernels.calls.carried import is_carrying

CALLS = "_peft_kernels_calls"  # in a layer's __dict__: how many calls took which way
WHOLE = (nn.Parameter, Tensor)


def count(layer: nn.Module, way: str) -> None:
    """One more call of the layer that took this way."""
    if torch.compiler.is_compiling():  # a count is no constant of a graph
        is_carrying()  # a guard: what hooks hand to the layer goes by it, and hooks aren't guarded
        return
    counts = layer.__dict__.setdefault(CALLS, {})
    counts[way] = counts.get(way, 0) + 1


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module is the forward of its class, and nothing else."""
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def is_whole(weight: Any, dimensions: int) -> TypeGuard[Tensor]:
    """Whether this is all of a parameter: no shard, no tensor of another library's."""
    return type(weight) in WHOLE and weight.dim() == dimensions


def is_autocast(x: Tensor) -> bool:
    """Whether autocast decides in which dtype a product of x is."""
    return x.dtype is not torch.float64 and torch.is_autocast_enabled(x.device.type)


def what_is_called(module: nn.Module, kinds: tuple[type, ...]) -> str:
    """What would be called besides the forward of one of these classes."""
    if type(module) not in kinds:
        return type(module).__name__
    return "another forward" if "forward" in module.__dict__ else "hooks"
