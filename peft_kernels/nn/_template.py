"""P-tuning's templates, which say where soft slots stand, and verbalizers, which read answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.modules.checks import check_choice

MODELS = ("masked", "causal")
SIDES = ("left", "right")
REDUCTIONS = ("mean", "sum")
_SYNTAX = re.compile(r"\[P(?:\s+P)*\]|\[P\*(?P<count>\d+)\]|\{(?P<name>\w+)\}|(?P<mask>\[MASK\])")
_LEFT_OVER = re.compile(r"\{[^{}]*\}?|\}|\[P\b[^\]]*\]?")

Row = str | Sequence[int] | Tensor


@dataclass(frozen=True)
class Slots:
    """Soft slots: trained vectors."""

    count: int


@dataclass(frozen=True)
class Anchor:
    """Tokens that are always the same."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Input:
    """A place for the input; ``lead`` goes before its text."""

    name: str
    lead: str = ""


@dataclass(frozen=True)
class Mask:
    """The place whose token the model is asked for."""


Piece = Slots | Anchor | Input | Mask


class TemplateBatch(NamedTuple):
    """Rows laid out by a template with L slots, padded to S tokens beside the slots."""

    input_ids: Tensor  # [B, S] int64: all tokens that aren't slots
    attention_mask: Tensor  # [B, S] int64, 0 for padding
    positions: Tensor  # [B, L] int64: the slots' places among L + S
    answer: Tensor  # [B] int64: the place among L + S whose output is the answer

    def to(self, device: torch.device | str) -> TemplateBatch:
        return TemplateBatch(*(tensor.to(device) for tensor in self))


