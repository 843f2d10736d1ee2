"""The functional ops: one file each, from the maths to the public function."""

from peft_kernels.ops.lora_linear import lora_linear

__all__ = ["lora_linear"]
