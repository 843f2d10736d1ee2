"""What vLLM loads, and would compute something else with, is refused before a slot has any of it.

vLLM writes A and B into the corner of a slot that they fill, and scales B by the rank that their
configuration says. So a smaller model's adapter, or one whose rank isn't the configured one, would
be served as another adapter. Weights that aren't finite would reach requests of other adapters too:
vLLM's attention on a CPU multiplies what was left in a block of its cache by zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.models.utils import PPMissingLayer

from peft_kernels.integrations.vllm.plugin import LOGGER


class Size(NamedTuple):
    """A layer's inputs, None where vLLM checks them by itself, and its outputs."""

    inputs: int | None
    outputs: int


def sizes_of(manager: LoRAModelManager) -> dict[str, Size]:
    """By the name that an adapter has for a layer; none of a layer that processes share."""
    sizes = {}
    for name, layer in manager.modules.items():
        pairs = getattr(layer, "_peft_kernels_pairs", [])
        if not pairs or getattr(layer, "tp_size", 1) > 1:
            continue
        own = [Size(a.width if a else None, b.width) for a, b in pairs]
        sizes[name] = Size(own[0].inputs, sum(size.outputs for size in own))
        parts = manager.packed_modules.get(name, [])
        if len(parts) == len(own):
            sizes.update(zip(parts, own, strict=True))
    return sizes


def problem_of(lora: LoRAModel, sizes: Mapping[str, Size]) -> str | None:
    """Why an adapter, as it was read and before its slices are packed, isn't to be served."""
    if not lora.loras:
        return "its file has no LoRA weights"
    for name, weights in lora.loras.items():
        for part, tensor in (("lora_A", weights.lora_a), ("lora_B", weights.lora_b)):
            if tensor is None:
                return f"{name} has no {part}"
            if not _is_finite(tensor):
                return f"{part} of {name} has values that are no finite numbers"
        problem = _problem_of_sizes(name, weights, sizes[name]) if name in sizes else None
        if problem:
            return problem
    return None


def _problem_of_sizes(name: str, weights: LoRALayerWeights, size: Size) -> str | None:
    a, b, rank = weights.lora_a, weights.lora_b, weights.rank
    inputs = a.shape[1] if size.inputs is None else size.inputs
    if a.shape == (rank, inputs) and b.shape == (size.outputs, rank):
        return None
    return (
        f"lora_A and lora_B of {name} must be {[rank, inputs]} and {[size.outputs, rank]}, by the "
        f"base model's layer and the rank {rank} of adapter_config.json; they are "
        f"{list(a.shape)} and {list(b.shape)}"
    )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.numel():
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def unknown(lora: LoRAModel, manager: LoRAModelManager) -> list[str]:
    """The adapter's layers that the model hasn't, where all of the model is in this process."""
    is_part = manager.lora_config.target_modules is not None or any(
        isinstance(module, PPMissingLayer) for module in manager.model.modules()
    )
    if is_part:
        return []
    known = {*manager.modules, *(name for own in manager.packed_modules.values() for name in own)}
    return [name for name in lora.loras if not known & {name, f"model.{name}"}]


def checked(load: Callable[..., LoRAModel]) -> Callable[..., LoRAModel]:
    """vLLM's loader, which raises a ValueError where there is a problem."""

    @wraps(load)
    def run(self: WorkerLoRAManager, lora_request: LoRARequest) -> LoRAModel:
        lora, manager = load(self, lora_request), self._adapter_manager
        problem = problem_of(lora, sizes_of(manager))
        if problem:
            raise ValueError(f"LoRA {lora_request.lora_name!r} can't be served: {problem}")
        left_out = unknown(lora, manager)
        if left_out:
            init_logger(LOGGER).warning(
                "LoRA %s is served without its weights of layers that the model hasn't: %s",
                lora_request.lora_name,
                ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else ""),
            )
        return lora

    return run
