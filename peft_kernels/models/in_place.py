"""Layers that must stay where they were put: what else replaces them takes their adapters along."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from peft_kernels.models.read_or_called import look_after, look_no_longer_after
from peft_kernels.modules.names import plain_modules, unwrapped


class Place(NamedTuple):
    path: str
    parent: nn.Module
    name: str
    layer: nn.Module

    def is_kept(self) -> bool:
        """Whether the layer, or a copy of it, is where it was put, or inside of what is there."""
        now = self.parent._modules.get(self.name)
        if now is self.layer:
            return True
        return now is not None and any(isinstance(m, type(self.layer)) for m in now.modules())


class InPlace:
    """A model's forward pre-hook, which raises if a layer has gone.

    ``prune_heads`` makes new projections of plain nn.Linear, ``resize_token_embeddings`` of a model
    around the one that was swapped a new output layer: without this the model would go on without
    those adapters. A forward that torch.compile has traced isn't looked after.
    """

    def __init__(self) -> None:
        self.places: list[Place] = []

    def __call__(self, model: nn.Module, args: Any = ()) -> None:
        if torch.compiler.is_compiling():  # which can't have modules known by another way
            return
        for place in self.places:
            if not place.is_kept():
                kind, now = type(place.layer), type(place.parent._modules.get(place.name))
                raise RuntimeError(
                    f"{place.path} was a {kind.__name__} with its adapter, and is now "
                    f"{now.__name__} without: something replaced it, as resize_token_embeddings() "
                    "and prune_heads() do. Do that before swap_linear, load_adapter or "
                    "AdapterPool.attach, or after unload() or detach(). If this adapter is to be "
                    "given up: peft_kernels.models.swap.give_up_replaced(model)"
                )

    def gone(self) -> list[Place]:
        return [place for place in self.places if not place.is_kept()]


def keep_in_place(model: nn.Module, layers: Collection[nn.Module]) -> None:
    """From now on a forward of the model raises if one of these layers below it was replaced.

    Or if it was read where it is otherwise called (:mod:`peft_kernels.models.read_or_called`).
    """
    root = unwrapped(model)
    guard = next(_guards(root), None)
    if guard is None:
        guard = InPlace()
        root.register_forward_pre_hook(guard)
    kept = set(layers)
    paths = {module: path for path, module in plain_modules(root).items()}
    guard.places += [
        Place(paths[child], parent, name, child)
        for parent in root.modules()
        for name, child in parent._modules.items()
        if child is not None and child in kept
    ]
    look_after(root, kept, paths)


def let_go(model: nn.Module, layers: Collection[nn.Module]) -> None:
    """Undoes :func:`keep_in_place` for these layers, wherever in the model it was done."""
    gone = set(layers)
    look_no_longer_after(model, gone)
    for module in model.modules():
        for key, guard in list(module._forward_pre_hooks.items()):
            if isinstance(guard, InPlace):
                guard.places = [place for place in guard.places if place.layer not in gone]
                if not guard.places:
                    del module._forward_pre_hooks[key]


def check_in_place(model: nn.Module) -> None:
    """Raises a RuntimeError if a layer of the model was replaced since :func:`keep_in_place`."""
    for module in model.modules():
        for guard in _guards(module):
            guard(module)


def replaced_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that were put into the model and replaced by something else since."""
    guards = (guard for module in model.modules() for guard in _guards(module))
    return [place.layer for guard in guards for place in guard.gone()]


def _guards(module: nn.Module) -> Iterator[InPlace]:
    return (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, InPlace))
