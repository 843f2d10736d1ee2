"""lora_linear and dora_linear of DTensors: every process runs the kernel on what it holds, and what
is left to sum is said by the placements.

Along each dimension of the weight's mesh, of ``p`` processes, the weight ``[n, k]`` is

    Shard(0)    by columns of y: x and A whole, B and the bias by n, so is y.
                dx is a sum over processes, and so is dA: ``r k`` elements, or ``m r`` of dS.
    Shard(1)    by rows of W^T: x and A by k, B and the bias whole. y is a sum, and what goes into
                it is all of a process's part: ``x W^T + scale (x A^T) B^T``, so that S isn't sent.
                dB is a sum: ``n r`` elements, or ``m r`` of S.
                DoRA's norm is a root of sums over k: ``n (r + 1) + r r`` elements forward. The
                gradient of its magnitude is a sum: ``n`` elements.
    Replicate   all whole, but for x, which may be sharded by rows: then dA and dB are sums.

DoRA's magnitudes and norms lie as B's rows do. But for those norms nothing is sent forward that the
bare linear layer doesn't send. What comes in another placement is brought into these by DTensor,
forward and backward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.ops._dropout import seed_tensor
from peft_kernels.ops._sharded_rows import ThroughRows

_WHOLE = (Tensor, nn.Parameter)
_DTENSOR = "torch.distributed.tensor"
_ODD = -0x61C8864680B583EB  # 2**64 over the golden ratio, as an int64: seeds of neighbours differ


def are_sharded(x: Tensor, weight: Tensor) -> bool:
    """Whether one of these is a DTensor. Nothing is imported to find out."""
    if type(x) in _WHOLE and type(weight) in _WHOLE:
        return False
    library: Any = sys.modules.get(_DTENSOR)
    return library is not None and isinstance(x, library.DTensor) | isinstance(
        weight, library.DTensor
    )


def adapter_placements(weight: Any) -> tuple[list, list]:
    """Where A and B lie beside this weight ``[n, k]`` so that they need not be moved for a call."""
    from torch.distributed.tensor import Replicate, Shard

    a = [p if p == Shard(1) else Replicate() for p in weight.placements]
    b = [p if p == Shard(0) else Replicate() for p in weight.placements]
    return a, b


class Layout(NamedTuple):
    """The placements of the arguments, of y, and of the gradients as processes compute them."""

    x: list
    a: list
    b: list  # the bias lies as B does
    y: list
    dx: list
    dw: list
    da: list
    db: list
    dbias: list


def lora_linear_sharded(
    local: Callable[..., Tensor],
    x: Any,
    weight: Any,
    lora_a: Any,
    lora_b: Any,
    *,
    bias: Any,
    scale: float | Tensor,
    dropout_p: float,
    seed: int | Tensor | None,
    magnitude: Any = None,
    norm: Any = None,
) -> Tensor:
    """``local`` on each process's shards of these DTensors.

    Args:
        local: :func:`peft_kernels.ops.lora_linear`, or with magnitudes and norms ``dora_linear``.
        seed: the same in all processes; drawn where it is None.

    Returns:
        y as a DTensor: sharded as ``lora_b`` by columns, or a sum that is still to be taken.

    Raises:
        TypeError: some are DTensors and others aren't.
        ValueError: they are on several meshes, or the weight is placed in another way.
    """
    from torch.distributed.tensor import DTensor, Shard

    rows = {"magnitude": magnitude, "norm": norm}
    mesh = mesh_of(x=x, weight=weight, lora_a=lora_a, lora_b=lora_b, bias=bias, **rows)
    layout = layout_of(x, weight)
    by_rows = {
        name: parameter_part(values, layout.b, layout.dbias)
        for name, values in rows.items()
        if values is not None
    }
    scale = scale.to_local() if isinstance(scale, DTensor) else scale
    here = input_part(x, layout.x, layout.dx)
    plain = dropout_p == 0.0 and magnitude is None and torch.is_grad_enabled()
    rows_a = plain and _sums_rows(lora_a, lora_a.shape[1], here, weight, layout.da, Shard(0))
    rows_b = plain and _sums_rows(lora_b, lora_b.shape[0], here, weight, layout.db, Shard(1))
    a = parameter_part(lora_a, layout.a, layout.a if rows_a else layout.da)
    b = parameter_part(lora_b, layout.b, layout.b if rows_b else layout.db)
    seeds = seed_tensor(seed, x.device) if dropout_p else None
    y = local(
        here,
        parameter_part(weight, weight.placements, layout.dw),
        a.detach() if rows_a else a,
        b.detach() if rows_b else b,
        bias=None if bias is None else bias_part(bias, layout),
        scale=scale,
        dropout_p=dropout_p,
        seed=None if seeds is None else seeds_here(seeds, seed is None, layout, mesh),
        **by_rows,
    )
    if rows_a:
        summed = _sum_over(mesh, layout.da)
        y = ThroughRows.apply(y, here.detach(), a, b.detach(), scale, True, summed)
    if rows_b:
        summed = _sum_over(mesh, layout.db)
        y = ThroughRows.apply(y, here.detach(), a.detach(), b, scale, False, summed)
    return output_of(y, x, weight, layout)


def output_of(part: Tensor, x: Any, weight: Any, layout: Layout) -> Tensor:
    """y ``[..., n]``, of which this process has a part."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    strides = torch.empty(shape, device="meta").stride()
    mesh = weight.device_mesh
    return DTensor.from_local(part, mesh, layout.y, run_check=False, shape=shape, stride=strides)


