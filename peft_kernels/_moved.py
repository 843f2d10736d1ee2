"""Import paths of 0.1: each is the module that has its contents now, with a DeprecationWarning.

They go in 0.3. The private ones are named in files that ``torch.save`` wrote of whole models.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

_HOST = "peft_kernels.integrations.transformers"
MOVED = {
    "peft_kernels.checkpoint": "peft_kernels.formats.peft_lora",
    "peft_kernels.merging": "peft_kernels.models.merging",
    "peft_kernels.swap": "peft_kernels.models.swap",
    "peft_kernels.integrations.adapters": "peft_kernels.formats.adapter_hub",
    "peft_kernels.integrations.peft_prompts": "peft_kernels.formats.peft_prompts",
    "peft_kernels.integrations.peft_view": "peft_kernels.integrations.peft",
    "peft_kernels.integrations.prefix": _HOST,
    "peft_kernels.integrations.soft_prompts": _HOST,
    "peft_kernels.tools.case": "peft_kernels.tools.bench.case",
    "peft_kernels.tools.errors": "peft_kernels.tools.bench.errors",
    "peft_kernels.tools.implementation": "peft_kernels.tools.bench.implementation",
    "peft_kernels.tools.measure": "peft_kernels.tools.bench.measure",
    "peft_kernels.tools.peak": "peft_kernels.tools.bench.peak",
    "peft_kernels.tools.suites": "peft_kernels.tools.bench.suites",
    # private, in saved models
    "peft_kernels._calls": "peft_kernels.calls.carried",
    "peft_kernels._fast_paths": "peft_kernels.models.fast_paths",
    "peft_kernels._freezing": "peft_kernels.models.freezing",
    "peft_kernels._in_place": "peft_kernels.models.in_place",
    "peft_kernels._input_grads": "peft_kernels.models.input_grads",
    "peft_kernels._late_parameters": "peft_kernels.modules.late_parameters",
    "peft_kernels._modules_to_save": "peft_kernels.models.modules_to_save",
    "peft_kernels._names": "peft_kernels.modules.names",
    "peft_kernels._pages": "peft_kernels.pool.pages",
    "peft_kernels._read_or_called": "peft_kernels.models.read_or_called",
    "peft_kernels._resizing": "peft_kernels.models.resizing",
    "peft_kernels._router": "peft_kernels.calls.router",
    "peft_kernels._rows": "peft_kernels.calls.rows",
    "peft_kernels._store": "peft_kernels.pool.store",
    "peft_kernels._streams": "peft_kernels.pool.streams",
    "peft_kernels._versions": "peft_kernels.pool.versions",
    "peft_kernels.integrations._adapters_heads": "peft_kernels.formats.adapter_hub.heads",
    "peft_kernels.integrations._adapters_places": "peft_kernels.formats.adapter_hub.places",
    "peft_kernels.integrations._attention": f"{_HOST}.attention.prefixed",
    "peft_kernels.integrations._blocks": f"{_HOST}.blocks",
    "peft_kernels.integrations._checkpointing": f"{_HOST}.attention.checkpointing",
    "peft_kernels.integrations._guard": f"{_HOST}.attention.guard",
    "peft_kernels.integrations._hooks": f"{_HOST}.row_ids",
    "peft_kernels.integrations._own_attention": f"{_HOST}.attention.own_attention",
    "peft_kernels.integrations._own_encoders": f"{_HOST}.attention.own_encoders",
    "peft_kernels.integrations._pinned": f"{_HOST}.attention.pinned",
    "peft_kernels.integrations._prefix_places": f"{_HOST}.places",
    "peft_kernels.integrations._prefix_run": f"{_HOST}.runs.prefix",
    "peft_kernels.integrations._prompt_prefix": f"{_HOST}.runs.in_front",
    "peft_kernels.integrations._prompt_rows": f"{_HOST}.runs.in_rows",
    "peft_kernels.integrations._prompt_run": f"{_HOST}.runs.prompt",
    "peft_kernels.nn._bases": "peft_kernels.modules.bases",
    "peft_kernels.nn._checks": "peft_kernels.modules.checks",
    "peft_kernels.nn._off": "peft_kernels.calls.off",
    "peft_kernels.nn._replaced": "peft_kernels.modules.replaced",
    "peft_kernels.nn._uncalled": "peft_kernels.modules.uncalled",
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
