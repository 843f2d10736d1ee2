"""Modules: state and shapes over the ops of :mod:`peft_kernels.ops`."""

from peft_kernels.nn.adapter_fusion import AdapterFusion
from peft_kernels.nn.bottleneck import BottleneckAdapter, stack_adapters
from peft_kernels.nn.invertible import InvertibleAdapter
from peft_kernels.nn.lora import LoRALinear
from peft_kernels.nn.multi_lora import MultiLoRALinear

__all__ = [
    "AdapterFusion",
    "BottleneckAdapter",
    "InvertibleAdapter",
    "LoRALinear",
    "MultiLoRALinear",
    "stack_adapters",
]
