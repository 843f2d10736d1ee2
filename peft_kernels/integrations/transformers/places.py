"""Where a model's attention modules are: their sites, layers, sizes and the stacks they're in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from peft_kernels.integrations.transformers.attention import own_attention, own_encoders
from peft_kernels.integrations.transformers.host import could_take_prompt
from peft_kernels.modules.names import unwrapped


class Place(NamedTuple):
    """One attention module of a model."""

    site: str  # "self", "encoder" or "cross"
    layer: int  # in the stack
    path: str
    module: nn.Module
    stack: str  # path of the module whose forward runs the layers
    kv_heads: int
    head_dim: int


def attention_places(model: nn.Module) -> list[Place]:
    """The model's attention modules that can take a prefix, by path.

    Known are those of transformers' that call the function which ``config._attn_implementation``
    names (Llama, Mistral, Qwen, GPT-2, OPT, BART, ViT and others), T5's, those of BERT's kind
    (RoBERTa, ELECTRA, ERNIE, ...), DistilBERT's, MPNet's, ModernBERT's, and ALBERT's, whose layers
    share a module, and so a prefix. docs/families.md says it of each class.

    Raises:
        ValueError: no such module, or several stacks of them that attend to the same.
    """
    places = list(_places(model))
    if not places:
        raise ValueError(
            f"model has no attention module that can take a prefix; got {type(model).__name__}"
            f"{_reasons(model)}"
        )
    _check_one_stack(model, places)
    return places


def _check_one_stack(model: nn.Module, places: list[Place]) -> None:
    """A prefix has one place for each site and layer."""
    if (twice := _same_place(places)) is None:
        return
    if parts := list(_parts(model)):
        advice = f"pass one of its parts, {' or '.join(parts)}"
    else:
        where = " and ".join(place.path for place in twice)
        advice = f"{where}, and none of its parts can take one: {_instead(model)}"
    raise ValueError(
        f"model must have one attention module a layer that takes a prefix; "
        f"{type(model).__name__} has more: {advice}"
    )


def _same_place(places: list[Place]) -> tuple[Place, Place] | None:
    """The first two that would have the same place in a prefix."""
    of_place: dict[tuple[str, int], Place] = {}
    for place in places:
        other = of_place.setdefault((place.site, place.layer), place)
        if other is not place:
            return other, place
    return None


def _parts(model: nn.Module) -> Iterator[str]:
    """The outermost modules inside that can take a prefix, by path."""
    for name, child in model.named_children():
        inside = unwrapped(child)
        if not isinstance(inside, nn.ModuleList | nn.ModuleDict) and _takes_prefix(inside):
            yield name
        else:
            yield from (f"{name}.{path}" for path in _parts(child))


def _takes_prefix(model: nn.Module) -> bool:
    places = list(_places(model))
    return bool(places) and _same_place(places) is None


def check_all_sites(model: Any) -> None:
    """Raises a ValueError if an encoder-decoder's prefix would leave out one of its three sites."""
    found = {place.site for place in attention_places(model)}
    is_of_two = getattr(getattr(model, "config", None), "is_encoder_decoder", False) and any(
        {"encoder", "decoder"} <= set(module._modules) for module in model.modules()
    )
    if is_of_two and (missing := {"encoder", "self", "cross"} - found):
        raise ValueError(
            f"sites must be given for {type(model).__name__}, whose attention at "
            f"{', '.join(sorted(missing))} can't take a prefix; sites={sorted(found)} has one at "
            "the others alone"
        )


def _reasons(model: nn.Module) -> str:
    """Why none of its modules can take a prefix, and what to do."""
    modules = list(model.modules())
    if known := sorted({type(m).__name__ for m in modules if _sizes(m) is not None}):
        return f", whose {known[0]} is in no list of layers: pass the model that holds the layers"
    attention = [m for m in modules if "Attention" in type(m).__name__]
    found = {type(m).__name__: why for m in attention if (why := why_not(m)) is not None}
    if found:
        reason = "".join(f", whose {kind} {why}" for kind, why in sorted(found.items()))
    elif all(hasattr(m, "time_decay") for m in attention):  # RWKV's is a recurrence
        reason = ", which has no attention"
    elif callers := sorted({type(m).__name__ for m in attention if _calls_a_function(m)}):
        reason = f", whose {callers[0]} doesn't say its config and the size of a head"
    else:
        reason = (
            ", whose layers compute attention in their own way, and not by a function that "
            "config._attn_implementation names"
        )
    return f"{reason}: {_instead(model)}"


def _calls_a_function(module: Any) -> bool:
    return own_attention.calls_interface(module.__class__)


def _instead(model: nn.Module) -> str:
    """What to do with a model that can't take a prefix."""
    if could_take_prompt(model):
        return "add_prompt gives it a soft prompt instead"
    if any(isinstance(module, PreTrainedModel) for module in model.modules()):
        return "it takes no soft prompt either; swap_linear gives its nn.Linear layers LoRA"
    return "pass a model of transformers', or what holds one"


