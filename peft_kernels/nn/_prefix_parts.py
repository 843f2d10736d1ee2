"""A site's keys and values: as parameters, or as an MLP makes them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, int]
Pair = tuple[Tensor, Tensor]


class FlatPrefix(nn.Module):
    """Keys and values as parameters, ``[P, 2, Hkv, L, D]`` a layer."""

    def __init__(
        self, tasks: int, length: int, shapes: Mapping[int, Shape], factory: dict[str, Any]
    ) -> None:
        super().__init__()
        self.values = nn.ParameterDict(
            {
                str(index): nn.Parameter(torch.empty(tasks, 2, heads, length, size, **factory))
                for index, (heads, size) in shapes.items()
            }
        )

    def reset_parameters(self, init: str, std: float | None) -> None:
        deviation = 0.0 if init == "zero" else 0.02 if std is None else std
        for values in self.values.values():
            nn.init.normal_(values, std=deviation)

    def hidden(self) -> None:
        return None

    def layer(self, index: int, hidden: None) -> Pair:
        k, v = self.values[str(index)].unbind(1)
        return k, v

    def fit(self, targets: Mapping[int, Tensor]) -> None:
        for index, target in targets.items():
            self.values[str(index)].copy_(target)


class MLPPrefix(nn.Module):
    """P' and the MLP that makes keys and values of it; the MLP's end is kept layer by layer."""

    def __init__(
        self,
        tasks: int,
        length: int,
        shapes: Mapping[int, Shape],
        dim: int,
        mid: int,
        depth: int,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        self.shapes = dict(shapes)
        self.embedding = nn.Parameter(torch.empty(tasks, length, dim, **factory))
        widths = [dim, *([mid] * (depth - 1))]
        self.inner = nn.ModuleList(
            nn.Linear(a, b, **factory) for a, b in itertools.pairwise(widths)
        )
        self.outer = nn.ModuleDict(
            {
                str(index): nn.Linear(widths[-1], 2 * heads * size, **factory)
                for index, (heads, size) in shapes.items()
            }
        )

    def reset_parameters(self, init: str, std: float | None) -> None:
        nn.init.normal_(self.embedding, std=1.0 if std is None else std)
        linears: list[Any] = [*self.inner, *self.outer.values()]
        for linear in linears:
            linear.reset_parameters()
        if init == "zero":
            for linear in self.outer.values():
                nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
                nn.init.zeros_(linear.bias)  # type: ignore[arg-type]

    def hidden(self) -> Tensor:
        """The last linear layer's input, ``[P, L, mid]``."""
        hidden: Tensor = self.embedding
        for linear in self.inner:
            hidden = torch.tanh(linear(hidden))
        return hidden

    def layer(self, index: int, hidden: Tensor) -> Pair:
        made = self.outer[str(index)](hidden)
        k, v = made.unflatten(-1, (2, *self.shapes[index])).permute(2, 0, 3, 1, 4).unbind(0)
        return k, v

    def fit(self, targets: Mapping[int, Tensor]) -> None:
        hidden = self.hidden().flatten(0, 1).double()
        inverse = torch.linalg.pinv(hidden)  # the solution of the least norm
        for index, target in targets.items():
            linear: Any = self.outer[str(index)]
            table = target.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1).double()
            linear.weight.copy_((inverse @ table).mT)
            linear.bias.zero_()
