"""What is trained beside LoRA layers: PEFT's ``modules_to_save``, chosen, written and read.

A module that is saved whole has its tensors under its plain name, ``base_model.model.<name>.<key>``
in the file, and an ending of its name in the config. PEFT takes every module whose name ends so,
and for some tasks the heads that it knows, named in the config or not.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.modules.bases import check_memory
from peft_kernels.modules.names import plain_modules, plain_parameters, unwrapped
from peft_kernels.nn._sharded import placed_as
from peft_kernels.nn.lora import LoRALinear

TASK_TYPES = (
    "CAUSAL_LM",
    "FEATURE_EXTRACTION",
    "QUESTION_ANS",
    "SEQ_2_SEQ_LM",
    "SEQ_CLS",
    "TOKEN_CLS",
)
# The modules that PEFT trains and saves whole for such a task.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_SETTINGS = "_adapter_settings"
_ALTERNATIVE = "model.state_dict() holds it too"
_UNTIE = "untie the two (tie_word_embeddings=False, and a copy of the Parameter) before loading"


# ---- what a model remembers ------------------------------------------------------------------


def settings_of(model: nn.Module) -> dict[str, Any]:
    """What was asked for when its layers were swapped in or loaded, to be written with them."""
    return unwrapped(model).__dict__.get(_SETTINGS, {})


def remember(model: nn.Module, **settings: Any) -> None:
    """Keeps those that aren't None for :func:`settings_of`; they go with copies of the model."""
    given = {key: value for key, value in settings.items() if value is not None}
    unwrapped(model).__dict__[_SETTINGS] = settings_of(model) | given


def forget(model: nn.Module) -> None:
    """Drops what was remembered, when the layers it was about are gone."""
    unwrapped(model).__dict__.pop(_SETTINGS, None)


def batches_seen(model: nn.Module) -> dict[str, int]:
    """How many batches each module with running statistics has seen, by name."""
    counts = {}
    for name, module in plain_modules(model).items():
        seen = module._buffers.get("num_batches_tracked")
        if seen is not None and not seen.is_meta:
            counts[name] = int(seen)
    return counts


# ---- choosing --------------------------------------------------------------------------------


def check_task_type(task_type: str | None) -> None:
    """Raises a ValueError unless this is None or one of PEFT's task types."""
    if task_type is not None and task_type not in TASK_TYPES:
        raise ValueError(f"task_type must be of {', '.join(TASK_TYPES)}; got {task_type!r}")


def writable_task_type(
    model: nn.Module, task_type: str | None, *, with_heads: bool = True, stacklevel: int = 4
) -> str | None:
    """The task type to write; None, with a warning, where PEFT couldn't load the heads it means.

    ``with_heads`` says whether the folder holds them, as PEFT's does.
    """
    check_task_type(task_type)
    modules = plain_modules(model)
    heads = _ending(modules, HEADS.get(task_type or "", ()))
    unreadable = [name for name in heads if not with_heads or _has_adapters(modules[name])]
    if not unreadable:
        return task_type
    here = "here it has adapters" if with_heads else "a pool's folder holds its layers alone"
    warnings.warn(
        f"task_type is written as None: for {task_type} PEFT saves {unreadable[0]} whole, and "
        f"{here}",
        UserWarning,
        stacklevel=stacklevel,
    )
    return None