def parent_path(path: str, levels: int = 1) -> str:
    """The path without its last components."""
    parts = path.split(".")
    return ".".join(parts[: len(parts) - levels])


def _places(model: nn.Module) -> Iterator[Place]:
    for path, module in model.named_modules():
        sizes = _sizes(module)
        parts = path.split(".")
        number = None if sizes is None else _number_of_layer(model, parts)
        if sizes is None or number is None:
            continue
        stack = ".".join(parts[: number - 1])
        yield Place(
            _site(model, stack, module, path), int(parts[number]), path, module, stack, *sizes
        )


def _number_of_layer(model: nn.Module, parts: list[str]) -> int | None:
    """Where in the path the layer's number is.

    It is that of the outermost list of modules: in the innermost model of transformers' that has
    one around the module, for lists outside of it hold models.
    """
    owner: Any = model
    number, looks = None, True
    for index, part in enumerate(parts):
        looks = looks or isinstance(owner, PreTrainedModel)
        if looks and part.isdecimal() and isinstance(owner, nn.ModuleList):
            number, looks = index, False
        owner = owner._modules.get(part)
    return number


def _sizes(module: Any) -> tuple[int, int] | None:
    """Key/value heads and their size, or None if it isn't an attention module that is known."""
    if own_attention.is_t5(module):
        return module.n_heads, module.key_value_proj_dim
    if own_attention.is_bert(module):
        return module.num_attention_heads, module.attention_head_size
    if (sizes := own_encoders.own_sizes(module)) is not None:
        return sizes
    if not calls_the_interface(module) or why_not(module) is not None:
        return None
    size = next(getattr(module, name) for name in _HEAD_SIZES if hasattr(module, name))
    if type(module).__name__ == "JetMoeAttention":  # it repeats its keys for each expert
        return module.num_key_value_heads * module.top_k, size
    for name in ("k_proj", "key", "k_lin"):
        layer = getattr(module, name, None)
        weight = getattr(layer, "weight", None)
        if weight is not None:
            return _rows(layer, weight) // size, size
    heads = next((h for name in _HEADS if (h := getattr(module, name, None)) is not None), None)
    if heads is None:
        heads = next(h for name in _HEADS if (h := getattr(module.config, name, None)) is not None)
    return heads, size


def _rows(layer: Any, weight: Any) -> int:
    """The outputs of a projection: its weight's rows, if those aren't packed codes."""
    width = getattr(layer, "in_features", None)
    packed = width is not None and weight.shape[-1] != width
    return layer.out_features if packed else weight.shape[0]


_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
_HEADS = ("kv_heads", "num_key_value_heads", "num_heads", "num_attention_heads")


def calls_the_interface(module: Any) -> bool:
    """Whether its forward takes its attention function from the table under the config's name."""
    kind = type(module).__name__
    if not kind.endswith("Attention") or not any(hasattr(module, name) for name in _HEAD_SIZES):
        return False
    return hasattr(module, "config") and own_attention.calls_interface(module.__class__)


def why_not(module: Any) -> str | None:
    """What an attention module does that attention with a prefix doesn't; None: nothing known."""
    config = getattr(module, "config", None)
    if hasattr(module, "prepare_dynamic_mask"):
        return "masks keys by their values"
    if getattr(module, "attn_logit_softcapping", None) is not None:
        return "caps its scores"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "caps its scores"
    if hasattr(module, "lambda_q1"):
        return "takes the difference of two attentions"
    if hasattr(module, "sinks"):
        return "attends to sinks"
    if type(module).__name__ in _SHARES_MASK and "create_causal_mask" in _globals(module):
        return "shares its mask with experts, who read it in the form that it has without a prefix"
    if type(module).__name__ in _DISENTANGLED:
        return _BY_DISTANCE
    if getattr(module, "position_embedding_type", "absolute").startswith("relative"):
        return _BY_DISTANCE
    return None


def _globals(module: Any) -> dict[str, Any]:
    """Of the module that its class is in, which has the mask functions that the model calls."""
    return vars(sys.modules[type(module).__module__])


_SHARES_MASK = ("NllbMoeAttention",)
_BY_DISTANCE = "scores each key by its distance too, which a prefix' keys don't have"
_DISENTANGLED = ("DisentangledSelfAttention", "DebertaSelfAttention", "DebertaV2SelfAttention")


def _site(model: Any, stack: str, module: Any, path: str) -> str:
    name = path.rpartition(".")[2]
    crosses = getattr(module, "is_cross_attention", False) or ".crossattention." in path
    if crosses or name in ("encoder_attn", "cross_attention", "EncDecAttention"):
        return "cross"
    owner: Any = model.get_submodule(parent_path(stack)) if stack else model
    in_encoder = stack.rpartition(".")[2] == "encoder" and hasattr(owner, "decoder")
    return "encoder" if in_encoder else "self"
