"""Modules: state and shapes over the ops of :mod:`peft_kernels.ops`."""

from peft_kernels.nn.lora import LoRALinear

__all__ = ["LoRALinear"]
