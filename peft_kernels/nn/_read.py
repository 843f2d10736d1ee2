"""Linear layers whose weight and bias a module of ours reads and which it never calls."""

from __future__ import annotations

import torch
from torch import nn

from peft_kernels.modules.replaced import fault_of_hooks


def check_read(owner: nn.Module, *names: str) -> None:
    """Sees to it that what the owner reads of its parts is all that they compute with.

    Raises:
        TypeError: a part isn't an nn.Linear any more, as under PEFT's layers, or a hook makes its
            weight of other parameters at each call (torch.nn.utils' pruning and norms; what
            torch.nn.utils.parametrize makes is read).
    """
    if torch.compiler.is_compiling():
        return
    for name in names:
        layer = owner._modules.get(name)
        if layer is None:
            continue
        where = f"{name} of {type(owner).__name__}"
        if type(layer).forward is not nn.Linear.forward:
            raise TypeError(
                f"{where} must be an nn.Linear, for its weight is read and it is never called; got "
                f"{type(layer).__module__}.{type(layer).__qualname__}: leave it out of the other "
                "method's targets"
            )
        if layer._forward_pre_hooks and (fault := fault_of_hooks(layer)):
            raise TypeError(f"{where} {fault}: its weight is read, and it is never called")
