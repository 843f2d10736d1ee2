"""PEFT's layer over nn.Linear with a weight of torchao's."""

from peft.import_utils import is_torchao_available

LAYERS: list[type] = []
if is_torchao_available():
    from peft.tuners.lora.torchao import TorchaoLoraLinear

    LAYERS.append(TorchaoLoraLinear)
