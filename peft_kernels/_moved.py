"""Import paths of 0.1: each is the module that has its contents now, with a DeprecationWarning.

They go in 0.3.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

MOVED = {
    "peft_kernels.checkpoint": "peft_kernels.formats.peft_lora",
    "peft_kernels.merging": "peft_kernels.models.merging",
    "peft_kernels.swap": "peft_kernels.models.swap",
    "peft_kernels.integrations.adapters": "peft_kernels.formats.adapter_hub",
    "peft_kernels.integrations.peft_prompts": "peft_kernels.formats.peft_prompts",
    "peft_kernels.integrations.peft_view": "peft_kernels.integrations.peft",
    "peft_kernels.integrations.prefix": "peft_kernels.integrations.transformers",
    "peft_kernels.integrations.soft_prompts": "peft_kernels.integrations.transformers",
}


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what no file has any more. Importing gives the new module itself, not a copy."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        warnings.warn(
            f"{spec.name} is {new} now; the old path goes in 0.3", DeprecationWarning, stacklevel=2
        )
        module = importlib.import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import has put the old path's spec into the module.
        spec, module.__spec__ = module.__spec__, None
        assert spec is not None
        module.__spec__ = spec.loader_state


def keep_old_paths() -> None:
    """Has the import of an old path find the new module."""
    sys.meta_path.insert(0, _Moved())
