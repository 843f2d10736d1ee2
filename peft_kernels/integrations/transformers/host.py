"""Which module, of what a user holds, a prefix or a prompt goes into: the model in its wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_kernels.integrations.transformers.forwards import needs_tokens, parameters
from peft_kernels.modules.bases import fault_of_place, is_placeholder
from peft_kernels.modules.hooks import PREFIX_HOOK, PROMPT_HOOK
from peft_kernels.modules.names import plain_name, unwrapped

_WORDS = {PREFIX_HOOK: "prefix", PROMPT_HOOK: "prompt"}
# They reduce or shard the parameters that they were built with, and no others.
_BUILT_ON_PARAMETERS = (
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
    "DeepSpeedEngine",
)


def host_of(model: nn.Module, hook: str) -> nn.Module:
    """The model to add to: what torch.compile or DataParallel wraps, or the module itself.

    Args:
        model: what the user gave.
        hook: of the kind to add, :data:`PREFIX_HOOK` or :data:`PROMPT_HOOK`.

    Raises:
        ValueError: it has a prefix or a prompt already, or a wrapper to whose parameters none can
            be added.
        TypeError: as of :func:`check_no_placeholders`.
    """
    word = _WORDS[hook]
    check_no_placeholders(model)
    for path, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in _BUILT_ON_PARAMETERS:
                raise ValueError(
                    f"model must get its {word} before {kind.__name__} wraps it, which knows only "
                    f"the parameters it was built with: add the {word} to the model itself, and "
                    f"wrap it then; {kind.__name__} is at {path or 'the top'!r}"
                )
        for other, name in _WORDS.items():
            if other in module.__dict__:
                raise ValueError(
                    f"model has a {name} already; remove_{name} takes it out"
                    if other == hook
                    else f"model has a {name}, and can't have a {word} besides it"
                )
    return unwrapped(model)


def check_no_placeholders(model: nn.Module) -> None:
    """Raises a TypeError that names the first parameter that DeepSpeed's ZeRO-3 took away."""
    for name, parameter in model.named_parameters():
        if is_placeholder(parameter):
            raise TypeError(f"{plain_name(model, name)} {fault_of_place(parameter)}")


def having(model: nn.Module, hook: str) -> nn.Module:
    """The module that has the prefix or the prompt: the model, or one inside of it.

    Raises:
        ValueError: there is none, or more than one.
    """
    if hook in model.__dict__:
        return model
    word = _WORDS[hook]
    found = {path: module for path, module in model.named_modules() if hook in module.__dict__}
    if not found:
        raise ValueError(f"model has no {word}; add_{word} gives it one")
    if len(found) > 1:
        raise ValueError(f"model must have one {word}; it has one at each of {', '.join(found)}")
    return next(iter(found.values()))


def prompt_host(model: nn.Module) -> nn.Module:
    """The model to add a prompt to: that of transformers' whose embeddings it is put among.

    Raises:
        ValueError: as of :func:`host_of`, and where no model or more than one could take it.
    """
    model = host_of(model, PROMPT_HOOK)
    why_not = _why_no_prompt(model)
    if why_not is None:
        return model
    found = dict(_inner_hosts(model))
    if len(found) == 1:
        return next(iter(found.values()))
    kind = type(model).__name__
    if found:
        raise ValueError(
            f"model must be the one that takes the prompt; {kind} holds several: {', '.join(found)}"
        )
    raise ValueError(f"model must be a text model of transformers'; {kind} {why_not}")


def could_take_prompt(model: nn.Module) -> bool:
    """Whether :func:`prompt_host` finds a model in it that computes with a prompt."""
    model = unwrapped(model)
    found = [model] if _why_no_prompt(model) is None else list(dict(_inner_hosts(model)).values())
    try:
        check_takes_embeddings(found[0])
    except (IndexError, ValueError):
        return False
    return len(found) == 1


def _inner_hosts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that could take a prompt, by path."""
    for name, child in model.named_children():
        inside = unwrapped(child)
        if _why_no_prompt(inside) is None:
            yield name, inside
        else:
            yield from ((f"{name}.{path}", inner) for path, inner in _inner_hosts(child))


def _why_no_prompt(model: Any) -> str | None:
    for name in ("get_input_embeddings", "can_generate"):
        if not callable(getattr(model, name, None)):
            return f"has no {name}()"
    passes_on = not isinstance(model, PreTrainedModel)  # as PEFT's models do
    if "inputs_embeds" not in parameters(model.__class__) and not passes_on:
        return "takes no inputs_embeds, where a prompt would stand"
    if needs_tokens(model.__class__):
        return "needs input_ids, in whose place a prompt's embeddings would be given"
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError) as error:
        return f"gives no input embeddings ({error})"
    if not isinstance(embedding, nn.Module):
        return "gives no input embeddings"
    if not isinstance(embedding, nn.Embedding) and not _gives_a_tensor(embedding):
        return f"has embeddings that give more than a tensor ({type(embedding).__name__})"
    return None


@torch.no_grad()
def _gives_a_tensor(embedding: nn.Module) -> bool:
    weight = next(embedding.parameters(), None)
    if weight is None:
        return False
    try:
        made = embedding(torch.zeros(1, 1, dtype=torch.long, device=weight.device))
    except (RuntimeError, TypeError, ValueError):  # it isn't one of tokens
        return False
    return isinstance(made, torch.Tensor)


def check_takes_embeddings(model: Any) -> None:
    """Raises a ValueError unless the model computes with embeddings what it does with tokens."""
    kind = type(model).__name__
    in_encoder = getattr(model.config, "is_encoder_decoder", False)
    if does := _does_with_tokens_alone(model.base_model):
        raise ValueError(
            f"model must compute with inputs_embeds, where a prompt stands, what it does with "
            f"input_ids; {kind} {does} of tokens alone"
        )
    if in_encoder and "encoder_attention_mask" not in parameters(model.get_decoder().__class__):
        raise ValueError(
            f"model must have a decoder that takes an encoder_attention_mask, which counts the "
            f"prompt's places; that of {kind} takes none"
        )


def _does_with_tokens_alone(base: Any) -> str | None:
    """What some models leave out where they are given embeddings; None: nothing known."""
    if getattr(base, "embed_layer_norm", None) is not None:
        return "normalises the embeddings"
    if type(base).__name__ == "EsmModel":
        embeddings = base.embeddings
        if embeddings.token_dropout:
            return "scales the embeddings (token_dropout)"
        if base.config.position_embedding_type == "absolute":
            return "adds positions to the embeddings"
        if embeddings.layer_norm is not None:
            return "normalises the embeddings"
    return None
