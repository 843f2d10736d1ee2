"""GGUF, the files of llama.cpp: models whose weights stay in their blocks, and LoRA adapters.

``load`` puts a file's tensors into a model of transformers', ``lora`` writes an adapter; ``names``
knows what either calls the other's tensors, and in which order llama.cpp has their rows.
"""

from peft_kernels.formats.gguf.load import load_gguf
from peft_kernels.formats.gguf.lora import save_lora_gguf

__all__ = ["load_gguf", "save_lora_gguf"]
