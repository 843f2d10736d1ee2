"""Which module, of what a user holds, a prefix or a prompt goes into: the model in its wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_kernels._names import unwrapped
from peft_kernels.integrations._hooks import PREFIX_HOOK, PROMPT_HOOK, parameters

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
    """
    word = _WORDS[hook]
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