class Template:
    """A template of P-tuning (Liu et al. 2021, section 3.1) over token ids.

    Args:
        pieces: :class:`Slots`, :class:`Anchor`, :class:`Input` and :class:`Mask` in their order.
        model: "masked": the answer is at the one mask. "causal": it is at the last token, and a
            mask, which may only stand last, isn't put in.
        tokenizer: of Hugging Face's kind, for inputs that are text; None where all are token ids.
        mask_id: the mask's token.
        pad_id: the token of padding, where nothing looks.
        padding_side: "left" or "right".
        specials: token ids before the template and after it. A causal model gets none after.

    Attributes:
        length: soft slots, L.
        fixed: tokens of a row beside its inputs, slots included.
        names: of the inputs, in their order.

    Raises:
        ValueError: no input or several of one name; a mask too many or, for a masked model, too
            few; an unknown name.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        *,
        model: str = "masked",
        tokenizer: Any = None,
        mask_id: int | None = None,
        pad_id: int = 0,
        padding_side: str = "right",
        specials: tuple[Sequence[int], Sequence[int]] = ((), ()),
    ) -> None:
        check_choice("model", model, MODELS)
        check_choice("padding_side", padding_side, SIDES)
        self.names = tuple(piece.name for piece in pieces if isinstance(piece, Input))
        if not self.names:
            raise ValueError("template must have a place for the input, e.g. {x}; it has none")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"template must name each input once; got {', '.join(self.names)}")
        _check_mask(pieces, model, mask_id)
        self.model, self.tokenizer, self.mask_id = model, tokenizer, mask_id
        self.pad_id, self.padding_side = pad_id, padding_side
        self.before = tuple(specials[0])
        self.after = tuple(specials[1]) if model == "masked" else ()
        # A causal model's answer follows the last token: there is no mask to be put in.
        kept = (p for p in pieces if model == "masked" or not isinstance(p, Mask))
        self.pieces: tuple[Piece, ...] = tuple(kept)
        self.length = sum(p.count for p in self.pieces if isinstance(p, Slots))
        anchors = sum(len(p.ids) for p in self.pieces if isinstance(p, Anchor))
        masks = sum(isinstance(p, Mask) for p in self.pieces)
        self.fixed = self.length + anchors + masks + len(self.before) + len(self.after)

    @classmethod
    def parse(
        cls, text: str, tokenizer: Any, *, model: str = "masked", add_special_tokens: bool = True
    ) -> Template:
        """Reads a template such as ``"[P P P] {x} [P] ? [MASK]"``.

        ``[P P P]``, or ``[P*3]``, are three soft slots, ``{x}`` an input, ``[MASK]`` the mask, and
        everything else are anchors. Whitespace before an anchor or an input counts as one space,
        which byte-level tokenizers have as a part of the word; other whitespace doesn't count.

        Args:
            text: the template.
            tokenizer: an object that encodes as those of Hugging Face do, by
                ``encode(text, add_special_tokens=False)``; ``mask_token_id``, ``pad_token_id`` and
                ``padding_side`` are read where it has them.
            model: "masked" or "causal".
            add_special_tokens: whether the rows get what the tokenizer puts around a text.

        Raises:
            ValueError: brackets that mean nothing; see also the class.
        """
        lead = "" if len(_encode(tokenizer, " a")) > len(_encode(tokenizer, "a")) else " "
        pieces: list[Piece] = []
        end = 0
        for match in _SYNTAX.finditer(text):
            between = text[end : match.start()]
            pieces += _anchors(between, tokenizer, lead)
            spaced = between[-1:].isspace()
            pieces.append(_piece(match, lead if spaced else ""))
            end = match.end()
        pieces += _anchors(text[end:], tokenizer, lead)
        pad_id = getattr(tokenizer, "pad_token_id", None)
        return cls(
            pieces,
            model=model,
            tokenizer=tokenizer,
            mask_id=getattr(tokenizer, "mask_token_id", None),
            pad_id=0 if pad_id is None else pad_id,
            padding_side=getattr(tokenizer, "padding_side", "right"),
            specials=_specials(tokenizer) if add_special_tokens else ((), ()),
        )

    def encode(self, *inputs: Sequence[Row], max_length: int | None = None) -> TemplateBatch:
        """Lays a batch out.

        Args:
            inputs: for each of the template's inputs, the B rows: texts, or token ids without
                special tokens and padding, as 1-D tensors or lists.
            max_length: the most tokens that a row may have, slots included. Inputs are cut at
                their ends to fit, the longest first; the template never is.

        Raises:
            ValueError: another number of inputs or rows, no row; a max_length that leaves no
                room for a token of each input; text without a tokenizer; a row without any token.
        """
        rows = self._rows(inputs)
        if max_length is not None:
            least = self.fixed + len(self.names)
            if max_length < least:
                raise ValueError(
                    f"max_length must be at least {least}, as the template alone has "
                    f"{self.fixed} tokens; got {max_length}"
                )
            rows = [_cut(row, max_length - self.fixed) for row in rows]
        return self._batch([self._lay_out(row) for row in rows])

    def _rows(self, inputs: tuple[Sequence[Row], ...]) -> list[list[list[int]]]:
        """The token ids of each input, row by row."""
        if len(inputs) != len(self.names):
            raise ValueError(f"inputs must be {', '.join(self.names)}; got {len(inputs)} of them")
        if any(isinstance(given, str) for given in inputs):
            raise ValueError("inputs must be a list of rows each; got a single text")
        sizes = {len(given) for given in inputs}
        if len(sizes) > 1 or sizes == {0}:
            raise ValueError(f"inputs must have the same rows, at least one; got {sorted(sizes)}")
        places = [piece for piece in self.pieces if isinstance(piece, Input)]
        columns = [self._ids(place, given) for place, given in zip(places, inputs, strict=True)]
        return [list(row) for row in zip(*columns, strict=True)]

    def _ids(self, place: Input, given: Sequence[Row]) -> list[list[int]]:
        texts = [place.lead + row for row in given if isinstance(row, str)]
        if texts and self.tokenizer is None:
            raise ValueError(f"{place.name} must be token ids: the template has no tokenizer")
        encoded = iter(_encode_all(self.tokenizer, texts) if texts else ())
        return [next(encoded) if isinstance(row, str) else _listed(place, row) for row in given]

    def _lay_out(self, inputs: list[list[int]]) -> tuple[list[int], list[int], int]:
        """A row's tokens beside the slots, the slots' places, and the answer's."""
        ids, answer, rest = list(self.before), -1, iter(inputs)
        slots: list[int] = []
        for piece in self.pieces:
            place = len(ids) + len(slots)
            if isinstance(piece, Slots):
                slots += range(place, place + piece.count)
            elif isinstance(piece, Anchor):
                ids += piece.ids
            elif isinstance(piece, Input):
                ids += next(rest)
            else:
                assert self.mask_id is not None
                ids.append(self.mask_id)
                answer = place
        ids += self.after
        if self.model == "causal":
            answer = len(ids) + len(slots) - 1
        if answer < 0:
            raise ValueError("inputs must have a token in each row, or the template one; got none")
        return ids, slots, answer

    def _batch(self, rows: list[tuple[list[int], list[int], int]]) -> TemplateBatch:
        size = max(len(ids) for ids, _, _ in rows)
        input_ids = torch.full((len(rows), size), self.pad_id)
        mask = torch.zeros(len(rows), size, dtype=torch.int64)
        positions = torch.empty(len(rows), self.length, dtype=torch.int64)
        answers = torch.empty(len(rows), dtype=torch.int64)
        for b, (ids, slots, answer) in enumerate(rows):
            first = size - len(ids) if self.padding_side == "left" else 0
            input_ids[b, first : first + len(ids)] = torch.tensor(ids, dtype=torch.int64)
            mask[b, first : first + len(ids)] = 1
            positions[b] = torch.tensor(slots, dtype=torch.int64) + first
            answers[b] = answer + first
        return TemplateBatch(input_ids, mask, positions, answers)


