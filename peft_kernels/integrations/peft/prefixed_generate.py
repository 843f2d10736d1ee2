"""PEFT's prefix in generate: beside the text of the cache in each step, one copy for all rows.

PEFT asks its model for a cache that begins with the prefix of each row, before the first step. Here
that is a cache of text alone, which counts the prefix, while the attention modules take the prefix
from the running call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

from peft_kernels.integrations.peft.prefix_cache import beside, put_before
from peft_kernels.integrations.served import count
from peft_kernels.integrations.transformers.attention.prefixed import (
    Pair,
    Prefixes,
    current_state,
    using,
)

KERNEL = "prefix_attention"
# What may call the model besides the steps, have another cache or want the probabilities.
_OTHERS = (
    "assistant_model",
    "cache_implementation",
    "custom_generate",
    "dola_layers",
    "guidance_scale",
    "logits_processor",
    "negative_prompt_ids",
    "output_attentions",
    "past_key_values",
    "penalty_alpha",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "stopping_criteria",
)


class Generated(Prefixes):
    """The prefixes of a call of generate, from where PEFT asks for the cache that has them.

    Args:
        model: PEFT's, whose generate it is.
        cache: of the prefix, of one row.
        pairs: attention module -> keys and values ``[Hkv, L, D]``.
        length: L.
    """

    def __init__(
        self, model: nn.Module, cache: Any, pairs: dict[nn.Module, Pair], length: int
    ) -> None:
        super().__init__({})
        self.model: Any = model
        self.cache, self.found = cache, (pairs, length)

    def begin(self) -> Any:
        """The cache of text alone, which the attention modules have the prefix beside from now."""
        self.pairs, self.in_masks = self.found
        return beside(self.cache, self.in_masks)


def why_not(model: Any, kwargs: dict[str, Any]) -> str | None:
    """Why a call of generate with these arguments is PEFT's, or None."""
    base = model.get_base_model()
    if getattr(model, "_adapters_disabled", False):
        return "disabled"
    if base.config.is_encoder_decoder and "cache_position" in signature(base.forward).parameters:
        return "generate, whose positions hide the prefix"  # they are the text's alone
    configs = [kwargs.get("generation_config"), base.generation_config]

    def value(name: str) -> Any:
        if kwargs.get(name) is not None:
            return kwargs[name]
        return next((x for c in configs if (x := getattr(c, name, None)) is not None), None)

    others = {name: value(name) for name in _OTHERS}
    others["guidance_scale"] = others["guidance_scale"] not in (None, 1)
    trains = base.training and base.is_gradient_checkpointing
    served = not any(others.values()) and value("use_cache") is not False and not trains
    return None if served else "generate with other arguments"


def generate(
    model: Any,
    modules: dict[nn.Module, int],
    theirs: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """What ``theirs`` generates, or None if some attention module didn't ask for its prefix.

    Args:
        modules: attention modules and their layers.
    """
    cache = model.get_prompt(batch_size=1)
    cache = getattr(cache, "self_attention_cache", cache)
    pairs = {
        module: (cache.layers[i].keys[0], cache.layers[i].values[0])
        for module, i in modules.items()
    }
    generated = Generated(model, cache, pairs, model.active_peft_config.num_virtual_tokens)
    output = run(generated, modules, lambda: theirs(model, *args, **kwargs))
    if output is None or not generated.pairs:
        return output
    count(model, KERNEL)
    found = getattr(output, "past_key_values", None)
    if found is not None:
        found = getattr(found, "self_attention_cache", found)
        put_before(found, cache, found.layers[0].keys.shape[0])
    return output


def run(prefixes: Prefixes, modules: Iterable[nn.Module], call: Callable[[], Any]) -> Any:
    """What a call gives, or None if some attention module didn't ask for its prefix.

    Without the prefix such a module may find its mask too long, which is no error of the call.
    """
    try:
        with using(prefixes):
            output = call()
    except RuntimeError:
        if all(map(prefixes.was_asked, modules)):
            raise
        return None
    return output if all(map(prefixes.was_asked, modules)) else None


def cache_of(model: Any) -> Any:
    """The cache that a model's generate begins with, or None outside of one that is served."""
    state = current_state()
    if not isinstance(state, Generated) or state.model is not model:
        return None
    text = state.begin()
    decodes = getattr(model.get_base_model().config, "is_encoder_decoder", False)
    return EncoderDecoderCache(text, DynamicCache()) if decodes else text