def modules_to_save_of(
    model: nn.Module, asked: Iterable[str], task_type: str | None
) -> tuple[list[str], dict[str, Tensor]]:
    """What the config names, and the tensors by their names in an unwrapped model.

    Written are the modules that ``asked`` names by their endings, those of a folder that was
    loaded, the heads of the task, and every module outside of LoRA layers that trains now, or whose
    running statistics have changed.

    Raises:
        ValueError: what trains has no place in the format; the message names it.
    """
    modules = plain_modules(model)
    for ending in asked:
        if not _ending(modules, [ending]):
            raise ValueError(f"modules_to_save must be modules of the model; it has no {ending!r}")
    own = {name for name, module in modules.items() if is_ours(module)}
    trained = _trained(model, modules, own)
    known = (*settings_of(model).get("modules", ()), *HEADS.get(task_type or "", ()))
    names = list(dict.fromkeys([*asked, *(end for end in known if _ending(modules, [end]))]))
    covered = _ending(modules, names)
    units = {_highest(modules, name) for name in trained if not _is_below(name, covered)}
    units -= {name for name in units if _is_below(name, units - {name})}
    names = list(dict.fromkeys([*names, *sorted(units)]))
    chosen = _ending(modules, names)
    for name in chosen:
        if _has_adapters(modules[name]):
            raise ValueError(
                f"{name} would be saved whole, for its name ends in one of {names}, and it has "
                f"adapters: freeze what has that name, or leave the adapters out; {_ALTERNATIVE}"
            )
        if _is_below(name, [other for other in chosen if other != name]):
            raise ValueError(
                f"{name} would be saved twice, for it is below another module whose name ends in "
                f"one of {names}: unfreeze, or name, one of the two"
            )
    return names, {
        f"{name}.{key}": tensor for name in chosen for key, tensor in tensors_of(modules[name])
    }


def _ending(modules: Iterable[str], endings: Iterable[str]) -> list[str]:
    """The modules that PEFT takes for these names."""
    endings = tuple(endings)
    return [name for name in modules if name and name.endswith(endings)]


