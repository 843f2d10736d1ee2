"""A soft prompt in a batch's rows: a forward's inputs with it, and its outputs without it.

The L soft tokens of a row stand among its S tokens. Rows without a prompt have L masked places,
which in a causal model are the first, as padding on the left is.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from peft_kernels.integrations.transformers.forwards import past_length, takes_positions
from peft_kernels.ops.prompt_lookup import IGNORED, PromptedInputs, prompt_lookup, slot_positions

_MARK = "_peft_kernels_prompt"
_FILLS = {"token_type_ids": 0, "shift_labels": IGNORED}
_BY_TOKEN = ("logits", "prediction_logits", "last_hidden_state", "hidden_states")
_SPANS = ("start_logits", "end_logits")


class Layout:
    """Where L soft tokens and S of the text stand among L + S places.

    Args:
        shape: [B, S].
        length: L.
        places: of the soft tokens, ``[B, L]``; None: in front.
    """

    def __init__(self, shape: torch.Size, length: int, places: Tensor | None) -> None:
        self.seq, self.length, self.total = shape[1], length, length + shape[1]
        self.text: Tensor | None = None  # places of the text, [B, S]; None: after the prompt
        if places is not None:
            slots = places.new_zeros(shape[0], self.total, dtype=torch.int8)
            slots.scatter_(1, places.long(), 1)
            self.text = slots.argsort(dim=1, stable=True)[:, : self.seq]

    def spread(self, x: Tensor, fill: int | Tensor) -> Tensor:
        """``[B, L + S]``: x ``[B, S]`` at the text's places, a fill ``[]`` or ``[B]`` elsewhere."""
        fill = torch.as_tensor(fill, dtype=x.dtype, device=x.device)
        rows = fill.view(-1, 1).expand(x.shape[0], self.total)
        if self.text is None:
            return torch.cat([rows[:, : self.length], x], 1)
        return rows.scatter(1, self.text, x)

    def before(self) -> int | Tensor:
        """How many soft tokens stand in front of each token of the text: L, or ``[B, S]``."""
        if self.text is None:
            return self.length
        return self.text - torch.arange(self.seq, device=self.text.device)

    def moved(self, index: Tensor) -> Tensor:
        """Places of the tokens ``[B]`` of the text; those that aren't in it are left outside."""
        if self.text is None:
            return torch.where(index < 0, index, index + self.length)
        flat = index.view(index.shape[0], -1)
        inside = (flat >= 0) & (flat < self.seq)
        found = self.text.gather(1, flat.clamp(0, self.seq - 1))
        outside = torch.where(flat < 0, flat, flat + self.length)
        return torch.where(inside, found, outside).view_as(index)


