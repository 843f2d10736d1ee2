"""What a model of transformers' says of its quantisation, once layers of it are dense."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_kernels.codes.layers import is_in_codes
from peft_kernels.modules.names import plain_modules

_MARKS = ("hf_quantizer", "quantization_method")
_FLAGS = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


def tell_dense(model: nn.Module) -> None:
    """Has the model's config say which layers aren't in codes, and where none is, nothing of them.

    What is saved would else be read as codes.
    """
    for host in plain_modules(model).values():
        config: Any = getattr(host, "config", None)
        settings = getattr(config, "quantization_config", None)
        if settings is None or not any(mark in vars(host) for mark in _MARKS):
            continue
        parts = plain_modules(host)
        if not any(map(is_in_codes, parts.values())):
            _forget(host, config)
        elif hasattr(settings, "llm_int8_skip_modules"):
            settings.llm_int8_skip_modules = [
                name for name, part in parts.items() if type(part) is nn.Linear
            ]


def _forget(host: nn.Module, config: Any) -> None:
    for name in ("quantization_config", "_pre_quantization_dtype"):
        vars(config).pop(name, None)
    for name in _MARKS:
        vars(host).pop(name, None)
    for name in _FLAGS:
        if name in vars(host):
            setattr(host, name, False)
