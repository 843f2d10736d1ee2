"""PEFT's layers over bitsandbytes' of 4 and 8 bits."""

from __future__ import annotations

import sys

from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from torch import nn

# Of a layer of bitsandbytes': whether evaluation may pack its codes in place, for a product in
# bfloat16, after which training has no gradient for x.
_PACKS = "support_avx512bf16_for_cpu"

LAYERS: list[type] = []
if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit

    LAYERS.append(Linear4bit)
if is_bnb_available():
    from peft.tuners.lora.bnb import Linear8bitLt

    LAYERS.append(Linear8bitLt)


def keep_codes(base: nn.Module) -> None:
    """Has evaluation of one of its layers leave the codes as they are, in PEFT's own calls too."""
    if _PACKS in base.__dict__:
        base.__dict__[_PACKS] = False


def give_back(base: nn.Module) -> None:
    """Lets it pack them again."""
    if _PACKS in base.__dict__:
        base.__dict__[_PACKS] = sys.modules["bitsandbytes"].functional.has_avx512bf16()
