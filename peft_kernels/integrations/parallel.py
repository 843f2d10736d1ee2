"""Tensor parallelism for layers with LoRA: torch's styles, with the adapter laid beside its base.

    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}  # or plan_of(model)
    torch.distributed.tensor.parallel.parallelize_module(model, mesh, plan)

This module imports ``torch.distributed.tensor``; the package itself doesn't.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor import distribute_tensor as distribute
from torch.distributed.tensor import parallel as torch_parallel
from torch.distributed.tensor.parallel import ParallelStyle

from peft_kernels.modules.bases import CONV1D, names_of
from peft_kernels.nn.lora import LoRALinear
from peft_kernels.nn.multi_lora import MultiLoRALinear

__all__ = ["ColwiseParallel", "RowwiseParallel", "plan_of"]

_PEFT_LAYER = "peft.tuners.lora.layer.Linear"


class _Style:
    """Lays out what is LoRA's, and leaves the rest to the style of torch's beside it."""

    # How weight [n, k], A [r, k], B [n, r] and vectors of n lie.
    _placements: tuple[Placement, Placement, Placement, Placement]
    _input_placements: tuple[Placement, ...]

    def _partition_linear_fn(self: Any, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        if isinstance(module, MultiLoRALinear):
            weight, _, _, bias = self._placements
            self._place(module, "weight", mesh, _stored(weight, module.fan_in_fan_out))
            self._place(module, "bias", mesh, bias)
        elif isinstance(module, LoRALinear):
            self._partition_lora(module, mesh)
        else:
            super()._partition_linear_fn(name, module, mesh)  # type: ignore[misc]

    def _partition_lora(self: Any, layer: LoRALinear, mesh: DeviceMesh) -> None:
        if layer.merged:
            raise RuntimeError("the layer is merged; unmerge() it before it is sharded")
        weight, a, b, bias = self._placements
        self._place(layer, "weight", mesh, _stored(weight, layer.fan_in_fan_out))
        self._place(layer, "lora_a", mesh, a)
        self._place(layer, "lora_b", mesh, b)
        self._place(layer, "bias", mesh, bias)
        self._place(layer, "lora_magnitude", mesh, bias)

    def _partition_peft(self: Any, name: str, module: Any, mesh: DeviceMesh) -> None:
        if name:  # a part of the layer
            return
        weight, a, b, bias = self._placements
        base = module.get_base_layer()
        self._place(base, "weight", mesh, _stored(weight, CONV1D in names_of(type(base))))
        self._place(base, "bias", mesh, bias)
        for one in module.lora_A.values():
            self._place(one, "weight", mesh, a)
        for one in module.lora_B.values():
            self._place(one, "weight", mesh, b)
            self._place(one, "bias", mesh, bias)
        for one in module.lora_magnitude_vector.values():
            self._place(one, "weight", mesh, bias)

    def _place(
        self: Any, owner: nn.Module, name: str, mesh: DeviceMesh, placement: Placement
    ) -> None:
        tensor = getattr(owner, name)
        if tensor is not None:
            placed = distribute(tensor, mesh, [placement], src_data_rank=self.src_data_rank)
            owner.register_parameter(name, nn.Parameter(placed, tensor.requires_grad))

    def _apply(self: Any, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, MultiLoRALinear):
            held = dict(module._buffers)  # which distribute_module makes DTensors of, all whole
            super()._apply(module, device_mesh)  # type: ignore[misc]
            module._buffers.update(held)
            module.keep_part(self.src_data_rank)
            return module
        if _PEFT_LAYER not in names_of(type(module)):
            return super()._apply(module, device_mesh)  # type: ignore[misc]
        return distribute_module(
            module,
            device_mesh,
            self._partition_peft,
            partial(self._prepare_input_fn, self.input_layouts, self._input_placements),
            partial(self._prepare_output_fn, self.output_layouts, self.use_local_output),
        )


def _stored(placement: Placement, transposed: bool) -> Placement:
    return Shard(1 - placement.dim) if transposed and isinstance(placement, Shard) else placement


class ColwiseParallel(_Style, torch_parallel.ColwiseParallel):
    """torch's ColwiseParallel for layers with LoRA too: y ``[..., n]`` is sharded by n.

    ``y_p = x W_p^T + b_p + scale (dropout(x) A^T) B_p^T``: process p has rows p of W ``[n, k]``, of
    B ``[n, r]`` and of the bias, and all of A ``[r, k]``. Beyond what the bare layer sends (dx, a
    sum), the backward sums what dA is made of: the smaller of ``r k`` and, without dropout, ``m r``
    elements, for m rows of x. torch's own style works too, and shards A by rank: then A is gathered
    at each forward, in serving as well.

    Layers: LoRALinear, PEFT's ``lora.Linear`` (served by kernels after
    :func:`peft_kernels.accelerate`), those of an AdapterPool, and what torch's style takes. Dropout
    draws the same mask in every process, by a seed that the first one sends (8 bytes).

    Args:
        input_layouts, output_layouts, use_local_output: as torch's.

    Raises:
        RuntimeError: a LoRALinear is merged.
        NotImplementedError: another kind of layer.
    """

    _placements = Shard(0), Replicate(), Shard(0), Shard(0)
    _input_placements = (Replicate(),)


class RowwiseParallel(_Style, torch_parallel.RowwiseParallel):
    """torch's RowwiseParallel for layers with LoRA too: x ``[..., k]`` is sharded by k.

    ``y = sum_p x_p W_p^T + scale (dropout(x_p) A_p^T) B^T + b``: process p has columns p of W
    ``[n, k]`` and of A ``[r, k]``, all of B ``[n, r]`` and of the bias. The sum over processes is
    the bare layer's: the low-rank part is in it. Beyond that the backward sums what dB is made of:
    the smaller of ``n r`` and, without dropout, ``m r`` elements. torch's own style works too, and
    keeps all of A everywhere: then dA is gathered.

    Layers, arguments and errors are those of :class:`ColwiseParallel`. Dropout draws a mask of its
    own for each process's part of x.
    """

    _placements = Shard(1), Shard(1), Replicate(), Replicate()
    _input_placements = (Shard(-1),)


# What transformers calls them, 4.57 and 5.
_STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "embedding_colwise": lambda: ColwiseParallel(output_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
}
_WHOLE = "replicated_with_grad_allreduce"  # a module of each process's own heads: q_norm, k_norm


def plan_of(model: nn.Module) -> dict[str, ParallelStyle]:
    """The ``tp_plan`` of a model of transformers' for ``parallelize_module``.

    transformers shards a model while it loads it (``tp_plan="auto"``), and from version 5 on gives
    its layers another forward, into which no adapter goes. Load the whole model instead, put LoRA
    in, and ``parallelize_module(model, mesh, plan_of(model))``.

    Args:
        model: such a model, or one that has it inside, as a PeftModel has.

    Returns:
        Styles by the names of modules of ``model``, with ``*`` for numbers.

    Raises:
        ValueError: there is no plan, or it has a style that isn't known here, such as those of
            fused projections and experts; it names it.
    """
    found = ((n, m) for n, m in model.named_modules() if getattr(type(m), "tp_plan", None))
    host_name, host = next(found, ("", None))
    modules = dict(() if host is None else host.named_modules())
    # A plan also has its keys as of the model without a head, which select nothing then.
    plan: dict[str, str] = {
        key: style
        for key, style in getattr(host, "tp_plan", {}).items()
        if any(fnmatch(name, key) for name in modules)
    }
    if not plan:
        raise ValueError(
            "model must be one of transformers' that has a tp_plan, or have one inside; "
            f"{type(model).__name__} has none: write a plan, of styles by names of modules"
        )
    for key, style in plan.items():
        if style not in _STYLES and not (style == _WHOLE and not _trains(modules, key)):
            raise ValueError(
                f"the model's tp_plan has {style!r} for {key}, for which there is no style here: "
                f"known are {', '.join(_STYLES)}"
            )
    prefix = f"{host_name}." if host_name else ""
    return {prefix + key: _STYLES[style]() for key, style in plan.items() if style in _STYLES}


def _trains(modules: dict[str, nn.Module], pattern: str) -> bool:
    matched = (module for name, module in modules.items() if fnmatch(name, pattern))
    return any(parameter.requires_grad for module in matched for parameter in module.parameters())
