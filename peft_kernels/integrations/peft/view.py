"""A swapped model under the names that Hugging Face PEFT's own tools look for.

    optimizer = peft.optimizers.create_loraplus_optimizer(
        peft_view(model), torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16
    )

PEFT tells a matrix B by ``lora_B`` in its parameter's name, which here is ``lora_b``: given the
model itself, LoRA+ would train all B with A's learning rate.
"""

from __future__ import annotations

from torch import nn

from peft_kernels.modules.names import unwrapped
from peft_kernels.nn.lora import LoRALinear

_NAMES = {"lora_a": "lora_A", "lora_b": "lora_B", "lora_magnitude": "lora_magnitude_vector"}


def peft_view(model: nn.Module) -> nn.Module:
    """The model's parameters under PEFT's names, for what reads names: it can't be called.

    A LoRALinear has ``weight``, ``bias``, ``lora_A.weight``, ``lora_B.weight`` and, with DoRA,
    ``lora_magnitude_vector.weight``. The Parameters are the model's very own, and modules without a
    LoRALinear below them are its own too.

    Args:
        model: a model with LoRALinear layers, wrapped or not.

    Raises:
        ValueError: a model without.
    """
    model = unwrapped(model)
    if not _adapted(model):
        raise ValueError("model must have LoRALinear layers; swap_linear or load_adapter puts them")
    return _view(model)


def _adapted(module: nn.Module) -> bool:
    return any(isinstance(part, LoRALinear) for part in module.modules())


def _view(module: nn.Module) -> nn.Module:
    module = unwrapped(module)
    if not _adapted(module):
        return module
    view = nn.Module()
    for name, parameter in module._parameters.items():
        if isinstance(module, LoRALinear) and name in _NAMES and parameter is not None:
            matrix = nn.Module()
            matrix.register_parameter("weight", parameter)
            view.add_module(_NAMES[name], matrix)
        else:
            view.register_parameter(name, parameter)
    for name, child in module._modules.items():
        view.add_module(name, None if child is None else _view(child))
    return view.train(module.training)
