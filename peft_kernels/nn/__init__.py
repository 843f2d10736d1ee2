"""Modules: state and shapes over the ops of :mod:`peft_kernels.ops`."""

from peft_kernels.nn.lora import LoRALinear
from peft_kernels.nn.multi_lora import MultiLoRALinear

__all__ = ["LoRALinear", "MultiLoRALinear"]
