"""PEFT's layers over gptqmodel's, in the layouts of GPTQ and of AWQ."""

from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear

LAYERS: list[type] = [GPTQLoraLinear, AwqLoraLinear]
