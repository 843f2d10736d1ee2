"""A model's forward with a prefix: hooks that set the prefixes, the rows' ids and the positions.

The model that :func:`peft_kernels.integrations.transformers.add_prefix` was
given takes ``prefix_ids``;
each of its stacks (what runs a list of layers: a decoder, an encoder) sets its layers' prefixes for
the duration of its forward, so that a stack may be called by itself, as ``generate`` calls an
encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.calls.carried import keep_apart, stop_keeping_apart, unwrap, wrap
from peft_kernels.integrations.transformers.attention import guard, own_attention, own_encoders
from peft_kernels.integrations.transformers.attention.by_length import Lengths
from peft_kernels.integrations.transformers.attention.checkpointing import carry, stop_carrying
from peft_kernels.integrations.transformers.attention.prefixed import (
    SOURCE,
    Pair,
    Prefixes,
    Recording,
    begins_recorded,
    current_state,
    set_state,
)
from peft_kernels.integrations.transformers.forwards import parameters, past_length, takes_positions
from peft_kernels.integrations.transformers.places import Place, parent_path
from peft_kernels.integrations.transformers.row_ids import RowIds, rows_of
from peft_kernels.modules.hooks import PREFIX_HOOK, remove_hooks

Evaluate = Callable[[Sequence[str]], Mapping[str, Sequence[Pair | None]]]


class Attached:
    """A prefix in a model: which attention module takes what, and which row which prefix.

    Args:
        evaluate: gives the keys and values of the sites that it's called with, by site and layer,
            ``[Hkv, L, D]`` or ``[P, Hkv, L, D]``; each forward of a stack calls it once.
        places: the model's attention modules.
        tasks, length: P and L.
        lengths: of the prefixes of a bank in which they differ.
    """

    moves_positions = False  # whether the text's start behind the prefix

    def __init__(
        self,
        evaluate: Evaluate,
        places: Sequence[Place],
        tasks: int,
        length: int,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.evaluate, self.length, self.lengths = evaluate, length, lengths
        self.row_ids = RowIds("prefix_ids", tasks)
        self.modules = {(p.site, p.layer): p.module for p in places}
        self.by_stack: dict[str, list[tuple[str, int]]] = {}
        self.paths: dict[str, list[tuple[str, nn.Module]]] = {}  # in a stack
        for place in places:
            self.by_stack.setdefault(place.stack, []).append((place.site, place.layer))
            path = place.path.removeprefix(f"{place.stack}.")
            self.paths.setdefault(place.stack, []).append((path, place.module))

    def prefixes(self, stack: str | None = None, ids: Tensor | None = None) -> Prefixes:
        """The prefixes of a stack's attention modules, of all if no stack is named."""
        self.row_ids.check_given(ids)
        keys = list(self.modules) if stack is None else self.by_stack[stack]
        made = self.evaluate(sorted({site for site, _ in keys}))
        pairs: dict[nn.Module, Pair] = {}
        for site, index in keys:
            pair = made[site][index] if site in made else None
            if pair is not None:
                k, v = pair
                bank = ids is not None and k.dim() == 3
                pairs[self.modules[site, index]] = (k[None], v[None]) if bank else pair
        if ids is None or self.lengths is None:
            return Prefixes(pairs, ids)
        return Prefixes(pairs, ids, lengths=Lengths(ids, self.lengths))

    def shift(self, batch: int, device: torch.device) -> Tensor | int:
        """By how much a row's positions move: L, or 0 for a row without a prefix."""
        ids = self.row_ids.of_batch(batch, device)
        if ids is not None and self.lengths is not None:
            return torch.tensor([*self.lengths, 0], device=device)[ids][:, None]
        return self.length if ids is None else self.length * (ids >= 0).long()[:, None]


# ---- hooks: functions of the module, so that a copied model has its own --------------------------


def attach(model: nn.Module, attached: Attached, places: Sequence[Place], shift: bool) -> None:
    """Puts the hooks into the model."""
    model.__dict__[PREFIX_HOOK] = attached
    keep_apart(model)
    _hook(model, _take_ids)
    if callable(getattr(model, "generate", None)):
        wrap(model, "generate", _generate)
    for place in places:
        place.module.__dict__[SOURCE] = attached.prefixes
        guard.watch(place.module, place.path)
    take_over(places)
    for path in attached.by_stack:
        stack = model.get_submodule(path)
        stack.__dict__["_prefix_stack"] = (attached, path)
        keep_apart(stack)
        _hook(stack, _begin)
    if shift:
        attached.moves_positions = True
        _shift(model, attached, places)


