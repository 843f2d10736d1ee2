"""Layers whose weight fully_shard holds: in shards between calls, whole within them."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def is_gathered(module: nn.Module) -> bool:
    """Whether fully_shard gathers parameters of this very module for each call of what is around.

    Of a Parameter that several modules have, the first alone has its hooks.
    """
    hooks = module._load_state_dict_post_hooks.values()
    if any("FSDPParam." in getattr(hook, "__qualname__", "") for hook in hooks):
        return True
    managed = vars(module).get("_is_fsdp_managed_module", False)
    return managed and hasattr(module._parameters.get("weight"), "full_tensor")


def fault_of_gathering(module: nn.Module) -> str | None:
    """Why the weight of a gathered layer isn't the shard that fully_shard starts from, or None."""
    weight: Any = module._parameters["weight"]
    # Between forward and backward it may be in other shards, over a mesh without names.
    if hasattr(weight, "full_tensor"):
        mesh = weight.device_mesh
        if mesh.ndim == 1 or mesh.mesh_dim_names is not None:
            return None
    return (
        "is as fully_shard has gathered it for a forward, so that what is done to it would be "
        "lost: call reshard() of the model's FSDPModules first (functions that take the whole "
        "model do)"
    )


def reshard(model: nn.Module) -> None:
    """Has every weight that fully_shard holds be the shard that it starts from."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()