class Verbalizer(nn.Module):
    """Turns a model's logits over its vocabulary into scores of classes.

    ``score[c]`` is the logit of the class's token, or of several tokens v of a class their mean,
    or ``log sum_v exp logit[v]``, which is their joint probability.

    Args:
        ids: the token id of each label, or several.
        reduction: "mean" or "sum", of several tokens of one label.

    Attributes:
        labels: the labels, in the order of the scores.

    Raises:
        ValueError: no label, one without tokens, a token of two labels, an unknown reduction.
    """

    ids: Tensor
    real: Tensor

    def __init__(self, ids: Mapping[str, int | Sequence[int]], *, reduction: str = "mean") -> None:
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        lists = {n: [v] if isinstance(v, int) else list(v) for n, v in ids.items()}
        if not lists:
            raise ValueError("ids must have at least one label; got none")
        owners: dict[int, str] = {}
        for label, tokens in lists.items():
            if not tokens or min(tokens) < 0:
                raise ValueError(f"ids must be token ids for each label; {label!r} has {tokens}")
            for token in tokens:
                if token in owners:
                    raise ValueError(
                        f"ids must be of one label each; token {token} is of {owners[token]!r} "
                        f"and {label!r}"
                    )
                owners[token] = label
        self.labels, self.reduction, self.largest = tuple(lists), reduction, max(owners)
        size = max(map(len, lists.values()))
        padded = [tokens + tokens[:1] * (size - len(tokens)) for tokens in lists.values()]
        real = [[i < len(tokens) for i in range(size)] for tokens in lists.values()]
        # What they hold is given with the constructor: they belong in no file of weights.
        self.register_buffer("ids", torch.tensor(padded), persistent=False)
        self.register_buffer("real", torch.tensor(real), persistent=False)

    @classmethod
    def parse(
        cls,
        words: Mapping[str, str | Sequence[str]],
        tokenizer: Any,
        *,
        reduction: str = "mean",
    ) -> Verbalizer:
        """Reads the words of each label. Each must be a single token, with a space in front where
        the tokenizer has that as a part of the word (" great" for GPT-2).

        Raises:
            ValueError: a word that is several tokens, or none; see also the class.
        """
        ids = {}
        for label, given in words.items():
            found = [given] if isinstance(given, str) else given
            ids[label] = [_single(tokenizer, word) for word in found]
        return cls(ids, reduction=reduction)

    def forward(self, logits: Tensor) -> Tensor:
        """``[..., V] -> [..., C]``, float32 or wider.

        Raises:
            ValueError: logits of fewer tokens than the words have.
        """
        if logits.shape[-1] <= self.largest:
            size = logits.shape[-1]
            raise ValueError(f"logits must be of more than {self.largest} tokens; got {size}")
        found = logits[..., self.ids]  # [..., C, K]
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        if self.reduction == "sum":
            return found.masked_fill(~self.real, -torch.inf).logsumexp(-1)
        return found.masked_fill(~self.real, 0).sum(-1) / self.real.sum(-1)

    def extra_repr(self) -> str:
        return f"labels={self.labels}, reduction={self.reduction}"


