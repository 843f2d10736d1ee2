"""PEFT's LoraModel, with ``adapter_names`` in training too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraModel as PeftLoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class LoraModel(PeftLoraModel):
    """PEFT's, but for one refusal: ``adapter_names`` in training.

    The layers below have a kernel for it, with gradients to the adapters that rows name.
    """

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        named = kwargs.get("adapter_names") is not None
        if named and self.training and _is_checkpointed(self):
            raise ValueError(
                "adapter_names can't be given in training with gradient checkpointing, which calls "
                "layers again in the backward, without the names: first call "
                "gradient_checkpointing_disable()"
            )
        model: Any = _Layers(self) if named else self
        hooks = PeftLoraModel._enable_peft_forward_hooks(model, *args, **kwargs)
        hooks.__enter__()
        try:
            yield
        finally:
            hooks.__exit__(None, None, None)  # an error would leave PEFT's hooks where they are


class _Layers:
    """A model as PEFT sees it when it hands names to its layers: not in training, where it refuses.

    Its modules are those without the parts of layers: with several adapters nearly all of a model's
    modules are parts, and PEFT walks twice over all on each call.
    """

    training = False

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def modules(self) -> Iterator[nn.Module]:
        seen: set[nn.Module] = set()
        left: list[nn.Module | None] = [self._model]
        while left:
            module = left.pop()
            if module is None or module in seen:
                continue
            seen.add(module)
            yield module
            parts = module._modules
            is_layer = isinstance(module, BaseTunerLayer)
            left += (parts.get("base_layer"),) if is_layer else parts.values()


def _is_checkpointed(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
