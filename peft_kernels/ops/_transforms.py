"""Calls that an op's kernels can't serve, and what serves them.

Kernels know an op's value and its first gradient. Inside torch.func's transforms (``grad``,
``vmap``, ``jvp`` and what is made of them), under forward-mode AD, and for gradients of gradients,
an op is computed by its composition instead: a function of the same value in PyTorch's own
differentiable operations, which any transform takes, however they are nested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_special() -> bool:
    """Whether a transform or a tracer is around the present call, one check for what is rare."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch.compiler.is_exporting()
    )


def wants_composition() -> bool:
    """Whether the present call is inside a torch.func transform or under forward-mode AD."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def wants_gradient_composition(d_output: Tensor) -> bool:
    """Whether the backward of ``d_output`` must be differentiable in turn, or is mapped over."""
    if torch.compiler.is_compiling():  # traced with gradients enabled, but not differentiable
        return wants_composition()
    if torch.is_grad_enabled() or wants_composition():
        return True
    return torch._C._functorch.is_legacy_batchedtensor(d_output)


def gradients_of(
    composition: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    d_output: Tensor,
) -> list[Tensor | None]:
    """The gradients of ``composition(*inputs)``, differentiable where gradients are enabled.

    An input given twice gets two gradients, and one that isn't needed gets None.
    """
    if not any(needs):
        return [None] * len(needs)
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that the gradient of each is its own, and ends here.
        pairs = list(zip(inputs, needs, strict=True))
        given = [t.view_as(t) if t is not None and need else t for t, need in pairs]
        output = composition(*given)
        wanted = [t for t, need in zip(given, needs, strict=True) if t is not None and need]
        found = torch.autograd.grad(
            output, wanted, d_output, create_graph=differentiable, allow_unused=True
        )
    rest = iter(found)
    return [next(rest) if need else None for need in needs]


def is_batched(tensor: Tensor) -> bool:
    """Whether ``tensor`` is one that vmap maps over, so that its values can't be looked at."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def has_values(tensor: Tensor) -> bool:
    """Whether values can be looked at: they are there, one for all, and no GPU is waited for."""
    if torch.compiler.is_compiling() or is_recorded():
        return False
    if tensor.numel() == 0 or tensor.device.type != "cpu":
        return False
    return not (wants_composition() and is_batched(tensor))


def is_recorded() -> bool:
    """Whether a tracer (of torch.jit, make_fx, aot_function) records the present call."""
    if torch._C._len_torch_dispatch_stack():
        mode, keys = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
        if mode(keys.PROXY) is not None or mode(keys.FAKE) is not None:
            return True
    return torch._C._get_tracing_state() is not None