def _sums_rows(
    matrix: Any, columns: int, x: Tensor, weight: Any, gradient: list, split: Any
) -> bool:
    """Whether a matrix of r ``columns`` trains by a sum of ``[m, r]``, which is smaller than it.

    Rows are the same in all processes that sum, where what they have parts of is the weight.
    """
    sums = [p for p, g in zip(weight.placements, gradient, strict=True) if g.is_partial()]
    if not matrix.requires_grad or not sums or any(p != split for p in sums):
        return False
    return x.shape[:-1].numel() < columns


def _sum_over(mesh: Any, placements: list) -> Callable[[Tensor], Tensor]:
    """Sums over those dimensions of the mesh along which a gradient is a sum."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    lie = [Partial() if p.is_partial() else Replicate() for p in placements]
    return lambda part: DTensor.from_local(part, mesh, lie, run_check=False).full_tensor()


def norm_of_shards(
    terms: Callable[..., list[Tensor]],
    norm: Callable[..., Tensor],
    weight: Any,
    lora_a: Any,
    lora_b: Any,
    scale: float | Tensor,
) -> Tensor:
    """The norms of the rows of ``weight + scale lora_b lora_a``, a DTensor that lies as B does.

    Args:
        terms: of a process's part of weight and A, sums over k.
        norm: of those sums, B and scale.
    """
    from torch.distributed.tensor import DTensor, Shard

    mesh = mesh_of(weight=weight, lora_a=lora_a, lora_b=lora_b)
    of_a, of_b = adapter_placements(weight)
    sums = terms(weight.to_local(), lora_a.redistribute(placements=of_a).to_local())
    by_k = [d for d, p in enumerate(weight.placements) if p == Shard(1) and mesh.size(d) > 1]
    if by_k:
        flat = torch.cat([one.flatten() for one in sums])
        for dimension in by_k:
            torch.distributed.all_reduce(flat, group=mesh.get_group(dimension))
        parts = flat.split([one.numel() for one in sums])
        sums = [part.view_as(one) for part, one in zip(parts, sums, strict=True)]
    here = norm(*sums, lora_b.redistribute(placements=of_b).to_local(), scale)
    shape = torch.Size(weight.shape[:1])
    return DTensor.from_local(here, mesh, of_b, run_check=False, shape=shape, stride=(1,))


def mesh_of(**tensors: Any) -> Any:
    from torch.distributed.tensor import DTensor

    mesh = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, DTensor):
            others = ", ".join(n for n, t in tensors.items() if isinstance(t, DTensor))
            raise TypeError(
                f"{name} must be a DTensor, as {others}: parallelize_module() makes the parameters "
                "and the input of a layer such (put the adapter in first), distribute_tensor() one"
            )
        mesh = tensor.device_mesh if mesh is None else mesh
        if tensor.device_mesh != mesh:
            raise ValueError(
                f"{name} must be on the mesh of the others, {mesh}; got {tensor.device_mesh}"
            )
    return mesh


def layout_of(x: Any, weight: Any) -> Layout:
    """How each tensor has to lie, from the weight's placements and x's rows."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    last, whole, total = x.dim() - 1, Replicate(), Partial()
    n, k, columns = Shard(0), Shard(1), Shard(last)
    table: list[tuple] = []
    for of_weight, of_x in zip(weight.placements, x.placements, strict=True):
        if of_weight == n:
            table.append((whole, whole, n, columns, total, n, total, n, n))
        elif of_weight == k:
            table.append((columns, k, whole, total, columns, k, k, total, total))
        elif of_weight == whole:
            rows = of_x if of_x.is_shard() and of_x.dim % x.dim() != last else whole
            sums = whole if rows is whole else total
            table.append((rows, whole, whole, rows, rows, sums, sums, sums, sums))
        else:
            raise ValueError(
                "weight must be placed as Shard(0), Shard(1) or Replicate() along each dimension "
                f"of its mesh; got {weight.placements}"
            )
    return Layout(*map(list, zip(*table, strict=True)))


def input_part(x: Any, placements: list, gradient: list) -> Tensor:
    """A gradient that is a sum stays one: that of an x which q, k and v share is sent once."""
    if list(x.placements) != placements:
        x = x.redistribute(placements=placements)
    return x.to_local(grad_placements=gradient)


def parameter_part(parameter: Any, placements: Sequence, gradient: list) -> Tensor:
    """A gradient is brought into the placement of its parameter at once."""
    if parameter.requires_grad or list(parameter.placements) != list(placements):
        parameter = parameter.redistribute(placements=placements)
    return parameter.to_local(grad_placements=gradient)


def bias_part(bias: Any, layout: Layout) -> Tensor | None:
    """Where y is a sum over processes, the first of them has the bias."""
    here = parameter_part(bias, layout.b, layout.dbias)
    coordinates = bias.device_mesh.get_coordinate()
    if all(c == 0 or not p.is_partial() for c, p in zip(coordinates, layout.y, strict=True)):
        return here
    return here * 0.0 if here.requires_grad else None  # gradients are summed by all, or by none


def seeds_here(here: Tensor, drawn: bool, layout: Layout, mesh: Any) -> Tensor:
    """The same seeds for those who have the same x, and others for those with other parts of it.

    Those that were drawn are the first process's, whatever the generators of the others are at.
    """
    for dimension, placement in enumerate(layout.x):
        if placement.is_shard():
            here = here + mesh.get_local_rank(dimension) * _ODD
        elif drawn and mesh.size(dimension) > 1:
            here = here.clone()
            torch.distributed.broadcast(here, group=mesh.get_group(dimension), group_src=0)
    return here
