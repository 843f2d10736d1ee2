"""Chooses layers of a model by name, with Hugging Face PEFT's rules."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from peft_kernels.codes.layers import is_of_others
from peft_kernels.models.modules_to_save import check_task_type
from peft_kernels.modules.bases import is_conv1d
from peft_kernels.modules.names import plain_modules, unwrapped
from peft_kernels.modules.uncalled import uncalled_layers
from peft_kernels.nn.adapter_fusion import AdapterFusion
from peft_kernels.nn.bottleneck import BottleneckAdapter
from peft_kernels.nn.invertible import InvertibleAdapter
from peft_kernels.nn.p_tuning import PTuning
from peft_kernels.nn.prefix_tuning import PrefixTuning
from peft_kernels.nn.prompt_tuning import PromptTuning

ALL_LINEAR = "all-linear"
SEQUENCE_CLASSIFICATION_HEADS = ("score", "classifier")

# What this package puts into models: "all-linear" means the model's own layers.
_ADDED = (
    AdapterFusion,
    BottleneckAdapter,
    InvertibleAdapter,
    PrefixTuning,
    PromptTuning,
    PTuning,
)

Value = TypeVar("Value")


def find_targets(
    model: nn.Module,
    target_modules: str | Iterable[str],
    *,
    exclude_modules: str | Iterable[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    task_type: str | None = None,
) -> dict[str, nn.Module]:
    """The modules that :func:`swap_linear`'s arguments of the same names select, by name.

    The names are those of the model without wrappers (:mod:`peft_kernels.modules.names`).
    """
    if layers_pattern and layers_to_transform is None:
        raise ValueError("layers_pattern needs layers_to_transform, which is None")
    if isinstance(target_modules, str) and layers_to_transform is not None:
        raise ValueError("layers_to_transform needs target_modules to be a list, not a str")
    target_modules = checked_names("target_modules", target_modules)
    if exclude_modules is not None:
        exclude_modules = checked_names("exclude_modules", exclude_modules)
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        target_modules = _all_linear(model, task_type)
    indices = {layers_to_transform} if isinstance(layers_to_transform, int) else layers_to_transform
    return {
        name: module
        for name, module in plain_modules(model).items()
        if name
        and matches(name, target_modules)
        and not (exclude_modules and matches(name, exclude_modules, "exclude_modules"))
        and (not indices or _block_index(name, layers_pattern) in indices)
    }


def required_targets(
    model: nn.Module, target_modules: str | Iterable[str], **options: Any
) -> dict[str, nn.Module]:
    """:func:`find_targets`, or a ValueError where a pattern of ``target_modules`` selects none.

    A ``task_type`` among the options must be one of PEFT's.
    """
    check_task_type(options.get("task_type"))
    target_modules = checked_names("target_modules", target_modules)
    targets = find_targets(model, target_modules, **options)
    if targets and not unmatched(target_modules, targets):
        return targets
    narrowing = ("exclude_modules", "layers_to_transform", "layers_pattern")
    every = find_targets(model, target_modules, **options | dict.fromkeys(narrowing))
    left = unmatched(target_modules, targets)
    if lost := [one for one in left if one not in unmatched(target_modules, every)]:
        by = " and ".join(name for name in narrowing if options.get(name) is not None)
        raise ValueError(
            f"target_modules must select layers that {by} leaves; it leaves none of what {lost} "
            f"matches, of {len(every)} layers in all, e.g. {next(iter(every))}"
        )
    require_matches(target_modules, targets)
    return targets


def checked_names(argument: str, names: str | Iterable[str]) -> str | list[str]:
    """A str as it is, anything else as a list; a TypeError names what isn't one of names."""
    if isinstance(names, str):
        return names
    listed = list(names) if isinstance(names, Iterable) else [names]
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in listed):
        raise TypeError(f"{argument} must be a str, or a list of names; got {names!r}")
    return listed


def matches(name: str, patterns: str | Iterable[str], argument: str = "target_modules") -> bool:
    """Whether a regular expression (a str) or one of several endings selects module ``name``."""
    if isinstance(patterns, str):
        return re.fullmatch(checked_expression(argument, patterns), name) is not None
    return any(name == ending or name.endswith("." + ending) for ending in patterns)


def checked_expression(argument: str, expression: str) -> str:
    """``expression``, once it is a regular one; a TypeError or ValueError names the argument."""
    if not isinstance(expression, str):
        raise TypeError(f"{argument} must have a str for a regular expression; got {expression!r}")
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(
            f"{argument} must be a regular expression, as Python's re reads them; got "
            f"{expression!r}: {error}"
        ) from error
    return expression


def pattern_value(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value of the first key of a rank or alpha pattern that matches ``name``."""
    for key, value in patterns.items():
        checked_expression("a key of alpha_pattern or rank_pattern", key)
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _all_linear(model: nn.Module, task_type: str | None) -> list[str]:
    head, uncalled = _head(unwrapped(model), task_type), uncalled_layers(model)
    added = {
        part
        for module in model.modules()
        if isinstance(module, _ADDED)
        for part in module.modules()
    }
    linear = {
        name: module
        for name, module in plain_modules(model).items()
        if isinstance(module, nn.Linear) or is_conv1d(module) or is_of_others(module)
        if module is not head
        if module not in added
    }
    if idle := [name for name, module in linear.items() if module in uncalled]:
        warnings.warn(
            f"all-linear leaves out layers whose weight is read and which are never called, e.g. "
            f"{idle[0]} (by {type(uncalled[linear[idle[0]]].owner).__name__}); {len(idle)} in all",
            RuntimeWarning,
            stacklevel=5,
        )
    return [name for name, module in linear.items() if module not in uncalled]


def _head(model: nn.Module, task_type: str | None) -> nn.Module | None:
    """What "all-linear" leaves out: the output embeddings, or a sequence classification head."""
    find_output_embeddings = getattr(model, "get_output_embeddings", None)
    output_embeddings = find_output_embeddings() if find_output_embeddings else None
    if output_embeddings is not None or task_type != "SEQ_CLS":
        return output_embeddings
    heads = (getattr(model, name, None) for name in SEQUENCE_CLASSIFICATION_HEADS)
    return next((head for head in heads if head is not None), None)


def _block_index(name: str, layers_pattern: str | Sequence[str] | None) -> int | None:
    if isinstance(layers_pattern, str):
        layers_pattern = [layers_pattern]
    if layers_pattern:
        parts = [checked_expression("layers_pattern", part) for part in layers_pattern]
        expressions = [rf"(?:^|.*?\.)(?:{part})\.(\d+)\." for part in parts]
    else:
        expressions = [r".*?\.[^.]*\.(\d+)\."]
    found = (re.match(expression, name) for expression in expressions)
    first = next((match for match in found if match), None)
    return int(first.groups()[-1]) if first else None


def require_matches(target_modules: str | list[str], targets: Iterable[str]) -> None:
    """Raises a ValueError unless every pattern has selected something."""
    if (left := unmatched(target_modules, targets)) or not targets:
        raise ValueError(
            f"target_modules must select layers of the model; nothing matches {left} (a list "
            "holds names or endings of names, a str is a regular expression for the full name)"
        )


def unmatched(target_modules: str | list[str], targets: Iterable[str]) -> list[str]:
    """The patterns that have selected nothing."""
    if isinstance(target_modules, str):
        return [] if targets else [target_modules]
    return [end for end in target_modules if not any(matches(n, [end]) for n in targets)]
