"""PEFT's prefix in a decoder's forward, on :func:`peft_kernels.ops.prefix_attention`.

PEFT puts the prefix into the cache of each row, and each attention concatenates it with the text's
keys. Here the model's attention modules take it beside their text, by one copy for all rows, and
the cache that a forward returns begins with it, as PEFT's does. With ``use_cache=False`` there is
none. In ``generate`` the cache has text alone until the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

KERNEL = "prefix_attention"
# In a model's __dict__: the paths of its attention modules by layer, or why they take no prefix.
PLACES = "_peft_kernels_places"


def prepare(model: Any) -> None:
    """Has the attention modules of the model ask for a prefix in each forward."""
    base = model.get_base_model()
    decodes = getattr(base.config, "is_encoder_decoder", False)
    found = model.__dict__[PLACES] = (_places_of_decoder if decodes else _places_of)(base)
    if isinstance(found, dict):
        prefix, places, _, state = _room()
        prefix.use_prefix_attention(base, places.attention_places(base), state.has_state)


def give_back(model: Any) -> None:
    """Undoes :func:`prepare`."""
    if isinstance(model.__dict__.pop(PLACES, None), dict):
        base = model.get_base_model()
        _room()[2].unpin(base)
        for module in base.modules():
            _checkpointing().stop_carrying(module)


def why_not(model: Any) -> str | None:
    """Why the model's forward is PEFT's, or None."""
    found = model.__dict__.get(PLACES, "no attention that is known")
    return found if isinstance(found, str) else None


def why_not_of(model: Any, given: dict[str, Any], strict: bool) -> str | None:
    """Why this call is PEFT's, or None.

    Under gradient checkpointing PEFT's prefix is left out by transformers 4.57, and raises an error
    with 5: what is right is for ``strict=False``.
    """
    if given.get("past_key_values") is not None or given.get("output_attentions"):
        return "other arguments"
    if given.get("return_dict") is False or given.get("cache_position") is not None:
        return "other arguments"
    base = model.get_base_model()
    decodes = getattr(base.config, "is_encoder_decoder", False)
    if decodes and any(name.endswith("head_mask") for name in given):  # sdpa leaves them out
        return "other arguments"
    if base.config.output_attentions or not getattr(base.config, "return_dict", True):
        return "other arguments"
    return "gradient checkpointing" if strict and _is_checkpointed(base) else None


def _is_checkpointed(base: Any) -> bool:
    return base.training and base.is_gradient_checkpointing


def forward(model: Any, given: dict[str, Any], of_tokens: bool = False) -> Any:
    """The model's output, or None if some attention module didn't ask for its prefix.

    Args:
        given: ``input_ids`` ``[B, S]`` and other arguments of the forward.
        of_tokens: whether positions are counted over real tokens, as ``generate`` does, and not
            over padding.
    """
    state = _room()[3]
    ids, config = given.pop("input_ids"), model.active_peft_config
    cache, base = model.get_prompt(batch_size=1), model.get_base_model()
    modules = _modules_of(model)
    pairs = {
        module: (cache.layers[i].keys[0], cache.layers[i].values[0])
        for module, i in modules.items()
    }
    mask, length = given.pop("attention_mask", None), config.num_virtual_tokens
    model._adjust_prompt_learning_kwargs(config, kwargs=given)
    if given.get("position_ids") is None:
        text = torch.arange(ids.shape[1], device=ids.device)[None]
        if of_tokens and mask is not None:
            text = (mask.long().cumsum(1) - 1).clamp(min=0)
        given["position_ids"] = text + length
    prefixes = state.Prefixes(pairs)
    if _is_checkpointed(base):
        for module in base.modules():
            _checkpointing().carry(module)
    with state.using(prefixes):
        output = model.base_model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids) if mask is None else mask,
            **given,
        )
    # A layer that runs under reentrant checkpointing asks the leaves.
    asked = prefixes if prefixes.leaves is None else prefixes.leaves
    if not all(prefixes.was_asked(module) or asked.was_asked(module) for module in modules):
        return None
    if getattr(output, "past_key_values", None) is not None:
        from peft_kernels.integrations.peft.prefix_cache import put_before

        put_before(output.past_key_values, cache, ids.shape[0])
    return output


def forward_decoder(model: Any, given: dict[str, Any]) -> Any:
    """The same for an encoder-decoder, whose decoder alone has a prefix of PEFT's.

    Positions are counted from the length of the cache, which holds the text and says it has both.
    """
    from peft_kernels.integrations.peft.prefix_cache import beside, put_before
    from peft_kernels.integrations.peft.prefixed_generate import run

    state = _room()[3]
    rows, length = given["input_ids"].shape[0], model.active_peft_config.num_virtual_tokens
    both = model.get_prompt(batch_size=1)
    before = both.self_attention_cache
    both.self_attention_cache = beside(before, length)
    modules = _modules_of(model)
    pairs = {
        module: (before.layers[i].keys[0], before.layers[i].values[0])
        for module, i in modules.items()
    }
    mask = given.pop("decoder_attention_mask", None)
    if mask is not None:
        mask = torch.cat((torch.ones(rows, length, device=mask.device), mask), dim=1)
    model._adjust_prompt_learning_kwargs(model.active_peft_config, kwargs=given)
    prefixes = state.Prefixes(pairs, in_masks=length)
    given |= {"decoder_attention_mask": mask, "past_key_values": both}
    output = run(prefixes, modules, lambda: model.base_model(**given))
    if getattr(output, "past_key_values", None) is not None:
        put_before(output.past_key_values.self_attention_cache, before, rows)
    return output


def why_not_generate(model: Any, kwargs: dict[str, Any]) -> str | None:
    """Why a call of generate is PEFT's, or None."""
    from peft_kernels.integrations.peft import prefixed_generate

    return prefixed_generate.why_not(model, kwargs)