def _check_mask(pieces: Sequence[Piece], model: str, mask_id: int | None) -> None:
    masks = sum(isinstance(piece, Mask) for piece in pieces)
    if model == "causal":
        if masks and (masks > 1 or not isinstance(pieces[-1], Mask)):
            raise ValueError("template of a causal model must have its mask last, or none")
        return
    if masks != 1:
        raise ValueError(f"template of a masked model must have one [MASK]; it has {masks}")
    if mask_id is None:
        raise ValueError("mask_id must be given for a masked model: the tokenizer has no mask")


def _piece(match: re.Match[str], lead: str) -> Piece:
    if match["mask"]:
        return Mask()
    if match["name"]:
        return Input(match["name"], lead)
    count = int(match["count"]) if match["count"] else match[0].count("P")
    if count == 0:
        raise ValueError(f"template must have at least one slot in brackets; got {match[0]!r}")
    return Slots(count)


def _anchors(text: str, tokenizer: Any, lead: str) -> list[Piece]:
    """The anchor between two other pieces, if there is one."""
    wrong = _LEFT_OVER.search(text)
    if wrong:
        raise ValueError(
            f"template must be made of [P P], [P*2], {{x}}, [MASK] and text; got {wrong[0]!r}"
        )
    words = text.strip()
    if not words:
        return []
    return [Anchor(tuple(_encode(tokenizer, (lead if text[0].isspace() else "") + words)))]


def _encode(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=special))


def _encode_all(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """All at once where the tokenizer can: that is what it is fast at."""
    if callable(tokenizer):
        return [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return [_encode(tokenizer, text) for text in texts]


def _specials(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before a text and after it."""
    bare, whole = _encode(tokenizer, "a"), _encode(tokenizer, "a", special=True)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise ValueError(f"tokenizer must put its special tokens around a text; got {whole} of {bare}")


def _listed(place: Input, row: Sequence[int] | Tensor) -> list[int]:
    ids = row.tolist() if isinstance(row, Tensor) else list(row)
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError(f"{place.name} must be texts or lists of token ids; got {row!r}")
    return ids


def _cut(inputs: list[list[int]], room: int) -> list[list[int]]:
    """Cut at the end until all fit, a token at a time off the longest."""
    lengths = [len(ids) for ids in inputs]
    for _ in range(sum(lengths) - room):
        lengths[lengths.index(max(lengths))] -= 1
    return [ids[:length] for ids, length in zip(inputs, lengths, strict=True)]


def _single(tokenizer: Any, word: str) -> int:
    ids = _encode(tokenizer, word)
    if len(ids) != 1:
        raise ValueError(f"words must be a single token each; {word!r} is {ids}")
    return ids[0]
