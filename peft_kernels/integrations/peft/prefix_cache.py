"""The cache that a forward returns, beginning with the prefix once somebody reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


def put_before(cache: Any, prefix: Any, rows: int) -> None:
    """Has a cache of text begin with the prefix of each row.

    Args:
        cache, prefix: of one model; the prefix' is of one row.
        rows: the text's.
    """
    for layer, before in zip(cache.layers, prefix.layers, strict=True):
        pair = before.keys, before.values
        if type(layer) in (DynamicLayer, _Beside):
            layer.__class__ = _Behind
            layer.__dict__["_before"] = pair, rows
        else:
            layer.keys = _joined(pair[0], layer.keys, rows)
            layer.values = _joined(pair[1], layer.values, rows)


def beside(prefix: Any, length: int) -> DynamicCache:
    """A cache of text alone that says it is longer by a prefix, as positions are counted from.

    Args:
        prefix: its layers are as many.
        length: of the prefix.
    """
    cache = DynamicCache()
    cache.layers = [_Beside() for _ in prefix.layers]
    for layer in cache.layers:
        layer.__dict__["_before"] = length
    return cache


class _Beside(DynamicLayer):
    def get_seq_length(self) -> int:
        return self.__dict__["_before"] + super().get_seq_length()


class _Behind(DynamicLayer):
    """Keys and values of text, until they are read: those of prefix and text.

    What trains reads no cache, and so makes no copy of its keys.
    """

    def _join(self) -> None:
        state = self.__dict__
        (keys, values), rows = state.pop("_before")
        state["_keys"] = _joined(keys, state.pop("keys"), rows)
        state["_values"] = _joined(values, state.pop("values"), rows)

    def _get(self, name: str) -> Tensor:
        if "_before" in self.__dict__:
            self._join()
        return self.__dict__[name]

    @property
    def keys(self) -> Tensor:
        return self._get("_keys")

    @keys.setter
    def keys(self, keys: Tensor) -> None:
        self._get("_keys")
        self.__dict__["_keys"] = keys

    @property
    def values(self) -> Tensor:
        return self._get("_values")

    @values.setter
    def values(self, values: Tensor) -> None:
        self._get("_values")
        self.__dict__["_values"] = values


def _joined(before: Tensor, text: Tensor, rows: int) -> Tensor:
    return torch.cat([before.expand(rows, -1, -1, -1).to(text.dtype), text], 2)
