"""What a layer has beside its weights, handed to its successor, and handed back."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

# What a subclass may define anew: none of it is asked for while a model runs or is saved.
_HARMLESS = {
    "__annotate__",
    "__annotate_func__",
    "__annotations__",
    "__annotations_cache__",
    "__constants__",
    "__doc__",
    "__firstlineno__",
    "__init__",
    "__module__",
    "__qualname__",
    "__repr__",
    "__slotnames__",
    "__static_attributes__",
    "extra_repr",
    "reset_parameters",
}
_INTERNALS = frozenset(vars(nn.Module()))
# How pruning, weight_norm and spectral_norm of hooks call what they compute a tensor from.
_SOURCES = ("_orig", "_g")
_HOOKS = tuple(sorted(name for name in _INTERNALS if "_hooks" in name))
_TABLES = ("_parameters", "_buffers", "_modules")
# What every linear layer has, and its successor has from it.
_SHARED = frozenset({"weight", "bias", "in_features", "out_features"})


def fault_of_replacement(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a module can't be replaced by one that knows of its being a ``kind`` alone, or None."""
    if fault := fault_of_instance(module):
        return fault
    if overridden := _overrides(type(module), kind):
        return (
            f"must leave the methods of {kind.__name__} as they are; {type(module).__name__} has "
            f"a {overridden[0]} of its own, which would be lost: leave such a layer out"
        )
    return None


def fault_of_instance(module: nn.Module) -> str | None:
    """Why what a module does isn't what its class says, or None."""
    if parametrize.is_parametrized(module):
        return (
            "must have no parametrizations, for they would be lost: "
            "torch.nn.utils.parametrize.remove_parametrizations() first"
        )
    if fault := fault_of_hooks(module):
        return fault
    if vars(module).get("_compiled_call_impl") is not None:
        return "must not be compiled by itself: compile() the model afterwards"
    for name in _attributes(module):
        if name not in _HARMLESS and callable(getattr(type(module), name, None)):
            return (
                f"must use its class's own {name}; it was given another one, which would be lost: "
                "undo that (accelerate.hooks.remove_hook_from_module, if accelerate did it)"
            )
    return None


_OF_A_HOOK = (
    "that a hook computes before each forward: torch.nn.utils.prune.remove(layer, {name!r}), "
    "remove_weight_norm() or remove_spectral_norm() first, whichever it is"
)


def hooked_tensors(module: nn.Module) -> list[str]:
    """The tensors that a hook computes from others before each forward, as pruning does.

    What is written to one is lost at the next forward, and what is read is the last forward's.
    """
    stems = (name.removesuffix(end) for name in module._parameters for end in _SOURCES)
    return [name for name in dict.fromkeys(stems) if isinstance(vars(module).get(name), Tensor)]


def fault_of_hooks(module: nn.Module) -> str | None:
    """Why a module whose tensors are read or replaced can't have its hooks, or None."""
    names = hooked_tensors(module)
    return f"must have no {names[0]} {_OF_A_HOOK.format(name=names[0])}" if names else None


def check_stored(module: nn.Module, *, own: Iterable[str] = (), other: Iterable[str] = ()) -> None:
    """Raises a RuntimeError where a tensor isn't stored as it is, but computed from others.

    Args:
        module: the one that has them.
        own: tensors that must be Parameters: neither a hook's nor parametrized.
        other: tensors that may be parametrized, for that is computed when it is read.
    """
    own, hooked = tuple(own), hooked_tensors(module)
    for name in (*own, *other):
        if name in hooked:
            raise RuntimeError(f"the layer has a {name} {_OF_A_HOOK.format(name=name)}")
    for name in own:
        if parametrize.is_parametrized(module, name):
            raise RuntimeError(
                f"the layer has a {name} that is parametrized: "
                f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r}) first"
            )


def check_all_stored(module: nn.Module) -> None:
    """:func:`check_stored` for all that a module has: what is written to it anew stays there."""
    for path, part in module.named_modules():
        names = hooked_tensors(part) + list(getattr(part, "parametrizations", ()))
        try:
            check_stored(part, own=names)
        except RuntimeError as error:
            raise RuntimeError(f"{path or type(module).__name__}: {error}") from None


def has_given_forward(module: nn.Module) -> bool:
    """Whether the module was given a forward in place of its class's."""
    return "forward" in _attributes(module)


