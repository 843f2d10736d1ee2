"""What llama.cpp calls the tensors of a transformers model, and in which order their rows are.

llama.cpp turns the two halves of a head's rotated dimensions into pairs, for its Llama alone: of
each head's d rows of q and k, row ``2 i + j`` of a file is row ``j d / 2 + i`` of transformers'
(``LlamaModel.permute`` in its ``convert_hf_to_gguf.py``). Blocks lie along rows, which change
places as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# The architecture of a file by the model type of transformers.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_IN_PAIRS = "llama"


def imported() -> ModuleType:
    """The package that reads and writes such files.

    Raises:
        ImportError: it isn't installed.
    """
    try:
        import gguf  # here: importing the package doesn't need it
    except ImportError as error:
        raise ImportError("GGUF files need the package gguf: pip install gguf") from error
    return gguf


def config_of(model: Any) -> Any:
    """The config of a model that such a file can be of.

    Raises:
        TypeError: it is no model of transformers'.
        ValueError: it is of another family.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind is None:
        raise TypeError(f"model must be one of transformers'; got {type(model).__name__}")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"model must be of the type {known}; got {kind}")
    return config


def namer(config: Any) -> Callable[[str], str | None]:
    """What gives a module's name in a file, or None where a file has no such module."""
    gguf = imported()
    architecture = ARCHITECTURES[config.model_type]
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    # A model without a head has no "model." before its layers.
    return lambda path: names.get_name(path) or names.get_name(f"model.{path}")


def order_of(name: str, rows: int, config: Any) -> Tensor | None:
    """Where in a file's tensor ``name`` each of the model's rows is; None where it is in its place.

    Args:
        name: of the tensor, such as ``"blk.0.attn_q.weight"``.
        rows: how many it has.
    """
    if ARCHITECTURES[config.model_type] != _IN_PAIRS:
        return None
    part = name.split(".")[-2]
    if part not in ("attn_q", "attn_k"):
        return None
    heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()
