"""Reads and writes LoRA adapters in Hugging Face PEFT's folder format.

``adapter_config.json`` is PEFT's LoraConfig as JSON; ``adapter_model.safetensors`` holds, for each
layer, ``base_model.model.<name>.lora_A.weight`` [r, k] and ``….lora_B.weight`` [n, r]. A
module that was trained beside them is there whole, ``base_model.model.<name>.weight``, and named in
the config's ``modules_to_save``.
"""

from peft_kernels.formats.peft_lora.contents import (
    Adapter,
    check_adapter,
    read_adapter,
    scale_of,
    targets_of,
)
from peft_kernels.formats.peft_lora.load import load_adapter
from peft_kernels.formats.peft_lora.save import AdaptedLayer, save_adapter, write_adapter

__all__ = [
    "AdaptedLayer",
    "Adapter",
    "check_adapter",
    "load_adapter",
    "read_adapter",
    "save_adapter",
    "scale_of",
    "targets_of",
    "write_adapter",
]
