"""An op or a module on another device beside float64 on the CPU."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from errors import assert_as_good_as
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import peft_kernels


class Case(NamedTuple):
    """A function of named arguments, made of a dtype's, and those that get a gradient."""

    call: Callable[..., Tensor]
    inputs: Callable[[torch.dtype], dict[str, Any]]
    trained: tuple[str, ...]


def check(case: Case, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Value and gradients are as good as those of the reference on the CPU."""
    inputs = case.inputs(dtype)
    exact = outcome(case, wide(inputs), "reference")
    eager = outcome(case, inputs, "reference")
    found = outcome(case, tree_map(lambda t: t.to(device), inputs), backend)
    for i, (ours, theirs, right) in enumerate(zip(found, eager, exact, strict=True)):
        assert_as_good_as(ours, theirs, right, f"gradient {i} of {case.trained}" if i else "y")


def wide(inputs: dict[str, Any]) -> dict[str, Any]:
    """In float64, but for the scales of a bank, which are float32 in any."""
    found = tree_map(lambda t: t.double() if t.is_floating_point() else t, inputs)
    if "banks" in inputs:
        pairs = zip(found["banks"], inputs["banks"], strict=True)
        found["banks"] = [bank._replace(scales=given.scales) for bank, given in pairs]
    return found


def outcome(case: Case, inputs: dict[str, Any], backend: str) -> list[Tensor]:
    """The value, and the gradients of its weighted sum, on the CPU."""
    own = {name: tree_map(leaf, inputs[name]) for name in case.trained}
    with peft_kernels.backend(backend):
        y = case.call(**inputs | own)
        weights = torch.arange(y.numel(), dtype=torch.float64).cos().view(y.shape)
        gradients = torch.autograd.grad(y, tree_leaves(own), weights.to(y))
    return [tensor.detach().cpu() for tensor in (y, *gradients)]


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()
