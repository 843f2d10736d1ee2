"""Linear layers whose weight a module reads without calling them: what takes their place is idle.

A module says which of its parts it reads so, by a class attribute:

    class FusedMLP(nn.Module):
        uncalled_linears = ("up", "down")  # paths below the module; () if it calls them all

Of a class without it the source of ``forward``, and of the methods that it uses, is read: a part
that appears there as ``self.part.weight`` and nowhere in the class as itself is never called.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

from torch import nn

DECLARED = "uncalled_linears"
# torch's own, which can't say so. Its encoders' fast paths are another matter: _fast_paths.
_OF_TORCH: dict[type[nn.Module], tuple[str, ...]] = {nn.MultiheadAttention: ("out_proj",)}
# Of a weight, these tell nothing that an adapter changes.
_HARMLESS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "is_meta", "requires_grad"}


class Uncalled(NamedTuple):
    """Who reads a layer, and how that is known."""

    owner: nn.Module
    declared: bool

    @property
    def fault(self) -> str:
        kind = type(self.owner).__name__
        reason = (
            f"must be a layer that is called; {kind} reads its weight and never calls it, so leave "
            "it out of the targets"
        )
        unsure = f" (that is what its source says; if others call it, {kind}.{DECLARED} = () first)"
        return reason if self.declared else reason + unsure


def uncalled_layers(model: nn.Module) -> dict[nn.Module, Uncalled]:
    """The layers below ``model`` that are read and never called."""
    found: dict[nn.Module, Uncalled] = {}
    for owner in model.modules():
        declared, kind = _declared(owner), _kind(owner)
        if declared is None and not any(map(_is_linear, owner._modules.values())):
            continue
        for path in _read_only(kind) if declared is None else declared:
            layer = _below(owner, path)
            if layer is not None and _is_linear(layer):
                found[layer] = Uncalled(owner, declared is not None)
    return found


def read_or_called(owner: nn.Module) -> tuple[str, ...]:
    """The parts of a module whose weight its source reads, and which it may call as well."""
    if _declared(owner) is not None or not any(map(_is_linear, owner._modules.values())):
        return ()
    return _read(_kind(owner))


def _kind(module: nn.Module) -> Any:
    return type(module)


def _is_linear(module: object) -> bool:
    """Whether this is an nn.Linear or, for one, ``transformers``' Conv1D."""
    kinds = type(module).__mro__
    return isinstance(module, nn.Linear) or any(kind.__name__ == "Conv1D" for kind in kinds)


def _declared(owner: nn.Module) -> tuple[str, ...] | None:
    kinds = (kind for kind in _OF_TORCH if isinstance(owner, kind))
    of_torch = next((_OF_TORCH[kind] for kind in kinds), None)
    if "forward" in vars(owner):
        return of_torch or getattr(owner, DECLARED, ())  # its class's source isn't what runs
    return getattr(owner, DECLARED, of_torch)


def _below(owner: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = owner
    for part in path.split("."):
        module = None if module is None else module._modules.get(part)
    return module


# ---- a class's source --------------------------------------------------------------------------


@cache
def _read_only(kind: Any) -> tuple[str, ...]:
    """The parts of modules of this class that its forward reads the weights of, and no more."""
    parts = _parts(kind)
    used = {name for uses in parts.values() if uses for name in uses.named}
    reached = [parts[name] for name in _reached(parts, "forward")]
    if any(uses is None or uses.opaque for uses in reached):
        return ()
    if any(uses is not None and uses.opaque for uses in parts.values()):
        return ()
    return tuple(part for part in _read(kind) if part not in used)


@cache
def _read(kind: Any) -> tuple[str, ...]:
    """The parts that forward, or a method that it uses, reads the weights of."""
    parts = _parts(kind)
    reached = (parts[name] for name in _reached(parts, "forward"))
    return tuple(dict.fromkeys(part for uses in reached if uses for part in uses.read))


@cache
def _parts(kind: Any) -> dict[str, _Uses | None]:
    return {name: _uses(function) for name, function in _methods(kind).items()}


class _Uses(NamedTuple):
    """What one method does with the attributes of ``self``."""

    read: list[str]  # self.<part>.weight
    named: list[str]  # self.<name>, in any other way
    opaque: bool  # getattr(self, ...)


def _methods(kind: type) -> dict[str, Callable]:
    """By name, those that instances have: of the class, and of those above it short of Module."""
    own = [cls for cls in kind.__mro__ if issubclass(cls, nn.Module) and cls is not nn.Module]
    found: dict[str, Callable] = {}
    for cls in own:
        for name, value in vars(cls).items():
            value = value.fget if isinstance(value, property) else value
            if inspect.isfunction(value) and name not in found:
                found[name] = inspect.unwrap(value)
    return found


def _reached(parts: dict[str, _Uses | None], start: str) -> Iterator[str]:
    """A method and those that it, and they, name."""
    waiting, seen = [start], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in parts:
            continue
        seen.add(name)
        yield name
        uses = parts[name]
        waiting += uses.named if uses else []


def _uses(function: Callable) -> _Uses | None:
    """None where the source isn't there."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    uses = _Uses([], [], _looks_up(tree))
    _walk(tree, None, uses)
    return uses


def _looks_up(tree: ast.AST) -> bool:
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(
        isinstance(call.func, ast.Name)
        and call.func.id in ("getattr", "vars")
        and call.args
        and _is_self(call.args[0])
        for call in calls
    )


def _walk(node: ast.AST, above: ast.AST | None, uses: _Uses) -> None:
    part = _part_of_self(node)
    if part is not None and isinstance(node.ctx, ast.Load):  # type: ignore[attr-defined]
        uses.named.append(part)
        return
    of = _part_of_self(node.value) if isinstance(node, ast.Attribute) else None
    if of is not None:
        told = above.attr if isinstance(above, ast.Attribute) else None
        if node.attr == "weight" and isinstance(node.ctx, ast.Load) and told not in _HARMLESS:  # type: ignore[attr-defined]
            uses.read.append(of)
        elif node.attr not in _OF_LINEAR:  # type: ignore[attr-defined]
            uses.named.append(of)
        return
    for child in ast.iter_child_nodes(node):
        _walk(child, node, uses)


# What is asked of a linear layer without calling it.
_OF_LINEAR = {"weight", "bias", "in_features", "out_features"}


def _part_of_self(node: ast.AST) -> str | None:
    return node.attr if isinstance(node, ast.Attribute) and _is_self(node.value) else None


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"
