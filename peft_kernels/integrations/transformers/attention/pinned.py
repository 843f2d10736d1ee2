"""The attention implementation that a model with a prefix reads, whatever its configs are told.

Transformers' attention modules and masks look up ``config._attn_implementation`` at each forward.
A prefixed model's modules get views of their configs: a view has all that its config has, and what
is written to either is in both, but the view's implementation is :data:`NAME`. So other
models of the same config keep theirs, ``set_attn_implementation`` and writes to the config don't
turn the prefix off, and what was asked for last is in force when the prefix is taken out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from torch import nn

NAME = "peft_kernels_prefix"
_IMPLEMENTATION = "_attn_implementation"
IS_CAUSAL = "_peft_kernels_is_causal"  # of a decoder's attention that says of itself it isn't


class _View:
    """What the classes of views have in common; ``_viewed`` is the config."""

    __slots__ = ("_viewed", "_when")
    _viewed: Any
    _when: Callable[[], bool] | None
    _name: str  # of the class

    def __setattr__(self, name: str, value: Any) -> None:
        # A model built from a view would write what it read there to the config.
        if not (name == f"{_IMPLEMENTATION}_internal" and value == self._name):
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple:
        return view_of, (self._viewed, self._when, self._name)

    def __copy__(self) -> Any:
        return copy.copy(self._viewed)


def pin(
    model: nn.Module, readers: Iterable[nn.Module], when: Callable[[], bool] | None = None
) -> None:
    """Has all of the model's modules that hold one of the readers' configs hold a view of it.

    Args:
        when: whether the view's implementation is :data:`NAME` right now, and not its config's;
            always by default. A function of a module, for pickle.
    """
    views: dict[int, Any] = {}
    for reader in readers:
        config = reader.__dict__.get("config")
        if hasattr(type(config), _IMPLEMENTATION) and not isinstance(config, _View):
            views[id(config)] = view_of(config, when)
    for module in model.modules():
        view = views.get(id(module.__dict__.get("config")))
        if view is not None:
            module.__dict__["config"] = view


def unpin(model: nn.Module) -> None:
    """Gives the modules their configs back."""
    for module in model.modules():
        module.__dict__.pop(IS_CAUSAL, None)
        config = module.__dict__.get("config")
        if isinstance(config, _View):
            module.__dict__["config"] = config._viewed


def asked_implementation(module: nn.Module) -> str | None:
    """What the module's config was told, which would be in force without the view."""
    config = module.__dict__.get("config")
    config = config._viewed if isinstance(config, _View) else config
    return getattr(config, _IMPLEMENTATION, None)


def view_of(config: Any, when: Callable[[], bool] | None = None, name: str = NAME) -> Any:
    """A view of a config, whose implementation has this name while ``when()``, or always."""
    view: Any = object.__new__(_class_of(config.__class__, when, name))
    object.__setattr__(view, "__dict__", config.__dict__)
    object.__setattr__(view, "_viewed", config)
    object.__setattr__(view, "_when", when)
    return view


_view_of = view_of  # as models name it that were saved by 0.1


@cache
def _class_of(kind: Any, when: Callable[[], bool] | None, name: str) -> Any:
    """The class of views of a config's class. Auto classes know a config by its class' name."""
    own = kind._attn_implementation

    def read(view: Any) -> Any:
        return name if when is None or when() else own.fget(view)

    implementation = property(read, own.fset)
    names = {"__slots__": (), "__module__": kind.__module__, "_name": name}
    return type(kind.__name__, (_View, kind), {**names, _IMPLEMENTATION: implementation})