def _overrides(kind: type, base: type) -> list[str]:
    above = kind.__mro__[: kind.__mro__.index(base)] if base in kind.__mro__ else ()
    return [
        name for cls in above for name in vars(cls) if name not in _HARMLESS and hasattr(base, name)
    ]


def take_over(old: nn.Module, new: nn.Module) -> Origin:
    """Hands hooks, further buffers, parameters, children and attributes of ``old`` to ``new``.

    The tables of hooks become common to both, so that handles of hooks still remove them.

    Raises:
        TypeError: ``old`` has something by a name that ``new`` needs. Nothing is changed.
    """
    own = _names(new)
    for name in sorted(_names(old) - _SHARED):
        if name in own or (hasattr(type(new), name) and not hasattr(type(old), name)):
            raise TypeError(
                f"linear must have nothing called {name!r}: {type(new).__name__} has its own"
            )
    origin = Origin(old, own | _SHARED | {"_origin"})
    _hand_on(old, new, keep=_SHARED)
    return origin


class Origin:
    """The layer whose place another took: that very object while anyone holds it, or its like.

    It isn't kept alive here, since its Parameters would be, through sharding and all.
    """

    def __init__(self, layer: nn.Module, own: frozenset[str]) -> None:
        self.kind = type(layer)
        self.attributes = _attributes(layer)
        self.own = own  # names that the new layer has for itself
        self._layer: weakref.ref[nn.Module] | None = weakref.ref(layer)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_layer": None}  # of a copy it isn't the origin

    def restore(self, new: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
        """The layer again, with these Parameters and with all that ``new`` was handed."""
        layer = None if self._layer is None else self._layer()
        if layer is None:
            layer = self._like()
        if layer._parameters is new._parameters:  # nn._gathered.share_parameters
            kept = {n: p for n, p in new._parameters.items() if n in _SHARED or n not in self.own}
            layer._parameters = kept
        layer._parameters |= {"weight": weight, "bias": bias}
        _hand_on(new, layer, keep=self.own)
        return layer.train(new.training)

    def stand_in(
        self, new: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None
    ) -> nn.Module:
        """Another such layer over these Parameters and what ``new`` was handed, without hooks."""
        layer = self._like()
        layer._parameters |= {"weight": weight, "bias": bias}
        _hand_on_values(new, layer, keep=self.own)
        return layer

    def _like(self) -> nn.Module:
        layer = self.kind.__new__(self.kind)
        nn.Module.__init__(layer)
        vars(layer).update(self.attributes)
        return layer


def _attributes(module: nn.Module) -> dict[str, Any]:
    attributes = {name: value for name, value in vars(module).items() if name not in _INTERNALS}
    # Hooks of accelerate's that were taken off again leave the class's own forward behind, bound.
    own: Any = type(module).forward
    if "forward" in attributes and attributes["forward"] == own.__get__(module):
        del attributes["forward"]
    return attributes


def _names(module: nn.Module) -> frozenset[str]:
    tables = [getattr(module, table) for table in _TABLES]
    return frozenset(_attributes(module)).union(*tables)


def _hand_on(source: nn.Module, target: nn.Module, keep: frozenset[str]) -> None:
    """Everything of ``source`` but what is called as in ``keep``."""
    _hand_on_values(source, target, keep)
    hand_on_hooks(source, target)


def _hand_on_values(source: nn.Module, target: nn.Module, keep: frozenset[str]) -> None:
    for table in _TABLES:
        entries = getattr(source, table).items()
        getattr(target, table).update({k: v for k, v in entries if k not in keep})
    target._non_persistent_buffers_set |= source._non_persistent_buffers_set - keep
    vars(target).update({k: v for k, v in _attributes(source).items() if k not in keep})


def hand_on_hooks(source: nn.Module, target: nn.Module) -> None:
    """Makes the hooks of ``source`` those of both, called with ``target``."""
    for name in _HOOKS:
        vars(target)[name] = vars(source)[name]
    target._is_full_backward_hook = source._is_full_backward_hook
    wrapped: Iterable[Any] = target._load_state_dict_pre_hooks.values()
    for hook in wrapped:
        if getattr(hook, "with_module", False):
            hook.module = weakref.ref(target)


def has_hooks(module: nn.Module) -> bool:
    """Whether anything listens to a call of the module or to its gradients."""
    return any(vars(module)[name] for name in _HOOKS if "state_dict" not in name)
