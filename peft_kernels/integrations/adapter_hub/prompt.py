"""The prompts of `adapters` on this package's lookup: one pass puts them before the text."""

from __future__ import annotations

from typing import Any

import torch
from adapters.context import ForwardContext
from adapters.methods.prompt_tuning import PromptTuning
from adapters.methods.prompt_tuning import PromptTuningLayer as TheirPromptTuningLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from peft_kernels.integrations.served import count, is_plain, is_whole, what_is_called
from peft_kernels.ops.prompt_lookup import prompt_lookup

KERNEL = "prompt_lookup"
_FIRST = {"prefix": 0, "prefix_after_bos": 1}  # the prompt's first place


class PromptTuningLayer(TheirPromptTuningLayer):
    """``[prompt; embeddings]``, or behind the first token, of the setup's first adapter."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        setup, prompts = self.get_active_setup(), self._modules["prompt_tunings"]
        if setup is None or len(setup) == 0 or setup.first() not in prompts:
            return super().forward(hidden_states)
        prompt = prompts[setup.first()]
        reason = why_not(prompt) or _why_not_of(prompt, hidden_states)
        if reason is not None:
            count(self, reason)
            return super().forward(hidden_states)
        count(self, KERNEL)
        weight, first = prompt.prompt_embedding.weight, _FIRST[prompt.prompt_tuning_config.combine]
        context = ForwardContext.get_context()
        if context is not None:
            context.prompt_tokens_length = weight.shape[0]
        places = torch.arange(first, first + weight.shape[0], device=hidden_states.device)
        position = places.expand(hidden_states.shape[0], -1) if first else "front"
        return prompt_lookup(hidden_states, weight, position=position).embeddings


SERVED: dict[type, type] = {TheirPromptTuningLayer: PromptTuningLayer}
OWN = {PromptTuningLayer: TheirPromptTuningLayer}


def why_not(prompt: Any) -> str | None:
    """Why a prompt is theirs to put before a text, or None."""
    kinds = (PromptTuning,)
    if type(prompt) is not PromptTuning or not is_plain(prompt) or _has_any_global_hook():
        return f"prompt: {what_is_called(prompt, kinds)}"
    embedding = prompt.prompt_embedding
    if type(embedding) is not nn.Embedding or not is_plain(embedding):
        return f"prompt_embedding: {what_is_called(embedding, (nn.Embedding,))}"
    if not is_whole(embedding._parameters.get("weight"), 2) or embedding.max_norm is not None:
        return "prompt_embedding: another embedding"
    return None if prompt.prompt_tuning_config.combine in _FIRST else "another place"


def _why_not_of(prompt: Any, x: Tensor) -> str | None:
    weight = prompt.prompt_embedding.weight
    if weight.dtype is not x.dtype:
        return f"x in {x.dtype} for a prompt in {weight.dtype}"
    return "no text" if x.dim() != 3 or x.shape[1] == 0 else None
