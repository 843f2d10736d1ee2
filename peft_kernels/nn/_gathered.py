"""A layer whose weight fully_shard holds: in shards between calls, whole within them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.modules.bases import is_sharded
from peft_kernels.modules.fully_sharded import fault_of_gathering, is_gathered
from peft_kernels.nn._over_codes import OverCodes
from peft_kernels.ops._sharded import adapter_placements


class HandsOn(nn.Module):
    """A layer that fully_shard may know, and give Parameters to when another has taken its place.

    It hands them on: whole at each call, and then in shards again.
    """

    def _hand_on_to(self, layer: nn.Module) -> nn.Module:
        if is_gathered(self):
            vars(self)["_successor"] = layer  # no child
        return layer

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        successor = self.__dict__.get("_successor")
        if successor is not None and name in ("weight", "bias"):
            successor._parameters[name] = value


def share_parameters(old: nn.Module, new: nn.Module) -> None:
    """Has ``new``, which took the place of ``old``, have whatever fully_shard gives to ``old``.

    That puts a whole Parameter, and then its shard again, into the table of the module that it
    knows, at each call. The table becomes that of both.
    """
    if is_gathered(old):
        old._parameters |= new._parameters
        new._parameters = old._parameters


def shards_beside(weight: Any) -> tuple[list, list]:
    """Where A and B lie beside a weight ``[n, k]`` of fully_shard's: as it would shard them.

    Beside a weight that is split more than once, as tensor parallelism splits it.
    """
    from torch.distributed.tensor import Replicate, Shard

    split = [p for p in weight.placements if p != Replicate()]
    if len(split) == 1 and split[0].is_shard():
        rows = [p if p == Replicate() else Shard(0) for p in weight.placements]
        return rows, rows
    return adapter_placements(weight)


def check_whole_in_calls(linear: Any) -> None:
    """Raises a TypeError if a weight that fully_shard gathers is a part of a layer's then.

    It may be shards of copies: then the outer dimension of its mesh has the copies.
    """
    if not is_gathered(linear):
        return
    from torch.distributed.tensor import Replicate

    outer = linear.weight.placements[:-1]
    if any(p != Replicate() for p in outer):
        raise TypeError(
            "linear has a weight that fully_shard holds over tensor parallelism: attach the pool "
            "before fully_shard()"
        )


def check_can_leave(name: str, layer: nn.Module) -> None:
    """Raises a RuntimeError if the layer of another library, in its place again, would go wrong.

    bitsandbytes' keeps beside its codes what it knows of them, and may pack them when it is called.
    """
    if isinstance(layer, OverCodes) and is_gathered(layer):
        raise RuntimeError(
            f"{name} has a weight in codes, which fully_shard holds in shards: take it out of the "
            "model before sharding"
        )


def device_in_calls(weight: Any) -> torch.device:
    """Where a weight is when its layer is called: its shards may be offloaded."""
    return torch.device(weight.device_mesh.device_type) if is_sharded(weight) else weight.device


def check_in_shards(layer: nn.Module) -> None:
    """Raises a RuntimeError if what is written to the layer's weight now would be lost."""
    if is_gathered(layer) and (fault := fault_of_gathering(layer)):
        raise RuntimeError(f"weight {fault}")


def in_call(parameter: Any, weight: Any) -> Tensor:
    """A sharded Parameter as it goes beside ``weight`` in a call, where that is gathered.

    Its gradient is the mean over the processes, as that of what fully_shard gathers is. Where a
    weight stays sharded by tensor parallelism, so does what is beside it.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, inner = parameter.device_mesh, weight.device_mesh.ndim if is_sharded(weight) else 0
    outer = mesh.ndim - inner
    rest = list(parameter.placements[outer:])
    moved = parameter.to(mesh.device_type).redistribute(placements=[Replicate()] * outer + rest)
    here = moved.to_local(grad_placements=[Partial()] * outer + rest)
    if here.requires_grad:
        processes = torch.Size(mesh.size(dimension) for dimension in range(outer)).numel()
        here.register_hook(partial(torch.mul, 1 / processes))
    if not inner:
        return here
    shape, stride = parameter.shape, parameter.stride()
    mesh = weight.device_mesh
    return DTensor.from_local(here, mesh, rest, run_check=False, shape=shape, stride=stride)


def beside_rows(weight: Any, lora_a: Any, *by_rows: Any) -> tuple[Any, ...]:
    """Weight ``[n, k]``, A, and what has a row for each of n, laid so that all is computed here.

    A shard that fully_shard has made of a shard of tensor parallelism is gathered for that: its
    rows aren't next to one another.
    """
    from torch.distributed.tensor import Replicate

    plain = [p if p.is_shard() else Replicate() for p in weight.placements]
    weight = _moved(weight, plain)
    of_a, of_b = adapter_placements(weight)
    return weight, _moved(lora_a, of_a), *(_moved(one, of_b) for one in by_rows)


def _moved(tensor: Any, placements: list) -> Any:
    if tensor is None or list(tensor.placements) == placements:
        return tensor
    # Offloaded shards are elsewhere than what processes send by.
    there = tensor.to(tensor.device_mesh.device_type)
    return there.redistribute(placements=placements).to(tensor.device)


def placed_like(tensor: Any, values: Any) -> Tensor:
    """``values`` in the shards that ``tensor`` has."""
    return _moved(values, list(tensor.placements)) if is_sharded(tensor) else values


@torch.no_grad()
def overwrite(weight: nn.Parameter, values: Tensor) -> nn.Parameter:
    """Writes ``values`` into a Parameter that must stay; what it held, in another."""
    former = nn.Parameter(weight.detach().clone(), requires_grad=False)
    weight.copy_(values)
    return former
