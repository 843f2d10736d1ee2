"""Layers that a module calls on one of its paths and only reads on another.

Mamba's mixers read the weight of ``dt_proj`` unless they were quantised, and in their fused kernels
those of ``x_proj`` and ``out_proj`` too; Bloom reads slices of ``dense`` with ``slow_but_exact``.
Which path is taken shows when the model runs, and is looked after there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from peft_kernels.calls.off import is_off
from peft_kernels.modules.uncalled import read_or_called

# The calls of its layer since the owner's forward began, by the guard's id: a list, to which a
# thread that runs the layer in a copy of the context appends too.
_CALLS: ContextVar[Mapping[int, list[None]]] = ContextVar("peft_kernels_calls_of_layers")


class MustBeCalled:
    """Hooks on a module and on a layer of it: a forward without a call of the layer is an error.

    A forward that torch.compile has traced isn't looked after.
    """

    def __init__(self, path: str, owner: nn.Module, layer: nn.Module) -> None:
        self.path, self.layer = path, layer
        self._handles = (
            owner.register_forward_pre_hook(self.begin),
            layer.register_forward_pre_hook(self.note),
            owner.register_forward_hook(self.end),
        )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, owner: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():  # which doesn't trace the setting of it
            _CALLS.set({**_CALLS.get({}), id(self): []})

    def note(self, layer: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            _CALLS.get({}).get(id(self), []).append(None)

    def end(self, owner: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or _CALLS.get({}).get(id(self)) != []:
            return
        if _is_base(self.layer):
            return
        raise RuntimeError(
            f"{self.path} must be called; {type(owner).__name__} read its weight in this forward, "
            "without its adapter: leave it out of the targets (exclude_modules)"
        )


def _is_base(layer: nn.Module) -> bool:
    """Whether the layer's weight is what it computes with now: merged, turned off, no route."""
    router = getattr(layer, "router", None)
    unrouted = router is not None and router.current() is None
    return unrouted or getattr(layer, "merged", False) or is_off(layer)


def look_after(root: nn.Module, layers: Collection[nn.Module], paths: dict[nn.Module, str]) -> None:
    """From now on a forward that reads one of these layers in place of calling it raises."""
    for owner in root.modules():
        for name in read_or_called(owner):
            if (layer := owner._modules.get(name)) is not None and layer in layers:
                MustBeCalled(paths[layer], owner, layer)


def look_no_longer_after(model: nn.Module, layers: Collection[nn.Module]) -> None:
    """Undoes :func:`look_after` for these layers."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            guard = getattr(hook, "__self__", None)
            if isinstance(guard, MustBeCalled) and guard.layer in layers:
                guard.remove()
