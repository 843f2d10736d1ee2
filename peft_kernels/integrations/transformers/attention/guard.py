"""Errors where a forward would leave a prefix out without a word.

An attention module that ran and didn't ask for its prefix was given another forward, class or
attention function by somebody; one that isn't where it was can't be asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from peft_kernels.integrations.transformers.attention.prefixed import current_state

_NAME = "_prefix_path"


def watch(module: nn.Module, path: str) -> None:
    """Has each forward of an attention module checked; :data:`HOOKS` are what to take out."""
    module.__dict__[_NAME] = path
    module.register_forward_hook(_check_asked)


def unwatch(module: nn.Module) -> None:
    """Takes the path out that :func:`watch` noted."""
    module.__dict__.pop(_NAME, None)


def _check_asked(module: Any, args: tuple, output: Any) -> None:
    state = current_state()
    if state is not None and not state.was_asked(module):
        raise RuntimeError(
            f"attention at {module.__dict__[_NAME]} ran without the prefix: its forward or its "
            "attention function was replaced after the prefix was added. Take the prefix out, make "
            "the change, and add the prefix again"
        )


def check_in_place(stack: nn.Module, modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises where attention modules, by their paths in a stack, aren't in it any more."""
    for path, module in modules:
        found: Any = stack
        for part in path.split("."):
            found = None if found is None else found._modules.get(part)
        if found is not module and all(found is not module for found in stack.modules()):
            raise RuntimeError(
                f"attention at {path} isn't the module that was given the prefix: the model was "
                "copied for this forward, as nn.DataParallel does, or its layers were replaced. "
                "Use DistributedDataParallel, or add the prefix after the change"
            )


HOOKS = (_check_asked,)
