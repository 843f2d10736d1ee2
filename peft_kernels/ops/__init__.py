"""The functional ops: one file each, from the maths to the public function."""

from peft_kernels.ops._lora_banks import BankDropout, LoRABank, Routing, Trained, route
from peft_kernels.ops._lora_factors import LoRAFactors
from peft_kernels.ops._quantize import quantize
from peft_kernels.ops._quantized import NestedScales, QuantizedWeight, dequantize
from peft_kernels.ops.adapter import adapter
from peft_kernels.ops.adapter_fusion import Absorbed, absorb, adapter_fusion
from peft_kernels.ops.dora_linear import dora_linear, dora_norm, dora_squares
from peft_kernels.ops.lora_linear import lora_linear
from peft_kernels.ops.multi_lora_linear import multi_lora_add_, multi_lora_linear
from peft_kernels.ops.prefix_attention import prefix_attention
from peft_kernels.ops.prompt_lookup import PromptedInputs, prompt_lookup

__all__ = [
    "Absorbed",
    "BankDropout",
    "LoRABank",
    "LoRAFactors",
    "NestedScales",
    "PromptedInputs",
    "QuantizedWeight",
    "Routing",
    "Trained",
    "absorb",
    "adapter",
    "adapter_fusion",
    "dequantize",
    "dora_linear",
    "dora_norm",
    "dora_squares",
    "lora_linear",
    "multi_lora_add_",
    "multi_lora_linear",
    "prefix_attention",
    "prompt_lookup",
    "quantize",
    "route",
]
