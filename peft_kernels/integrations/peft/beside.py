"""What PEFT has in a model beside the layers of this package, which no folder of theirs holds."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from peft_kernels.modules.bases import full_name, is_of_package
from peft_kernels.modules.names import plain_modules

# The children of PEFT's layers that are the model's own.
_BASES = ("base_layer", "original_module")


def check_without_peft(model: nn.Module, layers: Iterable[str]) -> None:
    """Raises a ValueError if PEFT has parameters in an unwrapped model, or is around ``layers``.

    Either way a folder that holds the adapters of ``layers`` alone computes something else.
    """
    names = list(layers)
    found = {
        name: module
        for name, module in plain_modules(model).items()
        if is_of_package(module, ("peft",))
        and (_has_parameters(module) or any(_is_inside(layer, name) for layer in names))
    }
    if found:
        name = max(found, key=lambda name: name.count(".") + bool(name))
        raise ValueError(
            f"{name or 'model'} is PEFT's ({full_name(found[name])}), and a folder with the "
            "adapters of this package's layers would leave it out; PEFT's save_pretrained() would "
            "leave out these. Put one of the two into the weights, or drop it, and save the other: "
            "merge_and_unload() or unload() of the PeftModel, and give what that returns "
            "(delete_adapter() of a model of transformers' with add_adapter()); or "
            "peft_kernels.unload(model, merge=True), and save that model beside PEFT's adapter"
        )


def _has_parameters(module: nn.Module) -> bool:
    """Whether it has some that aren't the model's own."""
    children = [child for key, child in module._modules.items() if key not in _BASES]
    own = [
        child for child in children if child is not None and any(True for _ in child.parameters())
    ]
    return bool(own) or any(parameter is not None for parameter in module._parameters.values())


def _is_inside(layer: str, name: str) -> bool:
    return not name or layer == name or layer.startswith(f"{name}.")
