"""Adapters, prefixes and prompts in models: any module by its path, and `transformers`' families.

One module a method, with what several need beside them; ``attention`` is what attention layers
call, ``runs`` what a forward does with a prefix or a prompt. `transformers` itself is imported with
the first name of prefixes or prompts that is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peft_kernels.integrations.transformers import adapters
from peft_kernels.integrations.transformers.adapter_rows import bank_adapters, route_adapters
from peft_kernels.integrations.transformers.adapters import (
    AdaptedOutput,
    adapters_of,
    fuse_adapters,
    insert_adapter,
    insert_adapters,
    remove_adapters,
)

if TYPE_CHECKING:
    from peft_kernels.integrations.transformers.prefix import (
        add_prefix,
        init_from_text,
        prefix_for,
        prefix_ids,
        prefix_shapes,
        remove_prefix,
        text_values,
    )
    from peft_kernels.integrations.transformers.soft_prompts import (
        add_prompt,
        remove_prompt,
        task_ids,
    )

__all__ = [
    "AdaptedOutput",
    "adapters_of",
    "add_prefix",
    "add_prompt",
    "bank_adapters",
    "fuse_adapters",
    "init_from_text",
    "insert_adapter",
    "insert_adapters",
    "prefix_for",
    "prefix_ids",
    "prefix_shapes",
    "remove_adapters",
    "remove_prefix",
    "remove_prompt",
    "route_adapters",
    "task_ids",
    "text_values",
]

_PROMPTS = ("add_prompt", "remove_prompt", "task_ids")
# What a whole model that 0.1 saved names here: its hooks, and how to make its classes.
_SAVED = (
    "_adapt", "_adapt_in_parallel", "_adapted_kind", "_keep_input", "_new_adapted",
    "_pass_on_input",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _SAVED:
        return getattr(adapters, name)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "soft_prompts" if name in _PROMPTS else "prefix"
    return getattr(importlib.import_module(f"{__name__}.{room}"), name)
