"""One way to compute a layer, as the suites hand it to the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft_kernels.tools.bench.measure import saved_bytes

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Implementation:
    """``forward(x)``, and what it trains besides x."""

    forward: Forward
    x: Tensor
    parameters: tuple[Tensor, ...]
    frozen: tuple[Tensor, ...] = ()

    def call(self, backward: bool) -> Callable[[], object]:
        """What is timed: the forward without gradients, or the forward and the backward."""
        return self._forward_and_backward() if backward else self._forward_only

    def _forward_only(self) -> Tensor:
        with torch.no_grad():
            return self.forward(self.x)

    def _forward_and_backward(self) -> Callable[[], object]:
        x = self.x.detach().requires_grad_()
        wanted = (x, *self.parameters)
        dy = torch.randn_like(self._forward_only())
        return lambda: torch.autograd.grad(self.forward(x), wanted, dy)

    def results(self, dy: Tensor | None) -> tuple[Tensor, ...]:
        """The output, and with ``dy``, the gradient of it, the gradient to x."""
        if dy is None:
            return (self._forward_only(),)
        x = self.x.detach().requires_grad_()
        y = self.forward(x)
        return y.detach(), *torch.autograd.grad(y, x, dy.to(y.dtype))

    def saved_bytes(self) -> int:
        """Bytes kept for the backward beyond x and the parameters."""
        x = self.x.detach().requires_grad_()
        return saved_bytes(lambda: self.forward(x), (x, *self.parameters, *self.frozen))


def copy_values(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values)


def from_module(layer: nn.Module, x: Tensor, forward: Forward | None = None) -> Implementation:
    """A module's forward, or another function that calls it."""
    parameters = tuple(p for p in layer.parameters() if p.requires_grad)
    frozen = tuple(p for p in layer.parameters() if not p.requires_grad)
    return Implementation(forward or layer, x, parameters, frozen)
