"""PEFT's layers over bitsandbytes' of 4 and 8 bits."""

from __future__ import annotations

from peft.import_utils import is_bnb_4bit_available, is_bnb_available

LAYERS: list[type] = []
if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit

    LAYERS.append(Linear4bit)
if is_bnb_available():
    from peft.tuners.lora.bnb import Linear8bitLt

    LAYERS.append(Linear8bitLt)
