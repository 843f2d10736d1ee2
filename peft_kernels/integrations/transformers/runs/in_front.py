"""A soft prompt as a prefix: its tokens run once a task, and all rows attend to what they left.

In a causal decoder the hidden states of tokens in front depend on nothing behind them, so the L
soft tokens of a task are run by themselves, at positions 0 to L - 1, and each layer's keys and
values are recorded, with their gradients. The text's rows run at positions from L on.

A causal loss has the last soft token answer for the text's first. With labels that token therefore
stands in the rows, and the L - 1 before it are the prefix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.integrations.transformers.attention import own_attention
from peft_kernels.integrations.transformers.attention.checkpointing import carry
from peft_kernels.integrations.transformers.attention.prefixed import Prefixes, recording, set_state
from peft_kernels.integrations.transformers.forwards import past_length
from peft_kernels.integrations.transformers.places import (
    Place,
    attention_places,
    calls_the_interface,
)
from peft_kernels.integrations.transformers.runs.in_rows import (
    Layout,
    Trim,
    answered,
    check_packed,
    check_room,
    has_prompt,
    slot_places,
    spread_others,
    text_of,
    token_labels,
)
from peft_kernels.integrations.transformers.runs.prefix import position_owner
from peft_kernels.modules.names import is_fully_sharded
from peft_kernels.nn import BottleneckAdapter
from peft_kernels.nn.multi_lora import MultiLoRALinear
from peft_kernels.ops.prompt_lookup import prompt_lookup

_ROPES = (None, "default", "linear", "llama3", "yarn")  # whose angles don't depend on the length
_DROPS = ("dropout", "attention_dropout", "activation_dropout", "layerdrop")


# ---- where it is exact ---------------------------------------------------------------------------


def obstacle(model: Any, position: str) -> str | None:
    """Why a prompt can't be a prefix of this model, or None."""
    config = model.config.get_text_config()
    if position == "after_bos":
        return f"the prompt's position is {position}"
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder's prompt sees the text"
    try:
        places = attention_places(model)
    except ValueError:
        return "its attention can't be told to take a prefix"
    return _of_config(config) or _of_places(model, config, places)


def _of_config(config: Any) -> str | None:
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"} or getattr(config, "sliding_window", None) is not None:
        return "its layers attend within a window"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "its layers attend within chunks"
    for kind in _rope_kinds(config):
        if kind not in _ROPES:
            return f"its rotary positions depend on the text's length ({kind})"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention caps the scores"
    return None


def _rope_kinds(config: Any) -> list[str | None]:
    """Of all layers, or of each kind of layer where the config tells them apart."""
    scaling = getattr(config, "rope_scaling", None) or {}
    by_kind = [x for x in scaling.values() if isinstance(x, dict)] or [scaling]
    return [x.get("rope_type", x.get("type")) for x in by_kind]


def _of_places(model: Any, config: Any, places: list[Place]) -> str | None:
    stacks = {place.stack for place in places}
    one = len(stacks) == 1 and {place.site for place in places} == {"self"}
    layers = sorted(place.layer for place in places)
    if not one or layers != list(range(config.num_hidden_layers)):
        return "not all of its layers are causal self-attention"
    for place in places:
        module: Any = place.module
        own = own_attention.is_bert(module) or own_attention.is_t5(module)
        if own or not getattr(module, "is_causal", False):
            return "its attention isn't causal"
        if hasattr(module, "sinks") or getattr(module, "sliding_window", None) is not None:
            return "its attention has sinks or a window"
    if not all(calls_the_interface(place.module) for place in places):
        return "its attention can't be told to take a prefix"
    if position_owner(model, stacks.pop()) is None:
        return "it takes no position_ids"
    return None


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that runs the layers, from embeddings and positions."""
    owner = position_owner(model, attention_places(model)[0].stack)
    assert owner is not None
    return owner


def why_not_now(model: Any, inputs: dict[str, Any], shares_dropout: bool) -> str | None:
    """Why this forward can't take the prompt as a prefix, or None."""
    config = model.config
    for name in ("output_attentions", "output_router_logits"):
        asked = inputs.get(name)
        if getattr(config, name, False) if asked is None else asked:
            return f"{name} is to be of the prompt too"
    if inputs.get("labels") is not None:
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            return "labels and a mask that isn't [B, S]"
        fills = inputs.get("past_key_values") is not None or inputs.get("use_cache")
        if fills and not past_length(inputs.get("past_key_values")):
            return "labels and a cache to fill"
    if model.training and not shares_dropout and any(_active_dropout(model)):
        return "dropout draws for each row"
    return None


def why_rows_matter(model: nn.Module) -> str | None:
    """Why a layer computes other things of a prompt by itself than of one in the rows, or None."""
    return next(filter(None, map(_why_rows_matter, model.modules())), None)


