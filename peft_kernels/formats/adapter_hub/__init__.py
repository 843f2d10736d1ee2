"""adapter-hub's folders: bottleneck and invertible adapters, fusions and heads of `adapters`."""

from peft_kernels.formats.adapter_hub.folder import (
    load_adapter,
    load_fusion,
    remove_adapter,
    save_adapter,
    save_fusion,
)

__all__ = ["load_adapter", "load_fusion", "remove_adapter", "save_adapter", "save_fusion"]
