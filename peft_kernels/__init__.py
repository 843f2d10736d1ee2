"""Fused kernels for parameter-efficient fine-tuning, as drop-in PyTorch modules."""

from peft_kernels import nn, ops
from peft_kernels._library import backend, backend_of, load_native
from peft_kernels._moved import keep_old_paths
from peft_kernels.formats.peft_lora import load_adapter, save_adapter
from peft_kernels.models.merging import disabled, merge, print_trainable_parameters, unload, unmerge
from peft_kernels.models.swap import swap_linear
from peft_kernels.pool import AdapterPool

__version__ = "0.1.0"
__all__ = [
    "AdapterPool",
    "backend",
    "backend_of",
    "disabled",
    "load_adapter",
    "merge",
    "nn",
    "ops",
    "print_trainable_parameters",
    "save_adapter",
    "swap_linear",
    "unload",
    "unmerge",
]

load_native()
keep_old_paths()