class Trim:
    """Takes the prompt out of a forward's outputs.

    Args:
        layout: of the rows.
        inputs: the forward's; its ``logits_to_keep`` means the text's, and is changed to keep them.
    """

    def __init__(self, layout: Layout, inputs: dict[str, Any]) -> None:
        self.layout = layout
        self.keep: Any = inputs.get("logits_to_keep")
        if isinstance(self.keep, int) and self.keep == 0:
            self.keep = None
        if self.keep is not None:
            inputs["logits_to_keep"] = self._kept_places()

    def _kept_places(self) -> int | Tensor:
        front, length = self.layout.text is None, self.layout.length
        if isinstance(self.keep, int):
            return min(self.keep, self.layout.seq) if front else self.keep + length
        return torch.where(self.keep < 0, self.keep, self.keep + length) if front else 0

    def outputs(self, output: Any) -> Any:
        for name, value in output.items():
            if name == "logits" and self.keep is not None:
                output[name] = self._kept(value)
            elif name in _BY_TOKEN and isinstance(value, tuple):
                output[name] = tuple(self._of_text(x) for x in value)
            elif name in _SPANS or (name in _BY_TOKEN and value.dim() == 3):
                output[name] = self._of_text(value)
        return output

    def _of_text(self, x: Tensor, last: int | None = None) -> Tensor:
        """The text's places (the last of them alone) of x, which ends where the rows end."""
        text = self.layout.text
        if text is None:
            return x[:, self.layout.length :]
        text = text[:, -(last or self.layout.seq) :] - (self.layout.total - x.shape[1])
        index = text.view(*text.shape, *(1,) * (x.dim() - 2)).expand(*text.shape, *x.shape[2:])
        return x.gather(1, index)

    def _kept(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or self.layout.text is None:
            return x
        if isinstance(self.keep, int):
            return self._of_text(x, self.keep)
        return self._of_text(x)[:, self.keep]


def inputs_in_rows(
    run: Any, module: Any, inputs: dict[str, Any], frame: Any = None, template: Any = None
) -> dict[str, Any]:
    """The inputs with the prompt among the text's tokens.

    Args:
        run: the model's :class:`PromptRun`.
        module: whose forward the inputs are of.
        inputs: the forward's, by name.
        frame: the running forward's, whose outputs are to be trimmed; None leaves them whole.
        template: a :class:`TemplateBatch` in place of ids and mask. Outputs then are of its L + S
            places, which its indices count.
    """
    places = None
    if template is not None:
        places = _take_template(run, inputs, template)
    mask = checked_mask(inputs)
    if mask is not None and pools_last(module.__class__) and not bool(mask[:, -1:].all()):
        raise ValueError(
            f"attention_mask must end with a real token in each row where the prompt stands in the "
            f"rows: {type(module).__name__} reads the last place, padding too"
        )
    ids = run.ids_of(text_of(inputs))
    check_labels(module, inputs, run.length, template is not None)
    labels = token_labels(inputs)
    embeddings = run.embedded(inputs)
    if places is None:
        places = slot_places(run, embeddings, mask, ids, run.length)
    layout = Layout(embeddings.shape[:2], run.length, places)
    made = prompt_lookup(
        embeddings,
        run.prompts(),
        ids,
        position="front" if places is None else places,
        attention_mask=mask,
        labels=labels,
    )
    if frame is not None and template is None:
        frame.trim = Trim(layout, inputs)
    spread_others(inputs, layout)
    inputs |= {"inputs_embeds": made.embeddings, "attention_mask": made.attention_mask}
    inputs.pop("cache_position", None)
    if labels is not None:
        inputs["labels"] = answered(run, made)
    if takes_positions(module):
        given = inputs.get("position_ids")
        positions = made.position_ids + run.first_position
        if given is not None:
            shift = layout.before() * has_prompt(ids)
            text = (given + shift).expand(embeddings.shape[:2])
            positions = _replaced(positions, layout, text)
        inputs["position_ids"] = positions
        check_room(run, positions, layout.total)
    return inputs


def cached_inputs(run: Any, module: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of tokens that follow a cache whose rows have the prompt."""
    text = text_of(inputs)
    ids = run.ids_of(text)
    mask, queries = inputs.get("attention_mask"), text.shape[1]
    past = past_length(inputs["past_key_values"])
    if past < run.length:
        raise ValueError(
            f"past_key_values must hold all of the prompt's {run.length} places, or nothing; it "
            f"was cut to {past}"
        )
    seen = past - run.length + queries
    if mask is None and ids is not None:
        mask = text.new_ones(text.shape[0], seen, dtype=torch.long)
    if mask is not None:
        if mask.dim() != 2 or mask.shape[1] != seen:
            raise ValueError(
                f"attention_mask must be of the text in the cache and what follows, [B, {seen}]; "
                f"got shape {tuple(mask.shape)}"
            )
        layout = Layout(mask.shape, run.length, slot_places(run, mask, mask, ids, run.length))
        mask = layout.spread(mask.long(), has_prompt(ids))
        inputs["attention_mask"] = mask
    if inputs.get("cache_position") is not None:
        inputs["cache_position"] = inputs["cache_position"] + run.length
    if not takes_positions(module):
        return inputs
    if inputs.get("position_ids") is not None:
        shift = run.length * torch.as_tensor(has_prompt(ids), device=text.device).view(-1, 1)
        inputs["position_ids"] = inputs["position_ids"] + shift
    elif mask is not None:
        counted = (mask.cumsum(1) - 1).clamp_min(0)[:, -queries:]
        inputs["position_ids"] = counted + run.first_position
    if inputs.get("position_ids") is not None:
        check_room(run, inputs["position_ids"], seen + run.length)
    return inputs


def encoder_mask(run: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A decoder's inputs, whose mask of the encoder's places counts those of the prompt."""
    hidden, mask = (inputs.get(f"encoder_{x}") for x in ("hidden_states", "attention_mask"))
    if hidden is None or mask is None or mask.dim() != 2:
        return inputs
    if hidden.shape[1] == mask.shape[1] + run.length:
        ids = run.ids_of(hidden)
        layout = Layout(mask.shape, run.length, slot_places(run, mask, mask, ids, run.length))
        inputs["encoder_attention_mask"] = layout.spread(mask.long(), has_prompt(ids))
    return inputs


# ---- parts ---------------------------------------------------------------------------------------


def text_of(inputs: dict[str, Any]) -> Tensor:
    """Ids ``[B, S]`` or embeddings ``[B, S, d]``."""
    for name in ("input_ids", "inputs_embeds"):
        if inputs.get(name) is not None:
            return inputs[name]
    raise ValueError("input_ids or inputs_embeds must be given; got neither")


def slot_places(
    run: Any, text: Tensor, mask: Tensor | None, ids: Tensor | None, length: int
) -> Tensor | None:
    """Places of the soft tokens ``[B, length]``; None where they are in front.

    In front of a causal model's padding or behind it is the same but for the loss, where the last
    soft token is to answer for the text's first: they stand behind it.
    """
    position = run.position
    if position == "front" and mask is not None and run.is_shifted:
        position = "after_padding"
    if position == "front":
        return None
    rows = text if text.dim() == 3 else text[..., None]
    places = slot_positions(rows, length, position, mask)
    if ids is None or not run.is_shifted:
        return places
    first = torch.arange(length, dtype=places.dtype, device=places.device)
    return torch.where(ids[:, None] < 0, first, places)


def has_prompt(ids: Tensor | None) -> int | Tensor:
    """1, or ``[B, 1]``: 0 for a row without a prompt."""
    return 1 if ids is None else (ids >= 0).long()[:, None]


def token_labels(inputs: dict[str, Any]) -> Tensor | None:
    """The tokens' labels ``[B, S]``, if the labels are of tokens."""
    labels = inputs.get("labels")
    if labels is None or labels.is_floating_point():  # several classes of a row, or a score
        return None
    return labels if labels.shape == text_of(inputs).shape[:2] else None


def check_labels(module: Any, inputs: dict[str, Any], length: int, of_template: bool) -> None:
    """Raises a ValueError where a model that answers for each token has labels of other shapes."""
    labels = inputs.get("labels")
    if labels is None or not _answers_by_token(module):
        return
    rows, seq = text_of(inputs).shape[:2]
    if labels.shape in ((rows, seq), (rows, length + seq)):
        return
    must, advice = f"[{rows}, {seq}], one for each token of the text", ""
    if of_template:
        must = (
            f"[{rows}, {seq}], one for each of the template's input_ids, or "
            f"[{rows}, {length + seq}], of the slots (-100) too"
        )
        advice = (
            ". The loss of classes [B] is that of their scores: "
            "F.cross_entropy(prompt.scores(model(template=batch).logits, batch), classes)"
        )
    raise ValueError(f"labels must be {must}; got {list(labels.shape)}{advice}")


def _answers_by_token(module: Any) -> bool:
    if type(module).__name__.endswith("ForTokenClassification"):
        return True
    head = getattr(module, "get_output_embeddings", None)
    return callable(head) and head() is not None


def answered(run: Any, made: PromptedInputs) -> Tensor | None:
    """The labels of which a causal loss has an answer.

    It takes a token's from the place before. That is padding, or a row's missing prompt, for the
    first token of a row without a prompt, which is left out then as in the model alone.
    """
    if made.labels is None or not run.is_shifted:
        return made.labels
    real = made.attention_mask.bool()
    first = real[:, 1:] & ~real[:, :-1]
    return torch.cat([made.labels[:, :1], made.labels[:, 1:].masked_fill(first, IGNORED)], 1)


def checked_mask(inputs: dict[str, Any]) -> Tensor | None:
    """The mask ``[B, S]``; without one the positions must be those of one text by row."""
    mask, shape = inputs.get("attention_mask"), text_of(inputs).shape[:2]
    if mask is not None and mask.shape != shape:
        raise ValueError(
            f"attention_mask must be {list(shape)} where the prompt stands in the rows; "
            f"got shape {tuple(mask.shape)}"
        )
    check_packed(inputs)
    return None if mask is None else mask.long()


def check_packed(inputs: dict[str, Any]) -> None:
    """Several texts in a row, which positions that start again say, would need a prompt each."""
    positions = inputs.get("position_ids")
    if positions is None or inputs.get("attention_mask") is not None:
        return
    if not torch.compiler.is_compiling() and bool((positions.diff(dim=-1) < 0).any()):
        raise ValueError("position_ids must not decrease: rows of several texts take no prompt")


def check_room(run: Any, positions: Tensor, total: int) -> None:
    """Learned position embeddings end somewhere; a lookup past it is an index error, or worse."""
    if run.room is None or run.first_position + total <= run.room or not positions.numel():
        return
    if (most := int(positions.max())) >= run.room:
        raise ValueError(
            f"input_ids must be shorter: with the prompt's {run.length} tokens the positions "
            f"reach {most}, and the model has {run.room}"
        )


@cache
def pools_last(kind: Any) -> bool:
    """Whether it reads the last token, which it finds by ids: of embeddings it's the last place."""
    code = inspect.unwrap(kind.forward).__code__
    return "last_non_pad_token" in code.co_varnames


def mark_cache(cache: Any) -> None:
    """Notes in a cache that its rows have the prompt."""
    if hasattr(cache, "__dict__"):
        cache.__dict__[_MARK] = True


def holds_prompt(cache: Any) -> bool:
    return getattr(cache, _MARK, False)


def _take_template(run: Any, inputs: dict[str, Any], template: Any) -> Tensor:
    for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids"):
        if inputs.get(name) is not None:
            raise ValueError(f"{name} must not be given besides a template's batch, which has it")
    if template.positions.shape[1] != run.length:
        raise ValueError(
            f"template must have the prompt's {run.length} slots; got {template.positions.shape[1]}"
        )
    inputs |= {"input_ids": template.input_ids, "attention_mask": template.attention_mask}
    return template.positions


def spread_others(inputs: dict[str, Any], layout: Layout) -> None:
    for name, fill in _FILLS.items():
        if isinstance(value := inputs.get(name), Tensor):
            inputs[name] = layout.spread(value, fill)
    for name in ("start_positions", "end_positions"):
        if isinstance(value := inputs.get(name), Tensor):
            inputs[name] = layout.moved(value)


def _replaced(positions: Tensor, layout: Layout, text: Tensor) -> Tensor:
    """The positions, with other ones at the text's tokens."""
    if layout.text is None:
        return torch.cat([positions[:, : layout.length], text], 1)
    return positions.scatter(1, layout.text, text)
