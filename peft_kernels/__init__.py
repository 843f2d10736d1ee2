"""Fused kernels for parameter-efficient fine-tuning, as drop-in PyTorch modules.

    swap_linear, save_adapter, load_adapter     LoRA in a model, and PEFT's folders
    merge, unmerge, unload, disabled            done to a whole model afterwards
    accelerate, restore                         the same kernels under the layers of a PEFT model
    quantize_linear                             linear layers into codes
    load_gguf, save_lora_gguf                   models and adapters of llama.cpp's
    AdapterPool                                 many LoRA adapters, each row with its own
    nn, ops                                     the layers, and the functions under them
    integrations.transformers                   adapters, fusions, prefixes and prompts in models
    formats.adapter_hub, formats.peft_prompts   the folders of those
    backend, backend_of                         forces a backend; names what would run

``peft-kernels doctor`` says what runs here.
"""

from peft_kernels import nn, ops
from peft_kernels._library import backend, backend_of, load_native
from peft_kernels._moved import keep_old_paths
from peft_kernels.formats.gguf import load_gguf, save_lora_gguf
from peft_kernels.formats.peft_lora import load_adapter, save_adapter
from peft_kernels.integrations.accelerated import accelerate, restore
from peft_kernels.models.merging import disabled, merge, print_trainable_parameters, unload, unmerge
from peft_kernels.models.quantizing import quantize_linear
from peft_kernels.models.swap import swap_linear
from peft_kernels.pool import AdapterPool

__version__ = "0.1.0"
__all__ = [
    "AdapterPool",
    "accelerate",
    "backend",
    "backend_of",
    "disabled",
    "load_adapter",
    "load_gguf",
    "merge",
    "nn",
    "ops",
    "print_trainable_parameters",
    "quantize_linear",
    "restore",
    "save_adapter",
    "save_lora_gguf",
    "swap_linear",
    "unload",
    "unmerge",
]

load_native()
keep_old_paths()