def _is_below(name: str, others: Iterable[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in others)


def _has_adapters(module: nn.Module) -> bool:
    return any(isinstance(part, LoRALinear) for part in module.modules())


def is_ours(module: nn.Module) -> bool:
    """Whether it is one of the package's own modules."""
    return type(module).__module__.startswith("peft_kernels.nn.")


def _trained(model: nn.Module, modules: Mapping[str, nn.Module], own: Iterable[str]) -> list[str]:
    """The modules that have parameters or statistics of their own that were trained."""
    before, now = settings_of(model).get("batches", {}), batches_seen(model)
    found, left_out = [], []
    for name, module in modules.items():
        parameters = {key: p for key, p in module._parameters.items() if p is not None}
        trains = [key for key, p in parameters.items() if p.requires_grad]
        if isinstance(module, LoRALinear):
            _check_base_is_frozen(name, trains)
        elif trains and _is_below(name, own):
            left_out.append(name)
        elif trains and (not name or _has_adapters(module)):
            raise ValueError(
                f"{f'{name}.' if name else ''}{trains[0]} trains, and PEFT's format holds whole "
                f"modules alone: this one has adapters below it. Freeze it; {_ALTERNATIVE}"
            )
        elif trains or now.get(name, 0) != before.get(name, 0):
            found.append(name)
    if left_out:
        warnings.warn(
            f"what trains for another method isn't in the folder: {', '.join(left_out)}; "
            "peft_kernels.integrations has the functions that write it",
            UserWarning,
            stacklevel=5,
        )
    return found


def warn_of_left_out(model: nn.Module, written: Iterable[str]) -> None:
    """Says what trains in a model that is frozen else, and isn't in a folder.

    Args:
        model: unwrapped.
        written: names of parameters that are in it; those of our own modules are known to be.
    """
    parameters, known = plain_parameters(model), set(written)
    own = [name for name, module in plain_modules(model).items() if is_ours(module)]
    if all(p.requires_grad for p in parameters.values()):
        return
    trains = [name for name, p in parameters.items() if p.requires_grad and name not in known]
    if left := [name for name in trains if not _is_below(name, own)]:
        warnings.warn(
            f"what trains beside isn't in the folder: {', '.join(left[:5])}"
            f"{' and others' if left[5:] else ''}; {_ALTERNATIVE}",
            UserWarning,
            stacklevel=3,
        )


def _check_base_is_frozen(name: str, trains: Iterable[str]) -> None:
    for key in trains:
        if key not in ("lora_a", "lora_b", "lora_magnitude"):
            raise ValueError(
                f"{name}.{key} trains, and PEFT's format has no place for the base of a LoRA "
                f"layer: freeze it; {_ALTERNATIVE}"
            )


def _highest(modules: Mapping[str, nn.Module], name: str) -> str:
    """The outermost module around ``name`` all of which trains."""
    while (above := name.rpartition(".")[0]) in modules:
        module = modules[above]
        frozen = [p for p in module.parameters() if not p.requires_grad]
        if not above or frozen or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            break
        name = above
    return name


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module's state dict by their names without wrappers, tied ones twice."""
    for name, part in plain_modules(module).items():
        transient = part._non_persistent_buffers_set
        buffers = {k: b for k, b in part._buffers.items() if k not in transient}
        for key, tensor in (part._parameters | buffers).items():
            if tensor is not None:
                yield (f"{name}.{key}" if name else key), tensor


# ---- reading ---------------------------------------------------------------------------------


def plain_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of modules by name; some of PEFT's versions and settings write wrappers' names too.

    ``x.modules_to_save.weight`` is x's weight, ``x.original_module.weight`` its former one.
    """
    plain, wrapped = {}, {}
    for key, tensor in tensors.items():
        if ".original_module." in key:
            continue
        if ".modules_to_save." in key:
            inside = key.replace(".modules_to_save.default.", ".modules_to_save.")
            wrapped[inside.replace(".modules_to_save.", ".")] = tensor
        else:
            plain[key] = tensor
    return wrapped | plain


def targets_in(
    model: nn.Module, tensors: Mapping[str, Tensor], endings: Iterable[str]
) -> dict[str, Tensor]:
    """What the tensors are to be copied into, by name, once all of them fit an unwrapped model.

    Args:
        model: the model.
        tensors: those of a folder that aren't LoRA's, by name.
        endings: the config's ``modules_to_save``.

    Raises:
        ValueError: the model lacks one, or has it in another shape, or tied to what the folder
            lacks or has other values for; or the folder lacks one of a module that the config
            names.
        TypeError: a dtype that doesn't fit.
    """
    modules = plain_modules(model)
    held = dict(tensors_of(model))
    targets: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        # The base of a layer with an adapter, which PEFT writes with embeddings that it saves.
        target = held.get(key.replace(".base_layer.", "."))
        if target is None:
            raise ValueError(
                f"the file has {key}, which isn't in the model: {type(model).__name__}"
            )
        _check_one(key, tensor, target)
        _check_alike(key, tensors, target, targets)
        targets[key] = target
    if (endings := list(endings)) and not _ending(modules, endings):
        raise ValueError(f"modules_to_save must be in the model, one at least; got {endings}")
    for name in _ending(modules, endings):
        for key, target in tensors_of(modules[name]):
            if f"{name}.{key}" not in tensors:
                raise ValueError(f"the file must have {name}.{key}, as its config says; it hasn't")
            _check_not_tied(f"{name}.{key}", target, held, tensors)
    return targets


def _check_one(key: str, tensor: Tensor, target: Tensor) -> None:
    if tensor.shape != target.shape:
        raise ValueError(
            f"{key} must be {list(target.shape)}, as in the model; got {list(tensor.shape)} (give "
            "the model as many labels, or resize_token_embeddings(), as it had when it was saved)"
        )
    if tensor.is_floating_point() != target.is_floating_point():
        raise TypeError(f"{key} must be of the kind of {target.dtype}; got {tensor.dtype}")
    check_memory(target, key)


def _check_not_tied(
    key: str, target: Tensor, held: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    tied = [n for n, t in held.items() if t is target and n != key and n not in tensors]
    if tied:
        raise ValueError(
            f"{key} is tied to {tied[0]} in the model, and was trained apart from it: {_UNTIE}"
        )


def _check_alike(
    key: str, tensors: Mapping[str, Tensor], target: Tensor, others: Mapping[str, Tensor]
) -> None:
    """Raises a ValueError where a tensor of the model would get two values."""
    for other, place in others.items():
        if place is target and not torch.equal(tensors[key], tensors[other]):
            raise ValueError(
                f"{key} is tied to {other} in the model, and the file has other values for each: "
                f"{_UNTIE}"
            )


@torch.no_grad()
def fill(
    model: nn.Module,
    targets: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    endings: Iterable[str],
) -> None:
    """Copies the tensors into ``targets``; the modules that the config names are left to train."""
    for key, target in targets.items():
        target.copy_(placed_as(target, tensors[key]))
    modules = plain_modules(model)
    for name in _ending(modules, endings):
        modules[name].requires_grad_(True)
