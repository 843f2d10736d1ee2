"""A LoRA layer's adapter where the weight is a DTensor, as tensor parallelism makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.modules.bases import is_sharded
from peft_kernels.nn._gathered import shards_beside
from peft_kernels.ops._sharded import adapter_placements


def lay_beside(
    weight: Any, parameter: nn.Parameter, which: int, gathered: bool = False
) -> nn.Parameter:
    """A (``which`` 0), B or magnitudes (1), the first process's, as goes with ``weight [n, k]``.

    ``gathered`` says that fully_shard holds the weight.
    """
    if not is_sharded(weight):
        return parameter
    from torch.distributed.tensor import distribute_tensor

    placements = (shards_beside if gathered else adapter_placements)(weight)[which]
    placed = distribute_tensor(parameter.detach(), weight.device_mesh, placements)
    return nn.Parameter(placed, parameter.requires_grad)


@torch.no_grad()
def draw_whole(draw: Callable[..., None], *parameters: Any) -> None:
    """``draw(*parameters)``, of sharded ones as if they were whole, by the first process.

    Each process draws shards by its own generator otherwise: what all have would differ.
    """
    if not any(map(is_sharded, parameters)):
        return draw(*parameters)
    from torch.distributed.tensor import distribute_tensor

    whole = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in parameters]
    draw(*whole)
    for parameter, values in zip(parameters, whole, strict=True):
        mesh, placements = parameter.device_mesh, parameter.placements
        parameter.copy_(distribute_tensor(values, mesh, placements))


def all_finite(tensor: Any) -> bool:
    """Whether all values are, in every process where it is a DTensor."""
    finite: Any = tensor.isfinite().all()
    if is_sharded(finite):  # offloaded shards are elsewhere than what processes send by
        finite = finite.to(finite.device_mesh.device_type).full_tensor()
    return bool(finite)


def placed_as(parameter: Any, values: Tensor) -> Tensor:
    """``values``, which every process has, sharded as ``parameter`` is."""
    if not is_sharded(parameter) or is_sharded(values):
        return values
    from torch.distributed.tensor import distribute_tensor

    values = values.to(parameter.device, parameter.dtype)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(values, mesh, placements, src_data_rank=None)


def part_of(tensor: Any) -> Tensor:
    """What this process has of it."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()


def let_view(parameter: Any, values: Tensor) -> None:
    """Has what this process has of a Parameter be these values, of its shape and dtype."""
    if is_sharded(parameter):
        parameter._local_tensor = values  # .data would set that of the wrapper
    else:
        parameter.data = values


class Beside(NamedTuple):
    """How A ``[r, k]`` and B^T ``[r, n]`` lie beside a weight that is a DTensor."""

    mesh: Any
    placements: tuple[list, list]
    columns: tuple[int, int]  # k and n

    @classmethod
    def of(cls, weight: Any) -> Beside | None:
        """Beside a weight ``[n, k]``; None where that is whole."""
        if not is_sharded(weight):
            return None
        from torch.distributed.tensor import Replicate, Shard

        a, b = adapter_placements(weight)
        transposed = [Shard(1) if p == Shard(0) else Replicate() for p in b]
        n, k = weight.shape
        return cls(weight.device_mesh, (a, transposed), (k, n))

    def part(self, matrix: Tensor, which: int, source: int | None = None) -> Tensor:
        """This process's part of A (``which`` 0) or B^T (1), which all have, or ``source`` has."""
        from torch.distributed.tensor import distribute_tensor

        placements = self.placements[which]
        placed = distribute_tensor(matrix, self.mesh, placements, src_data_rank=source)
        return placed.to_local().contiguous()

    def whole(self, part: Tensor, which: int) -> Tensor:
        """The DTensor of what this process has, whose memory it keeps."""
        from torch.distributed.tensor import DTensor

        columns = self.columns[which]
        return DTensor.from_local(
            part,
            self.mesh,
            self.placements[which],
            run_check=False,
            shape=torch.Size((part.shape[0], columns)),
            stride=(columns, 1),
        )

    def of_the_first(self, matrix: Tensor) -> Tensor:
        """What the first process has, in all."""
        from torch.distributed.tensor import Replicate, distribute_tensor

        return distribute_tensor(matrix, self.mesh, [Replicate()] * self.mesh.ndim).to_local()
