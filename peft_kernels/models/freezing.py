"""Freezing a model for a method, and saying what it takes from others."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Iterable

from torch import nn

from peft_kernels.models.modules_to_save import HEADS, is_ours
from peft_kernels.modules.names import plain_modules, unwrapped

_KNOWN = {name for names in HEADS.values() for name in names}
_SHOWN = 3  # how many names a warning holds


def freeze(
    model: nn.Module,
    keep: Iterable[nn.Parameter] = (),
    *,
    silently: Iterable[nn.Parameter] = (),
    train_head: bool | None = None,
) -> None:
    """Has nothing else of the model train than what it is told to keep as it is.

    A RuntimeWarning names what somebody may want to train and is frozen with the rest: a new head,
    which would stay at random, and another method's parameters.

    Args:
        model: any, wrapped or not.
        keep: parameters that are left as they are.
        silently: parameters that are frozen and not spoken of.
        train_head: whether the heads that PEFT knows (``classifier``, ``score``, ``qa_outputs``) go
            on if they train. False says that no head is to: none is spoken of. None: they don't.
    """
    heads, kept, unspoken = _heads(unwrapped(model)), set(keep), set(silently)
    if train_head:
        kept |= {p for name in _KNOWN & heads.keys() for p in heads[name].parameters()}
    elif train_head is False:
        unspoken |= {p for head in heads.values() for p in head.parameters()}
    rest = [parameter for parameter in model.parameters() if parameter not in kept]
    stopping = {parameter for parameter in rest if parameter.requires_grad}
    found = _owners(model, heads, stopping - unspoken)
    for parameter in rest:
        parameter.requires_grad_(False)
    if found:
        _say(found, [name for name in found if name in heads])


def _heads(model: nn.Module) -> dict[str, nn.Module]:
    """The children that are heads of a task: by PEFT's names, or outside of a model's base.

    What the output embeddings are in isn't one, which no pretrained model starts anew.
    """
    children = {
        name: child
        for name, child in model._modules.items()
        if child is not None and not is_ours(child)
    }
    base = getattr(model, "base_model_prefix", None)
    find = getattr(model, "get_output_embeddings", None)
    embeddings = find() if base in children and find else None
    return {
        name: child
        for name, child in children.items()
        if name in _KNOWN
        or (base in children and name != base and embeddings not in set(child.modules()))
    }


def _owners(
    model: nn.Module, heads: Iterable[str], parameters: Collection[nn.Parameter]
) -> list[str]:
    """The heads, and the outermost of our modules, that hold any of these parameters, by name."""
    found: dict[str, None] = {}
    owners = [f"{name}." for name in heads]
    for name, module in plain_modules(model).items():  # parents come first
        inside = next((owner for owner in owners if f"{name}.".startswith(owner)), None)
        if inside is None and is_ours(module):
            inside = f"{name}."
            owners.append(inside)
        if inside is not None and any(p in parameters for p in module._parameters.values()):
            found[inside.removesuffix(".")] = None
    return list(found)


def _say(found: list[str], heads: list[str]) -> None:
    shown = ", ".join([*heads, *(name for name in found if name not in heads)][:_SHOWN])
    more = f" and {len(found) - _SHOWN} others" if found[_SHOWN:] else ""
    what = f"the head {shown}" if found == heads[:1] else f"{shown}{more}"
    verb = "are" if found[1:] else "is"
    then = " (insert_adapters: train_head=True)" if heads else ""
    warnings.warn(
        f"{what} {verb} frozen with the rest of the model, and trained so far: "
        "requires_grad_(True) there afterwards lets it train, as a new head must, and as a "
        f"second method may{then}; "
        "where it isn't to train, freeze it before the call, and nothing is said",
        RuntimeWarning,
        stacklevel=_outside(),
    )


def _outside() -> int:
    """The ``stacklevel``, of the caller, that shows the line outside of the package."""
    level, frame = 1, sys._getframe(1)
    while (above := frame.f_back) is not None:
        if not frame.f_globals.get("__name__", "").startswith("peft_kernels"):
            break
        level, frame = level + 1, above
    return level
