"""The prefix of an attention whose heads are split over processes, as tensor parallelism does."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_kernels.modules.bases import is_sharded

Pair = tuple[Tensor, Tensor]


def of_heads_here(module: nn.Module, pair: Pair, heads: int) -> Pair:
    """What goes with the ``heads`` that this process has, of keys and values ``[..., Hkv, L, D]``.

    They are the process's part by the mesh of the module's parameters. Each process has all of a
    prefix, and gets all of its gradient: the parts are gathered. What doesn't divide so is left for
    the op to refuse.
    """
    weight: Any = next(filter(is_sharded, module.parameters()), None)
    if weight is None or weight.device_mesh.ndim != 1:
        return pair
    mesh = weight.device_mesh
    if pair[0].shape[-3] != heads * mesh.size():
        return pair
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole = (DTensor.from_local(one, mesh, [Replicate()], run_check=False) for one in pair)
    dimension = pair[0].dim() - 3
    keys, values = (one.redistribute(placements=[Shard(dimension)]).to_local() for one in whole)
    return keys, values