def take_over(places: Sequence[Place]) -> None:
    """Has modules that compute their attention themselves attend with a prefix."""
    for place in places:
        own_attention.take_over(place.module)
        own_encoders.take_over(place.module)
        if own_attention.is_t5(place.module):
            # The relative position bias of a stack is its first layer's.
            first: Any = next(p.module for p in places if p.stack == place.stack and p.layer == 0)
            place.module.__dict__["_bias_weight"] = first.relative_attention_bias.weight


def detach(model: nn.Module) -> None:
    """Takes out what :func:`attach` and :func:`take_over` put in."""
    for module in model.modules():
        remove_hooks(module, (*_HOOKS, *guard.HOOKS))
        guard.unwatch(module)
        for name in (PREFIX_HOOK, "_prefix_stack"):
            if name in module.__dict__:
                stop_keeping_apart(module)
        for name in (SOURCE, PREFIX_HOOK, *_MARKS):
            module.__dict__.pop(name, None)
        own_attention.give_back(module)
        stop_carrying(module)
    unwrap(model, "generate", _generate)


def _shift(model: nn.Module, attached: Attached, places: Sequence[Place]) -> None:
    """Has the text's positions start behind the prefix, in the stack that attends to itself."""
    own = [place for place in places if place.site == "self"]
    for place in own:
        if own_attention.is_t5(place.module):
            place.module.__dict__["_before"] = attached.length
    for stack in {place.stack for place in own}:
        if (owner := position_owner(model, stack)) is not None:
            owner.__dict__["_prefix_shift"] = attached
            _hook(owner, _shift_positions)
        elif (owner := padded_position_owner(model, stack)) is not None:
            owner.__dict__["_prefix_shift"] = attached
            _hook(owner, _shift_padded)
        elif (table := position_table(model, stack)) is not None:
            table.__dict__["_prefix_shift"] = attached
            _hook(table, _shift_table)


def shifts_by_row(model: nn.Module, places: Sequence[Place]) -> bool:
    """Whether each row's positions can be moved by another number."""
    own = [place for place in places if place.site == "self"]
    return not any(
        own_attention.is_t5(place.module) or _takes_positions_above(model, place.stack) is None
        for place in own
    )


def position_table(model: nn.Module, stack: str) -> nn.Module | None:
    """A stack's learned positions, as of BART's decoder, which the stack itself looks up."""
    table = getattr(model.get_submodule(stack), "embed_positions", None)
    return table if table is not None and takes_positions(table) else None


def position_owner(model: nn.Module, stack: str) -> nn.Module | None:
    """The module at or above a stack that takes ``position_ids`` counting from 0."""
    owner = _takes_positions_above(model, stack)
    return None if owner is None or _counts_from_padding(owner) else owner


def padded_position_owner(model: nn.Module, stack: str) -> nn.Module | None:
    """The module that takes ``position_ids`` counting from behind padding's, as RoBERTa's."""
    owner = _takes_positions_above(model, stack)
    return owner if owner is not None and _counts_from_padding(owner) else None


def _counts_from_padding(module: Any) -> bool:
    return hasattr(getattr(module, "embeddings", None), "padding_idx")


def _takes_positions_above(model: nn.Module, stack: str) -> nn.Module | None:
    path: str = stack
    while True:
        module = model.get_submodule(path)
        if takes_positions(module):
            return module
        if not path:
            return None
        path = parent_path(path)


def _hook(module: nn.Module, before: Callable) -> None:
    module.register_forward_pre_hook(before, with_kwargs=True)


