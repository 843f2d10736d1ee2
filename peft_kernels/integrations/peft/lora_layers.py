"""PEFT's LoRA layers on this package's kernels: subclasses that a layer's class is set to.

A layer keeps all that it is (parameters, state dict, hooks, what PEFT's tools do to it), but for
``forward``. That looks at the layer on every call, since PEFT changes layers in place, and gives
what no kernel serves to PEFT's own ``forward``.
"""

from __future__ import annotations

from typing import Any

from peft import LoraModel as PeftLoraModel
from peft.tuners.lora import layer as peft_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_kernels._library import backend_of
from peft_kernels.integrations.peft.codes import layers as over_codes
from peft_kernels.integrations.peft.dora import NORMS
from peft_kernels.integrations.peft.embedding import Embedding, read_factors
from peft_kernels.integrations.peft.linear import KERNEL, linear
from peft_kernels.integrations.peft.lora_model import WRAPPERS, LoraModel
from peft_kernels.integrations.peft.plain import read_plain
from peft_kernels.integrations.peft.state import (
    Adapter,
    Base,
    read,
    read_adapters,
    read_base,
    why_not_in,
)
from peft_kernels.integrations.served import CALLS, count
from peft_kernels.ops.lora_linear import lora_linear_plain

LIBRARY = "PEFT"


class Linear(peft_lora.Linear):
    """PEFT's ``lora.Linear`` on :func:`peft_kernels.ops.lora_linear`.

    ``y = x W^T + b + sum_j scale_j dropout_j(x) A_j^T B_j^T`` over the active adapters j, with one
    pass over W. With ``adapter_names`` each row has its own, by
    :func:`peft_kernels.ops.multi_lora_linear`. An adapter with DoRA takes
    :func:`peft_kernels.ops.dora_linear`.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = None if args or kwargs else read_plain(self, x)
        if plain is None:
            return self._forward_as_found(x, *args, **kwargs)
        count(self, KERNEL)
        return lora_linear_plain(x, *plain)

    def _forward_as_found(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.get("adapter_names")
        if args or len(kwargs) > (names is not None):
            found: tuple[Base, list[Adapter]] | str = "other arguments"
        else:
            found = read(self, x, names)
        if isinstance(found, str):
            count(self, found)
            return super().forward(x, *args, **kwargs)
        return linear(self, x, *found, names)


# The classes of PEFT's, and what takes their places.
SERVED: dict[type, type] = {
    peft_lora.Linear: Linear,
    peft_lora.Embedding: Embedding,
    PeftLoraModel: LoraModel,
    **WRAPPERS,
    **over_codes.SERVED,
}
_OWN = {ours: theirs for theirs, ours in (*SERVED.items(), *over_codes.PLAIN.items())}


# ---- what accelerate() asks --------------------------------------------------------------------


def is_layer(module: nn.Module) -> bool:
    """Whether this is a layer of PEFT's, with adapters of any method."""
    return isinstance(module, BaseTunerLayer)


def is_new(module: nn.Module) -> bool:
    """Whether :func:`serve` would put kernels under a module."""
    return type(module) in SERVED


def kind_of(layer: nn.Module) -> str:
    """The layer's class as PEFT prints it."""
    kind = _OWN.get(type(layer), type(layer))
    return f"{kind.__module__.split('.')[-2]}.{kind.__name__}"


def serve(module: nn.Module, strict: bool = True) -> None:
    """Puts kernels under a module, if there are any for its class."""
    if is_new(module):
        module.__class__ = over_codes.class_for(module) or SERVED[type(module)]


def restore(module: nn.Module) -> None:
    """Takes them away again."""
    if type(module) in _OWN:
        module.__class__ = _OWN[type(module)]
        module.__dict__.pop(CALLS, None)
        module.__dict__.pop(NORMS, None)


def calls(layer: nn.Module) -> dict[str, int]:
    """How many calls took which way."""
    return layer.__dict__.get(CALLS, {})


def backend(layer: Any) -> str:
    """What serves the layer's calls: ``"torch"`` is no kernel."""
    if isinstance(layer, Embedding):
        return "torch"
    if over_codes.is_served(layer):
        return over_codes.backend(layer)
    weight = layer.get_base_layer().weight
    return backend_of(KERNEL, weight.device, weight.dtype)


def why_not(layer: Any) -> str | None:
    """Why a call with x alone would be PEFT's own, or None if kernels would serve it.

    As if the layer was neither merged nor disabled, which is for a while.
    """
    if type(layer) not in _OWN:
        return kind_of(layer)
    if "forward" in layer.__dict__:
        return "another forward"
    if isinstance(layer, Embedding):
        factors = read_factors(layer)
        return factors if isinstance(factors, str) else None
    if over_codes.is_served(layer):
        return over_codes.why_not(layer)
    base = read_base(layer)
    if isinstance(base, str):
        return base
    adapters = read_adapters(layer, layer.active_adapters)
    if isinstance(adapters, str):
        return adapters
    return why_not_in(base.weight.dtype, adapters)
