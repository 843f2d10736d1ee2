"""torch's inference fast path of encoders, which reads weights and calls no layer."""

from __future__ import annotations

from torch import nn

from peft_kernels.nn.lora import LoRALinear
from peft_kernels.nn.multi_lora import MultiLoRALinear

_SWITCHES: dict[type[nn.Module], tuple[str, object]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
_BEFORE = "_peft_kernels_fast_path"  # what a module's switch was before it was turned off


def choose_fast_paths(model: nn.Module) -> None:
    """Has torch's encoders call their layers where an adapter is among these, and only there.

    To be called when adapters came or went. What a switch was before is kept on its module.
    """
    for module in model.modules():
        for kind, (switch, off) in _SWITCHES.items():
            if isinstance(module, kind):
                _choose(module, switch, off)


def has_adapters(model: nn.Module) -> bool:
    """Whether there are LoRA layers, a pool's or bottleneck adapters in it."""
    return any(
        isinstance(part, (LoRALinear, MultiLoRALinear)) or "adapter" in part._modules
        for part in model.modules()
    )


def _choose(module: nn.Module, switch: str, off: object) -> None:
    adapted = has_adapters(module)
    if adapted and _BEFORE not in vars(module):
        vars(module)[_BEFORE] = getattr(module, switch)
        setattr(module, switch, off)
    elif not adapted and _BEFORE in vars(module):
        setattr(module, switch, vars(module).pop(_BEFORE))
