"""PEFT's LoraModel, with ``adapter_names`` in training too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, cast

import torch
from peft import LoraModel as PeftLoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import other as peft_other
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_kernels.calls.carried import Carried, is_carrying

# The thread that began the call: what compiled code finds unchanged in its next call.
_CALLER: Carried[int] = Carried("a call with adapter_names")


class LoraModel(PeftLoraModel):
    """PEFT's, but for ``adapter_names``: in training too, and in the call alone that has them.

    The layers below have a kernel for it, with gradients to the adapters that rows name. PEFT hands
    the names on by hooks, which the calls of other threads would meet as well.
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
        if not named:
            with PeftLoraModel._enable_peft_forward_hooks(self, *args, **kwargs):
                yield
            return
        # Not compiled: only what the hooks are put around is.
        hooks = torch.compiler.disable(_HandingNames)(self, args, kwargs)
        try:
            yield
        finally:
            torch.compiler.disable(hooks.end)()


class _Guarded(AuxiliaryTrainingWrapper):
    """Hooks hand it names, by which what torch.compile makes of it isn't guarded; by this it is."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            is_carrying()
        return super().forward(*args, **kwargs)


class ModulesToSaveWrapper(_Guarded, peft_other.ModulesToSaveWrapper):
    """PEFT's."""


class TrainableTokensWrapper(_Guarded, peft_other.TrainableTokensWrapper):
    """PEFT's."""


WRAPPERS: dict[type, type] = {
    peft_other.ModulesToSaveWrapper: ModulesToSaveWrapper,
    peft_other.TrainableTokensWrapper: TrainableTokensWrapper,
}


class _HandingNames:
    """PEFT's hooks, from where they are put on a model's layers to :meth:`end`."""

    def __init__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self._frame = _CALLER.enter(get_ident())
        try:
            hooks = PeftLoraModel._enable_peft_forward_hooks
            self._hooks = hooks(cast(Any, _Model(model)), *args, **kwargs)
            self._hooks.__enter__()
        except BaseException:
            _CALLER.leave(self._frame)
            raise

    def end(self) -> None:
        try:
            self._hooks.__exit__(None, None, None)
        finally:
            _CALLER.leave(self._frame)


class _Model:
    """A model as PEFT sees it when it hands names to its layers: not in training, where it refuses.

    Its modules are those that take names. PEFT walks twice over all on each call, and with several
    adapters nearly all of a model's modules are parts of layers.
    """

    training = False

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._model, name)
        if name == "model":
            return _Model(found)
        if name == "get_encoder":
            encoder = found()
            return lambda: self if encoder is self._model else encoder and _Model(encoder)
        return found

    def modules(self) -> Iterator[_Layer]:
        seen: set[nn.Module] = set()
        left: list[nn.Module | None] = [self._model]
        while left:
            module = left.pop()
            if module is None or module in seen:
                continue
            seen.add(module)
            parts, is_layer = module._modules, isinstance(module, BaseTunerLayer)
            if is_layer or isinstance(module, AuxiliaryTrainingWrapper):
                yield _Layer(module)
            left += (parts.get("base_layer"),) if is_layer else parts.values()


class _Layer:
    """One of its layers, whose hooks are of the running call."""

    _layer: Any = None

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    # isinstance() asks for it.
    __class__ = property(lambda self: type(self._layer))  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def register_forward_pre_hook(self, hook: Callable[..., Any], **options: Any) -> Any:
        caller = get_ident()

        # Without kwargs where another thread is putting its hook there, or taking it away.
        def of_this_call(module: nn.Module, args: Any, kwargs: Any = None) -> Any:
            return hook(module, args, kwargs) if _CALLER.get() == caller else None

        return self._layer.register_forward_pre_hook(of_this_call, **options)


def _is_checkpointed(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