def generate(model: Any, theirs: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """What ``theirs`` generates; see :mod:`.prefixed_generate`."""
    from peft_kernels.integrations.peft import prefixed_generate

    return prefixed_generate.generate(model, _modules_of(model), theirs, args, kwargs)


def cache_of(model: Any) -> Any:
    """The cache that PEFT is to generate with, or None: its own."""
    if not isinstance(model.__dict__.get(PLACES), dict):
        return None
    from peft_kernels.integrations.peft import prefixed_generate

    return prefixed_generate.cache_of(model)


def _modules_of(model: Any) -> dict[nn.Module, int]:
    """The attention modules that take a prefix, and their layers."""
    base = model.get_base_model()
    return {base.get_submodule(path): i for i, path in model.__dict__[PLACES].items()}


def _places_of_decoder(base: nn.Module) -> dict[int, str] | str:
    """The same in an encoder-decoder, whose decoder has the prefix."""
    if any(hasattr(part, "has_relative_attention_bias") for part in base.modules()):
        return "a prefix' scores with a bias"  # T5's, for which the op has no place
    try:
        places = _room()[1]
        found = places.attention_places(base)
    except (ImportError, ValueError):
        return "no attention that is known"
    of_decoder = [place for place in found if place.site == "self"]
    if not of_decoder or not all(places.calls_the_interface(place.module) for place in of_decoder):
        return "another kind of attention"
    return {place.layer: place.path for place in of_decoder}


def _places_of(base: nn.Module) -> dict[int, str] | str:
    """The attention modules by layer, or why they take no prefix of PEFT's."""
    try:
        prefix, places, _, _ = _room()
    except ImportError:
        return f"transformers {transformers.__version__}"
    try:
        found = places.attention_places(base)
    except ValueError:
        return "no attention that is known"
    config: Any = getattr(base, "config", None)
    if prefix.window_of(base) is not None:
        return "attention in a window"
    if getattr(config, "attn_logit_softcapping", None) or any(
        hasattr(place.module, "sinks") for place in found
    ):
        return "attention with caps or sinks"
    calls: Callable[[nn.Module], bool] = places.calls_the_interface
    if not all(place.site == "self" and calls(place.module) for place in found):
        return "another kind of attention"
    if not prefix.shifts_positions(base, found, None):
        return "positions that aren't given"
    return {place.layer: place.path for place in found}


def _checkpointing() -> Any:
    from peft_kernels.integrations.transformers.attention import checkpointing

    return checkpointing


def _room() -> tuple[Any, Any, Any, Any]:
    """What puts prefixes into transformers' models, which asks for a version of that."""
    from peft_kernels.integrations.transformers import places, prefix
    from peft_kernels.integrations.transformers.attention import pinned, prefixed

    return prefix, places, pinned, prefixed
