"""PEFT's models with a soft prompt, on this package's lookup.

``[prompt; embeddings]``, its mask and its labels are one call of
:func:`peft_kernels.ops.prompt_lookup`. With ``strict=False`` a prompt stands directly before the
text of a row that is padded on the left, where PEFT leaves the padding between them, and positions
are counted over real tokens, behind a prefix too.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import peft
import torch
from peft import PeftType
from torch import Tensor

from peft_kernels.integrations.peft import prefixed
from peft_kernels.integrations.served import count
from peft_kernels.ops.prompt_lookup import prompt_lookup

KERNEL = "prompt_lookup"
NOT_ASKED = "an attention that asks for no prefix"
# In a model's __dict__ with strict=False: whether it takes position ids that count from 0.
FREE = "_peft_kernels_positions"
_TYPES = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)
_OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict")


def _forward(theirs: Callable[..., Any], labels: bool = True, classifies: bool = False) -> Any:
    """A model's forward in place of ``theirs``.

    Args:
        labels: whether the model takes labels.
        classifies: whether these are of rows or tokens of the text, without the prompt's.
    """

    @functools.wraps(theirs)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs}
        reason = why_not(self) or _why_not_of(args, given)
        if reason is not None:
            count(self, reason)
            return theirs(self, *args, **kwargs)
        if self.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
            return _forward_with_prefix(self, theirs, args, kwargs, given)
        count(self, KERNEL)
        ids, mask = given.pop("input_ids"), given.pop("attention_mask", None)
        names = ("labels", *_OUTPUTS) if labels else _OUTPUTS
        asked = {name: given.pop(name, None) for name in names}
        given.pop("inputs_embeds", None), given.pop("task_ids", None)
        if classifies and asked["return_dict"] is None:
            asked["return_dict"] = _returns_dict(self.config)
        self._adjust_prompt_learning_kwargs(
            self.active_peft_config, kwargs=given, remove_token_type_ids=not classifies
        )
        found = prompt_lookup(
            self.word_embeddings(ids),
            self.get_prompt(batch_size=1)[0],
            attention_mask=mask,
            labels=None if classifies else asked.get("labels"),
            position="after_padding" if is_free(self) and mask is not None else "front",
        )
        if not classifies and labels:
            asked["labels"] = found.labels
        if given.get("token_type_ids") is not None:
            given["token_type_ids"] = _lengthened(given["token_type_ids"], found.embeddings)
        if self.__dict__.get(FREE):
            given["position_ids"] = found.position_ids
        return self.base_model(
            inputs_embeds=found.embeddings,
            attention_mask=None if mask is None else found.attention_mask.float(),
            **asked,
            **given,
        )

    return forward


def _forward_with_prefix(
    model: Any, theirs: Callable[..., Any], args: tuple, kwargs: dict, given: dict
) -> Any:
    given = {key: value for key, value in given.items() if value is not None}
    reason = prefixed.why_not_of(model, given, strict=not is_free(model))
    if reason is None:
        if isinstance(model, PeftModelForSeq2SeqLM):
            output = prefixed.forward_decoder(model, given)
        else:
            output = prefixed.forward(model, given, of_tokens=model.__dict__.get(FREE, False))
        if output is not None:
            count(model, prefixed.KERNEL)
            return output
        reason = NOT_ASKED
    count(model, reason)
    return theirs(model, *args, **kwargs)


class PeftModelForCausalLM(peft.PeftModelForCausalLM):
    """PEFT's, with the prompt put before the text by a kernel."""

    forward = _forward(peft.PeftModelForCausalLM.forward)

    def get_prompt(self, *args: Any, **kwargs: Any) -> Any:
        found = prefixed.cache_of(self)
        return super().get_prompt(*args, **kwargs) if found is None else found

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return _generate(self, peft.PeftModelForCausalLM.generate, args, kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        mask = inputs.get("attention_mask")
        if (
            not is_free(self)
            or not _has_prompt(self)
            or not isinstance(mask, Tensor)
            or mask.dim() != 2
        ):
            return inputs
        length = self.active_peft_config.num_virtual_tokens
        embeddings, text = inputs.get("inputs_embeds"), mask[:, length:].long()
        if embeddings is not None:
            found = prompt_lookup(
                embeddings[:, length:],
                embeddings[0, :length],
                attention_mask=text,
                position="after_padding",
            )
            return _with_positions(self, inputs, found.attention_mask, found.position_ids) | {
                "inputs_embeds": found.embeddings
            }
        whole = _mask_after_padding(text, length)
        return _with_positions(self, inputs, whole, whole.sum(1, keepdim=True) - 1)


class PeftModelForSeq2SeqLM(peft.PeftModelForSeq2SeqLM):
    """PEFT's, with the prompt put before the encoder's text by a kernel."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs}
        reason = why_not(self) or _why_not_of(args, given)
        if reason is not None:
            count(self, reason)
            return super().forward(*args, **kwargs)
        config = self.active_peft_config
        if config.peft_type == PeftType.PREFIX_TUNING:
            theirs = peft.PeftModelForSeq2SeqLM.forward
            return _forward_with_prefix(self, theirs, args, kwargs, given)
        count(self, KERNEL)
        ids, mask = given.pop("input_ids"), given.pop("attention_mask", None)
        given.pop("inputs_embeds", None), given.pop("task_ids", None)
        self._adjust_prompt_learning_kwargs(config, kwargs=given)
        found = prompt_lookup(
            self.word_embeddings(ids),
            self.get_prompt(batch_size=1)[0, : config.num_virtual_tokens],
            attention_mask=mask,
            position="front",
        )
        return self.base_model(
            inputs_embeds=found.embeddings,
            attention_mask=None if mask is None else found.attention_mask.float(),
            **given,
        )

    def get_prompt(self, *args: Any, **kwargs: Any) -> Any:
        found = prefixed.cache_of(self)
        return super().get_prompt(*args, **kwargs) if found is None else found

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return _generate(self, peft.PeftModelForSeq2SeqLM.generate, args, kwargs)


class PeftModelForSequenceClassification(peft.PeftModelForSequenceClassification):
    """As :class:`PeftModelForCausalLM`."""

    forward = _forward(peft.PeftModelForSequenceClassification.forward, classifies=True)


class PeftModelForTokenClassification(peft.PeftModelForTokenClassification):
    """As :class:`PeftModelForCausalLM`."""

    forward = _forward(peft.PeftModelForTokenClassification.forward, classifies=True)


class PeftModelForFeatureExtraction(peft.PeftModelForFeatureExtraction):
    """As :class:`PeftModelForCausalLM`."""

    forward = _forward(peft.PeftModelForFeatureExtraction.forward, labels=False)


SERVED: dict[type, type] = {
    peft.PeftModelForCausalLM: PeftModelForCausalLM,
    peft.PeftModelForSeq2SeqLM: PeftModelForSeq2SeqLM,
    peft.PeftModelForSequenceClassification: PeftModelForSequenceClassification,
    peft.PeftModelForTokenClassification: PeftModelForTokenClassification,
    peft.PeftModelForFeatureExtraction: PeftModelForFeatureExtraction,
}


def set_strict(model: Any, strict: bool) -> None:
    """Has a causal model compute what PEFT does, or with ``strict`` False what is right."""
    model.__dict__.pop(FREE, None)
    if not strict:
        takes = "position_ids" in inspect.signature(model.base_model.forward).parameters
        # RoBERTa's family counts from behind the padding's position.
        counts = any(hasattr(part, "padding_idx") and hasattr(part, "position_embeddings")
                     for part in model.modules())  # fmt: skip
        model.__dict__[FREE] = takes and not counts


def is_free(model: Any) -> bool:
    """Whether ``strict=False`` was asked for."""
    return FREE in model.__dict__


def _has_prompt(model: Any) -> bool:
    return model.active_peft_config.peft_type in _TYPES


def why_not(model: Any) -> str | None:
    """Why a model's calls are PEFT's, or None."""
    config = model.active_peft_config
    takes_prefix = isinstance(model, PeftModelForCausalLM | PeftModelForSeq2SeqLM)
    if config.peft_type == PeftType.PREFIX_TUNING and takes_prefix:
        return prefixed.why_not(model)
    return None if config.peft_type in _TYPES else config.peft_type.value


def _generate(model: Any, theirs: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    if not model.active_peft_config.is_prompt_learning:
        return theirs(model, *args, **kwargs)
    with _TURNS.setdefault(model, threading.RLock()):
        return _generate_alone(model, theirs, args, kwargs)


# PEFT gives the base a method while a prompted model generates, and takes it away behind that: from
# other threads that generate with the model, too, if they didn't take turns.
_TURNS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _generate_alone(model: Any, theirs: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    if model.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
        reason = why_not(model) or prefixed.why_not_generate(model, kwargs)
        if reason is None:
            output = prefixed.generate(model, theirs, args, kwargs)
            if output is not None:
                return output
            reason = NOT_ASKED
        count(model, reason)
    else:
        count(model, "generate")  # PEFT puts the prompt before the text, once for all steps
    return theirs(model, *args, **kwargs)


def _why_not_of(args: tuple, given: dict[str, Any]) -> str | None:
    """Why this call is PEFT's, or None."""
    mask = given.get("attention_mask")
    plain = len(args) <= 2 and given.get("input_ids") is not None
    plain = plain and given.get("inputs_embeds") is None and given.get("task_ids") is None
    if mask is not None:
        plain = plain and isinstance(mask, Tensor) and mask.dim() == 2
        plain = plain and not mask.is_floating_point()
    return None if plain else "other arguments"


def _returns_dict(config: Any) -> bool:
    return getattr(config, "return_dict", True) and not getattr(config, "torchscript", False)


def _lengthened(kinds: Tensor, embeddings: Tensor) -> Tensor:
    """The token types with zeros before them."""
    return torch.nn.functional.pad(kinds, (embeddings.shape[1] - kinds.shape[1], 0)).long()


def _with_positions(
    model: Any, inputs: dict[str, Any], mask: Tensor, positions: Tensor
) -> dict[str, Any]:
    inputs = {**inputs, "attention_mask": mask}
    if model.__dict__[FREE]:
        inputs["position_ids"] = positions
    return inputs


def _mask_after_padding(text: Tensor, length: int) -> Tensor:
    """The mask of padding, prompt and text, of that of padding and text: ``[B, L + T]``."""
    padding = (text.cumsum(1) == 0).sum(1, keepdim=True)
    places = torch.arange(length + text.shape[1], device=text.device)
    whole = torch.nn.functional.pad(text, (length, 0)).long()
    prompt = (places >= padding) & (places < padding + length)
    return torch.where(prompt, 1, whole.masked_fill(places < padding, 0))
