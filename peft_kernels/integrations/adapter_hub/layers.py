"""The layers of `adapters`: which of them kernels serve, and what else accelerate() asks."""

from __future__ import annotations

from typing import Any

from adapters.methods.adapter_layer_base import AdapterLayerBase
from adapters.methods.bottleneck import BottleneckLayer
from torch import nn

from peft_kernels._library import backend_of
from peft_kernels.integrations.adapter_hub import (
    attention,
    bottleneck,
    lora,
    prefix,
    prompt,
    stand_in,
)
from peft_kernels.integrations.adapter_hub.bottleneck_state import why_not as why_not_bottleneck
from peft_kernels.integrations.adapter_hub.fusion import KEPT
from peft_kernels.integrations.encoded_once import KEPT as KEPT_PREFIX
from peft_kernels.integrations.served import CALLS

LIBRARY = "adapters"


def is_layer(module: nn.Module) -> bool:
    """Whether this is a layer of theirs that has an adapter, or the encoder of a prefix."""
    if isinstance(module, prefix.ENCODERS):
        return True
    return isinstance(module, AdapterLayerBase) and bool(module.adapter_modules)


def is_new(module: nn.Module) -> bool:
    """Whether :func:`serve` would put kernels under a module."""
    return is_layer(module) and _served_class(type(module)) is not None


def kind_of(layer: nn.Module) -> str:
    """The layer's class, after the file that it is in."""
    kind = _own_class(type(layer))
    return f"{kind.__module__.split('.')[-1]}.{kind.__name__}"


def serve(module: nn.Module, strict: bool = True) -> None:
    """Puts kernels under a module, if there are any for its class."""
    if is_new(module):
        module.__class__ = _served_class(type(module))
    attention.serve(module, strict)


def restore(module: nn.Module) -> None:
    """Takes them away again."""
    own = _own_class(type(module))
    if own is not type(module):
        module.__class__ = own
        for name in (CALLS, KEPT, KEPT_PREFIX, prefix.SETTING):
            module.__dict__.pop(name, None)


def calls(layer: nn.Module) -> dict[str, int]:
    """How many calls took which way."""
    return layer.__dict__.get(CALLS, {})


def backend(layer: Any) -> str:
    """What serves the layer's calls; an encoder's products are PyTorch's."""
    if isinstance(layer, prefix.ENCODERS):
        return "torch"
    kernel = bottleneck.KERNEL
    for room in (lora, prompt):
        kernel = room.KERNEL if type(layer) in room.OWN else kernel
    if isinstance(layer, prefix.PrefixTuningLayer):
        kernel, name = attention.KERNEL, next(iter(layer.prefixes))
        weight = next(layer.pool.prefix_tunings[name].parameters())
    else:
        weight = next(_adapters_of(layer)[0][1].parameters())
    return backend_of(kernel, weight.device, weight.dtype)


def why_not(layer: Any) -> str | None:
    """Why a call with the layer's active adapters would be theirs, or None if kernels serve it.

    Where none is active it is about all.
    """
    if _own_class(type(layer)) is type(layer):
        return kind_of(layer)
    if isinstance(layer, prefix.PrefixTuningLayer):
        return attention.why_not(layer)
    if isinstance(layer, prefix.ENCODERS):
        return prefix.why_not(layer)
    has_own_forward = type(layer) in lora.OWN or type(layer) in prompt.OWN
    if has_own_forward and "forward" in layer.__dict__:
        return "another forward"
    return next(
        filter(None, (_why_not_adapter(layer, *each) for each in _adapters_of(layer))), None
    )


def _why_not_adapter(layer: Any, name: str, adapter: Any) -> str | None:
    """The same, of one of its adapters."""
    if type(layer) in lora.OWN:
        found = lora.read_adapter(adapter, name)
        return found if isinstance(found, str) else None
    return prompt.why_not(adapter) if type(layer) in prompt.OWN else why_not_bottleneck(adapter)


def _adapters_of(layer: Any) -> list[tuple[str, nn.Module]]:
    """The adapters of the layer that are active, or if none is, all."""
    modules, setup = layer.adapter_modules, layer.get_active_setup()
    active = [] if setup is None else [name for name in modules if name in setup.flatten()]
    return [(name, modules[name]) for name in active or modules]


def _served_class(kind: Any) -> Any:
    """The class to put in this one's place, or None."""
    if issubclass(kind, BottleneckLayer) and not issubclass(kind, bottleneck.Served):
        return stand_in.served_class(bottleneck.Served, kind)
    return lora.SERVED.get(kind) or prefix.SERVED.get(kind) or prompt.SERVED.get(kind)


def _own_class(kind: Any) -> Any:
    """The library's own class that this one stands for."""
    own = lora.OWN.get(kind) or prefix.OWN.get(kind) or prompt.OWN.get(kind)
    return own or stand_in.own_class(kind)