def _take_ids(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    begins_recorded(module)
    module.__dict__[PREFIX_HOOK].row_ids.begin_call(kwargs.pop("prefix_ids", None))
    return args, kwargs


def _generate(
    model: Any, proceed: Callable, *args: Any, prefix_ids: Any = None, **kwargs: Any
) -> Any:
    """Around the model's generate: a row's copies have its prefix."""
    with model.__dict__[PREFIX_HOOK].row_ids.generating(prefix_ids, rows_of(args, kwargs)):
        return proceed(*args, **kwargs)


def _begin(module: nn.Module, args: tuple, kwargs: dict) -> None:
    carry(module)
    for child in module.children():
        for layer in child.children() if isinstance(child, nn.ModuleList) else ():
            carry(layer)
    if isinstance(current_state(), Recording):
        return
    attached, path = module.__dict__["_prefix_stack"]
    guard.check_in_place(module, attached.paths[path])
    first = _first_input(args, kwargs)
    ids = attached.row_ids.of_batch(first.shape[0], first.device)
    asked = kwargs.get("output_attentions")
    if asked is None:
        asked = getattr(getattr(module, "config", None), "output_attentions", False)
    prefixes = attached.prefixes(path, ids)
    prefixes.need_weights = bool(asked)
    set_state(prefixes)


def _first_input(args: tuple, kwargs: dict) -> Tensor:
    """The ids, embeddings or hidden states that a stack is called with."""
    for name in ("input_ids", "inputs_embeds", "hidden_states"):
        if kwargs.get(name) is not None:
            return kwargs[name]
    given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    if given is None:
        raise ValueError("input_ids or inputs_embeds must be given; the model got no tensor")
    return given


# ---- positions -----------------------------------------------------------------------------------


def _shift_positions(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The text's positions, as if the prefix' tokens stood before it."""
    if isinstance(current_state(), Recording):
        return args, kwargs
    attached = module.__dict__["_prefix_shift"]
    kwargs = {**dict(zip(parameters(module.__class__), args, strict=False)), **kwargs}
    text = _first_input((), kwargs)
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = _positions(kwargs, text)
        if kwargs.get("attention_mask") is None and kwargs.get("past_key_values") is None:
            # Positions that start at L would be searched for packed sequences, with a mask made.
            kwargs["attention_mask"] = text.new_ones(text.shape[:2], dtype=torch.long)
    positions = positions + attached.shift(text.shape[0], text.device)
    past = past_length(kwargs.get("past_key_values"))
    _check_room(module, positions, attached.length + past + text.shape[1])
    return (), kwargs | {"position_ids": positions}


def _shift_padded(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Positions that count real tokens from behind padding's, which padding keeps."""
    if isinstance(current_state(), Recording):
        return args, kwargs
    attached, first = module.__dict__["_prefix_shift"], module.embeddings.padding_idx + 1
    kwargs = {**dict(zip(parameters(module.__class__), args, strict=False)), **kwargs}
    text, positions = _first_input((), kwargs), kwargs.get("position_ids")
    past = past_length(kwargs.get("past_key_values"))
    if positions is None and kwargs.get("input_ids") is not None:
        real = (text != first - 1).long()
        positions = (real.cumsum(1) + past) * real + first - 1
    elif positions is None:
        counted = torch.arange(first + past, first + past + text.shape[1], device=text.device)
        positions = counted.expand(text.shape[:2])
    real = (positions != first - 1).long()
    positions = positions + real * attached.shift(text.shape[0], text.device)
    room = module.embeddings.position_embeddings.num_embeddings
    if first + attached.length + past + text.shape[1] > room:
        _check_last(positions, room)
    return (), kwargs | {"position_ids": positions}


def _shift_table(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The positions ``[S]`` of all rows, which must have a prefix each."""
    if isinstance(current_state(), Recording):
        return args, kwargs
    attached = module.__dict__["_prefix_shift"]
    ids = attached.row_ids.given
    if ids is not None and bool((ids < 0).any()):
        raise ValueError(
            "prefix_ids must not be -1 where this model's positions are shifted: it has the same "
            "ones in all rows"
        )
    kwargs = {**dict(zip(parameters(module.__class__), args, strict=False)), **kwargs}
    positions = kwargs["position_ids"] + attached.length
    room = module.weight.shape[0] - getattr(module, "offset", 0)
    # Looked at only where they may be too far: a GPU would be waited for.
    past = kwargs.get("past_key_values_length", 0)
    if attached.length + past + positions.shape[-1] > room:
        _check_last(positions, room)
    return (), kwargs | {"position_ids": positions}


def _positions(kwargs: Mapping[str, Any], text: Tensor) -> Tensor:
    """Counted over the real tokens where a mask says which they are: ``[B or 1, S]``."""
    past, queries = past_length(kwargs.get("past_key_values")), text.shape[1]
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == past + queries:
        return (mask.long().cumsum(-1) - 1).clamp_min(0)[:, past:]
    positions = kwargs.get("cache_position")
    if positions is None:
        positions = torch.arange(past, past + queries, device=text.device)
    return positions[None]


def _check_room(module: Any, positions: Tensor, longest: int) -> None:
    """Learned position embeddings end somewhere; a lookup past it is an index error, or worse."""
    room = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    learned = any(hasattr(module, name) for name in ("wpe", "embed_positions", "embeddings"))
    if learned and room is not None and longest > room:
        _check_last(positions, room)


def _check_last(positions: Tensor, room: int) -> None:
    if (last := int(positions.max())) >= room:
        raise ValueError(
            f"the text's positions reach {last} after the prefix; the model has {room}: shorten "
            "the text, or add the prefix with shift_positions=False"
        )


_MARKS = ("_prefix_stack", "_prefix_shift", "_bias_weight", "_before")
_HOOKS = (_take_ids, _begin, _shift_positions, _shift_padded, _shift_table)
