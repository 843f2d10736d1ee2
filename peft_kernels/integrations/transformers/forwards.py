"""What a forward of transformers' takes, by its signature and its arguments."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any


@cache
def parameters(kind: Any) -> tuple[str, ...]:
    """The names of a module's forward's."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


@cache
def needs_tokens(kind: Any) -> bool:
    """Whether a module's forward can't be called without input_ids."""
    asked = inspect.signature(kind.forward).parameters.get("input_ids")
    return asked is not None and asked.default is asked.empty


def takes_positions(module: Any) -> bool:
    return "position_ids" in parameters(module.__class__)


def past_length(past: Any) -> int:
    """Of a cache, or of the tuples that older models have."""
    if past is None:
        return 0
    return past.get_seq_length() if hasattr(past, "get_seq_length") else past[0][0].shape[-2]
