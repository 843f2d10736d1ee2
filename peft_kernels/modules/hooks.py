"""Hooks: by which a model has a soft prompt, taking them out, what compiled code knows of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection

import torch
from torch import nn

# Attributes of the model that has a prefix or a prompt: the hook that set it up.
PREFIX_HOOK = "_prefix_hook_of"
PROMPT_HOOK = "_prompt_hook_of"


def remove_hooks(module: nn.Module, functions: Collection[Callable]) -> None:
    """Takes these functions out of a module's hooks."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if hook in functions:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def forget_compiled() -> None:
    """Has torch.compile look at all modules anew.

    It doesn't guard their hooks: code that was compiled before would run on without those that
    came since, and with those that went.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
