"""The functional ops: one file each, from the maths to the public function."""

from peft_kernels.ops._lora_banks import BankDropout, LoRABank, Routing, Trained, route
from peft_kernels.ops.lora_linear import lora_linear
from peft_kernels.ops.multi_lora_linear import multi_lora_add_, multi_lora_linear

__all__ = [
    "BankDropout",
    "LoRABank",
    "Routing",
    "Trained",
    "lora_linear",
    "multi_lora_add_",
    "multi_lora_linear",
    "route",
]
