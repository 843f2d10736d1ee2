"""PEFT's layer over HQQLinear."""

from peft.import_utils import is_hqq_available

LAYERS: list[type] = []
if is_hqq_available():
    from peft.tuners.lora.hqq import HqqLoraLinear

    LAYERS.append(HqqLoraLinear)
