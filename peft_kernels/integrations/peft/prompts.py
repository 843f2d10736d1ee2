"""PEFT's prompt methods: which of their parts are served, and what else accelerate() asks."""

from __future__ import annotations

from typing import Any

from peft import PeftModel, PeftType
from peft.tuners.p_tuning import PromptEncoder
from peft.tuners.prefix_tuning import PrefixEncoder
from torch import nn

from peft_kernels._library import backend_of
from peft_kernels.integrations.encoded_once import KEPT
from peft_kernels.integrations.peft import prefixed, prompt_encoders, prompted
from peft_kernels.integrations.served import CALLS

LIBRARY = "PEFT"
SERVED = prompt_encoders.SERVED | prompted.SERVED
_ENCODERS = (PrefixEncoder, PromptEncoder)
OWN = {ours: theirs for theirs, ours in SERVED.items()}


def is_layer(module: nn.Module) -> bool:
    """Whether this is an encoder of prompts or prefixes, or a model that has one's output."""
    if isinstance(module, PeftModel):
        return getattr(module.active_peft_config, "is_prompt_learning", False)
    return isinstance(module, _ENCODERS)


def is_new(module: nn.Module) -> bool:
    """Whether :func:`serve` would change a module."""
    return type(module) in SERVED and is_layer(module)


def kind_of(layer: nn.Module) -> str:
    """The layer's class as PEFT has it."""
    kind = OWN.get(type(layer), type(layer))
    room = kind.__module__.removesuffix(".model").split(".")[-1]
    return f"{room}.{kind.__name__}"


def serve(module: nn.Module, strict: bool) -> None:
    """Puts what there is in a module's place."""
    if is_new(module):
        module.__class__ = SERVED[type(module)]
    if type(module) is prompted.PeftModelForCausalLM:
        prompted.set_strict(module, strict)
    if isinstance(module, prompted.PeftModelForCausalLM | prompted.PeftModelForSeq2SeqLM):
        config: Any = module.active_peft_config
        if config.peft_type == PeftType.PREFIX_TUNING:
            prefixed.prepare(module)


def restore(module: nn.Module) -> None:
    """Takes it away again."""
    if prefixed.PLACES in module.__dict__:
        prefixed.give_back(module)
    if type(module) in OWN:
        module.__class__ = OWN[type(module)]
        for name in (CALLS, prompted.FREE, KEPT):
            module.__dict__.pop(name, None)


def calls(layer: nn.Module) -> dict[str, int]:
    """How many calls took which way."""
    return layer.__dict__.get(CALLS, {})


def backend(layer: Any) -> str:
    """What serves the layer's calls; an encoder's own products are PyTorch's."""
    if isinstance(layer, _ENCODERS):
        return "torch"
    weight = layer.word_embeddings.weight
    kernel = prefixed.KERNEL if prefixed.PLACES in layer.__dict__ else prompted.KERNEL
    return backend_of(kernel, weight.device, weight.dtype)


def why_not(layer: Any) -> str | None:
    """Why a call is PEFT's, or None."""
    if type(layer) not in OWN:
        return kind_of(layer)
    if "forward" in layer.__dict__:
        return "another forward"
    room = prompt_encoders if isinstance(layer, _ENCODERS) else prompted
    return room.why_not(layer)
