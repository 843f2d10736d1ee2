"""PEFT's LoraModel, with ``adapter_names`` in training too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraModel as PeftLoraModel
from torch import nn


class LoraModel(PeftLoraModel):
    """PEFT's, but for one refusal: ``adapter_names`` in training.

    The layers below have a kernel for it, with gradients to the adapters that rows name.
    """

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        trains = self.training and kwargs.get("adapter_names") is not None
        if trains and _is_checkpointed(self):
            raise ValueError(
                "adapter_names can't be given in training with gradient checkpointing, which calls "
                "layers again in the backward, without the names: first call "
                "gradient_checkpointing_disable()"
            )
        hooks = super()._enable_peft_forward_hooks(*args, **kwargs)
        self.training = self.training and not trains  # this module's alone: PEFT refuses by it
        try:
            hooks.__enter__()
        finally:
            self.training = self.training or trains
        try:
            yield
        finally:
            hooks.__exit__(None, None, None)  # an error would leave PEFT's hooks where they are


def _is_checkpointed(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