def _why_rows_matter(module: nn.Module) -> str | None:
    if isinstance(module, BottleneckAdapter) and module.gate is not None:
        return "the gate of an adapter is a mean over a row's tokens"
    if torch.is_grad_enabled() and is_fully_sharded(module):
        return "a layer's sharded weights are whole in the backward of its last call alone"
    if isinstance(module, MultiLoRALinear) and module.router.tells_rows_apart():
        return "a pool's route tells rows apart, and the prompt runs once for all rows of a task"
    return None


def _active_dropout(model: nn.Module) -> Iterator[bool]:
    own = set(model.get_submodule("soft_prompt").modules())
    for module in model.modules():
        if module.training and module not in own:
            if isinstance(module, nn.modules.dropout._DropoutNd):
                yield module.p > 0
            for name in _DROPS:
                rate = module.__dict__.get(name, 0.0)
                yield isinstance(rate, float) and rate > 0


# ---- the forward ---------------------------------------------------------------------------------


def inputs_for_prefix(run: Any, module: nn.Module, inputs: dict[str, Any], frame: Any) -> dict:
    """The inputs of the rows; sets the state that holds the prompt's keys and values."""
    check_packed(inputs)
    text = text_of(inputs)
    ids = run.ids_of(text)
    labels = token_labels(inputs)
    past = past_length(inputs.get("past_key_values"))
    joins = run.is_shifted and labels is not None and not past
    used, local = _used(ids)
    prompts = run.prompts()
    # Of the soft tokens before the rows, which start with the last one if it joins them.
    length = run.length - joins
    set_state(Prefixes(_pairs(run, module, prompts, used, length), local))
    positions = _text_positions(inputs, text, past, run.length * has_prompt(ids))
    if joins:
        layout = _join(inputs, run, prompts[:, length:], ids, labels)
        frame.trim = Trim(layout, inputs)
        slot = length * torch.as_tensor(has_prompt(ids), device=text.device).flatten()
        positions = layout.spread(positions, slot)
    elif inputs.get("attention_mask") is None:
        # Positions that start at L would be searched for packed sequences, with a mask made.
        inputs["attention_mask"] = text.new_ones(
            text.shape[0], past + text.shape[1], dtype=torch.long
        )
    check_room(run, positions, run.length + past + text.shape[1])
    return inputs | {"position_ids": positions}


def carry_state(module: nn.Module) -> None:
    """Lets checkpointed layers find the forward's state when they run again."""
    for child in module.modules():
        carry(child)


def _used(ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The prompts that some row has, and each row's among them; -1 stays."""
    if ids is None:
        return None, None
    used = ids.unique()
    used = used[used >= 0]
    return used, torch.where(ids < 0, -1, torch.searchsorted(used, ids)).to(torch.int32)


def _pairs(run: Any, module: nn.Module, prompts: Tensor, used: Tensor | None, length: int) -> dict:
    """Each layer's keys and values of the first soft tokens, ``[P, Hkv, length, D]``."""
    if length == 0 or (used is not None and not used.numel()):
        return {}
    kept_before = None if torch.is_grad_enabled() else run.kept.get()
    keeps = kept_before is not None
    key = (length, None if used is None else tuple(used.tolist())) if keeps else None
    if kept_before is not None and key in kept_before:
        return kept_before[key]
    chosen = prompts if used is None or used.numel() == prompts.shape[0] else prompts[used]
    weight = getattr(run.embedding(), "weight", prompts)
    chosen = chosen[:, :length].to(weight.dtype)
    positions = torch.arange(length, device=chosen.device)[None]
    with recording(run.decoder) as kept:
        run.decoder(
            inputs_embeds=chosen,
            position_ids=positions.expand(chosen.shape[0], -1),
            attention_mask=positions.new_ones(chosen.shape[:2]),
            use_cache=False,
        )
    if kept_before is not None:
        kept_before[key] = kept.pairs
    return kept.pairs


def _text_positions(inputs: dict[str, Any], text: Tensor, past: int, shift: int | Tensor) -> Tensor:
    """Positions of the text's tokens ``[B, S]``, counted over real ones, behind the prompt's."""
    shape = text.shape[:2]
    if (given := inputs.get("position_ids")) is not None:
        return (given + shift).expand(shape)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2 and mask.shape[1] == past + shape[1]:
        return (mask.long().cumsum(1)[:, past:] - 1 + shift).clamp_min(0)
    counted = torch.arange(past, past + shape[1], device=text.device)
    return (counted + shift).expand(shape)


def _join(
    inputs: dict[str, Any], run: Any, last: Tensor, ids: Tensor | None, labels: Tensor | None
) -> Layout:
    """Puts the last soft token into the rows."""
    mask = inputs.get("attention_mask")
    embeddings = run.embedded(inputs)
    places = slot_places(run, embeddings, mask, ids, 1)
    position = "front" if places is None else places
    made = prompt_lookup(
        embeddings, last, ids, position=position, attention_mask=mask, labels=labels
    )
    layout = Layout(embeddings.shape[:2], 1, places)
    spread_others(inputs, layout)
    inputs.pop("cache_position", None)
    inputs |= {
        "inputs_embeds": made.embeddings,
        "attention_mask": made.attention_mask,
        "labels": answered(run, made),
        "use_cache": False,
    }
    return layout
