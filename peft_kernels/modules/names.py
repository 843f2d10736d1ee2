"""Models inside wrappers, and the names that their modules have without them.

A wrapper is a module that runs another in its place and has it as a child: it is known by its
class, never by the child's name, which a plain module may have too. Every reader, writer and
matcher of names goes through here, so that a model has the same names however it is wrapped.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from peft_kernels.modules.bases import names_of
from peft_kernels.modules.checks import check_module
from peft_kernels.modules.late_parameters import RefusesLateParameters

_DDP = "torch.nn.parallel.distributed.DistributedDataParallel"
_FSDP = "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"
_DEEPSPEED = "deepspeed.runtime.engine.DeepSpeedEngine"
# The child that a class of wrappers runs, by the class's full name: none has to be imported.
_WRAPPED = {
    _DDP: "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    _FSDP: "_fsdp_wrapped_module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": (
        "_checkpoint_wrapped_module"
    ),
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    _DEEPSPEED: "module",
    "lightning.fabric.wrappers._FabricModule": "_forward_module",
}


def wrapped_child(module: nn.Module) -> str | None:
    """The name of the child that a wrapper runs in its place; None for any other module."""
    for kind in names_of(type(module)):
        child = _WRAPPED.get(kind)
        if child is not None and module._modules.get(child) is not None:
            return child
    return None


def unwrapped(model: nn.Module) -> Any:
    """The model inside of all the wrappers around it, whatever they are and in any order."""
    while (child := wrapped_child(model)) is not None:
        model = model._modules[child]  # type: ignore[assignment]
    return model


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether its parameters are whole in a call of it alone: fully_shard's, or FSDP's wrapper."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    kinds = () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    return isinstance(module, kinds)


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model but wrappers, by name, in the order of ``named_modules``.

    A module that the model has several times is there once, under its first name; the model itself
    is ``""``.
    """
    check_module("model", model)
    return {name: module for name, module in _inside(model, "", set())}


def _inside(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    module = unwrapped(module)
    if module in seen:
        return
    seen.add(module)
    yield name, module
    for key, below in module._modules.items():
        if below is not None:
            yield from _inside(below, f"{name}.{key}" if name else key, seen)


def plain_name(model: nn.Module, name: str) -> str:
    """What a module, parameter or buffer called ``name`` in ``model`` is called without wrappers.

    ``name`` may lack the part of any of them, as it does in the state dict of some.
    """
    plain: list[str] = []
    parts, module = name.split("."), model
    while parts:
        if (child := wrapped_child(module)) is not None:
            module = module._modules[child]  # type: ignore[assignment]
            parts = parts[1:] if parts[0] == child else parts
            continue
        below = module._modules.get(parts[0])
        if below is None:
            break
        plain.append(parts.pop(0))
        module = below
    return ".".join(plain + parts)


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by their names without wrappers."""
    return {plain_name(model, name): parameter for name, parameter in model.named_parameters()}


@contextmanager
def gathered(model: nn.Module, *, writes: bool = False) -> Iterator[None]:
    """Has modules inside of FullyShardedDataParallel whole parameters, in every process.

    Args:
        model: any, wrapped or not; without FSDP nothing is done.
        writes: whether what is written to them inside goes to the shards.
    """
    check_module("model", model)
    if any(_FSDP in names_of(type(module)) for module in model.modules()):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(model, writeback=writes):
            yield
    else:
        yield


def check_late_parameters(model: nn.Module, action: str) -> None:
    """Says what new parameters inside of wrappers that spread a model over processes don't get.

    To be called before they come; from then on DistributedDataParallel refuses to train them.

    Raises:
        ValueError: the wrapper has parameters in memory of its own, and new ones aren't in it.
    """
    kinds = {kind for module in model.modules() for kind in names_of(type(module))}
    if kinds & {_FSDP, _DEEPSPEED}:
        raise ValueError(
            "model must not be wrapped yet by what spreads its parameters over processes, for new "
            f"ones would be left out: {action} first, then wrap the model"
        )
    if _DDP in kinds:
        for module in model.modules():
            if _DDP in names_of(type(module)):
                RefusesLateParameters.watch(module)
        warnings.warn(
            "model is wrapped in DistributedDataParallel, which doesn't know parameters that come "
            "later: their gradients aren't averaged over processes, and a step that would train "
            f"them raises. To train, {action} first, then wrap the model",
            RuntimeWarning,
            stacklevel=3,
        )


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of this name or path, never a wrapper; AttributeError if there is none."""
    module: Any = unwrapped(model)
    for part in filter(None, plain_name(model, name).split(".")):
        if module._modules.get(part) is None:
            raise AttributeError(f"{type(module).__name__} has no module {part!r} ({name})")
        module = unwrapped(module._modules[part])
    return module


def replace_child(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Makes ``module`` the child ``name`` of ``parent``, which may be a wrapper.

    torch.compile's keeps the call of the module that it was made around, so it is made anew.
    """
    if name == "_orig_mod" and wrapped_child(parent) == name:
        compiled: Any = parent
        hooks = {key: value for key, value in vars(compiled).items() if "_hooks" in key}
        compiled.__init__(module, compiled.dynamo_ctx)
        vars(compiled).update(hooks)
    else:
        setattr(parent, name, module)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts ``module`` where the one of this name or path is, inside of wrappers around it."""
    above, _, child = plain_name(model, name).rpartition(".")
    parent = submodule(model, above)
    while (inside := wrapped_child(parent._modules[child])) is not None:  # type: ignore[arg-type]
        parent, child = parent._modules[child], inside  # type: ignore[assignment]
    replace_child(parent, child, module)
