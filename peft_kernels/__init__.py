"""Fused kernels for parameter-efficient fine-tuning, as drop-in PyTorch modules."""

from peft_kernels import nn, ops
from peft_kernels._library import backend, backend_of, load_native
from peft_kernels.checkpoint import load_adapter, save_adapter
from peft_kernels.merging import disabled, merge, print_trainable_parameters, unload, unmerge
from peft_kernels.pool import AdapterPool
from peft_kernels.swap import swap_linear

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
