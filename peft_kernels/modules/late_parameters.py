"""Parameters that came into a DistributedDataParallel after it was built, which it doesn't know."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class RefusesLateParameters:
    """Forward pre-hook of a DistributedDataParallel: a step that would train them is an error.

    Each process would go on with its own gradients. It may serve them, and whoever averages
    gradients himself says so by its ``no_sync()``.

    Args:
        ddp: as it is before anything new comes.
    """

    def __init__(self, ddp: nn.Module) -> None:
        self.known = {name: p.shape for name, p in ddp.named_parameters()}

    @classmethod
    def watch(cls, ddp: nn.Module) -> None:
        """Puts the hook in once: what the wrapper was built with stays what it knows."""
        if not any(isinstance(hook, cls) for hook in ddp._forward_pre_hooks.values()):
            ddp.register_forward_pre_hook(cls(ddp))

    def __call__(self, ddp: Any, args: Any) -> None:
        averages = ddp.training and torch.is_grad_enabled() and ddp.require_backward_grad_sync
        if not averages or ddp.process_group.size() == 1:
            return
        parameters = ddp.named_parameters()
        late = [n for n, p in parameters if p.requires_grad and self.known.get(n) != p.shape]
        if late:
            raise RuntimeError(
                f"{late[0]} came after DistributedDataParallel wrapped the model ({len(late)} "
                f"parameters in all), which doesn't average its gradients over the "
                f"{ddp.process_group.size()} processes: put adapters in first, then wrap the "
                "model. To average them yourself, run the forward within its no_sync(); to serve "
                "the adapters, call eval()"
            )
