"""Lets gradients reach what trains inside a frozen model under reentrant checkpointing.

``torch.utils.checkpoint(..., use_reentrant=True)`` differentiates a block only if one of its inputs
requires gradients. Behind frozen embeddings none does, and with a head that trains beside the
adapters nothing raises: the adapters get no gradient. ``transformers`` has
``enable_input_require_grads`` for it, which PEFT calls; the hooks here do the same at each forward
that needs it, so that checkpointing may be turned on before or after the swap. They have what runs
again know, too, which adapters were off.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.calls.off import CarriesOff
from peft_kernels.codes.layers import give_back, keep_codes

_FUNCTION = "_gradient_checkpointing_func"
_FLAG = "gradient_checkpointing"  # transformers' name for "this block is checkpointed"


def let_gradients_through(model: nn.Module) -> None:
    """Has the embeddings of a model of transformers' require gradients where that is needed.

    And layers in codes go on handing them to their input (:func:`keep_codes`).
    """
    keep_codes(model)
    blocks = [module for module in model.modules() if hasattr(module, _FLAG)]
    if not blocks:
        return
    for host in list(model.modules()):
        embeddings = embeddings_of(host)
        if embeddings is None:
            continue
        if not _has(embeddings._forward_hooks, _AskOfOutput):
            embeddings.register_forward_hook(_AskOfOutput(blocks))
        if not _has(host._forward_pre_hooks, _AskOfInput):
            host.register_forward_pre_hook(_AskOfInput(blocks), with_kwargs=True)


def let_gradients_be(model: nn.Module) -> None:
    """Undoes :func:`let_gradients_through` in a model without adapters."""
    give_back(model)
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _Ask):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
        if type(function := module.__dict__.get(_FUNCTION)) is CarriesOff:
            module.__dict__[_FUNCTION] = function.checkpoint


def embeddings_of(host: nn.Module, method: str = "get_input_embeddings") -> nn.Module | None:
    """What a model of transformers' says its embeddings are; None of any other module."""
    find: Any = getattr(host, method, None)
    try:
        found = find() if find else None
    except (AttributeError, NotImplementedError):  # a part without embeddings of its own
        return None
    return found if isinstance(found, nn.Module) else None


def _has(hooks: dict, kind: type) -> bool:
    return any(isinstance(hook, kind) for hook in hooks.values())


class _Ask:
    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks

    def is_needed(self, x: object) -> bool:
        """Whether this tensor, which requires no gradients, must for blocks that are run twice."""
        if not isinstance(x, Tensor) or x.requires_grad or not x.is_floating_point():
            return False
        return torch.is_grad_enabled() and any(self._reentrant())

    def _reentrant(self) -> Iterator[bool]:
        for block in self.blocks:
            if getattr(block, _FLAG) and block.training:
                function: Any = getattr(block, _FUNCTION, None)
                yield bool(getattr(function, "keywords", {}).get("use_reentrant", True))


class _AskOfOutput(_Ask):
    """Forward hook of embeddings."""

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return output.detach().requires_grad_() if self.is_needed(output) else None


class _AskOfInput(_Ask):
    """Forward pre-hook of a model, which may be given embeddings."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._carry()
        given: Any = kwargs.get("inputs_embeds")
        if not self.is_needed(given):
            return None
        return args, kwargs | {"inputs_embeds": given.detach().requires_grad_()}

    def _carry(self) -> None:
        for block in self.blocks:
            function = block.__dict__.get(_FUNCTION)
            if function is not None and not isinstance(function, CarriesOff):
                block.__dict__[_FUNCTION] = CarriesOff(function)
