"""vLLM's LoRA layers over pages, and told to the wrapper that they are given."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import NamedTuple

from torch import Tensor
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    LogitsProcessorWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.worker_manager import WorkerLoRAManager

from peft_kernels.integrations.vllm import loading, prompt_rows
from peft_kernels.integrations.vllm import pages as paged
from peft_kernels.integrations.vllm.pages import Pages
from peft_kernels.integrations.vllm.wrapper import PunicaWrapperOfLayers

_WITH_A = BaseLinearLayerWithLoRA, LogitsProcessorWithLoRA


class Pair(NamedTuple):
    """The adapters of one slice; an embedding looks its A up itself."""

    a: Pages | None
    b: Pages

    @property
    def both(self) -> tuple[Pages, ...]:
        return (self.b,) if self.a is None else (self.a, self.b)

    @property
    def is_whole(self) -> bool:
        """Whether A and B are multiplied in one call.

        They aren't where an adapter's A is shared out, and has fewer rank rows here than B.
        """
        return self.a is not None and self.a.rank == self.b.rank


def pairs_of(layer: BaseLayerWithLoRA) -> list[Pair]:
    """The layer's adapters by slice; none of a layer of another kind, which is left as it is.

    The first time its stacked tensors are put over pages, and its adapters' ranks are kept from
    then on.
    """
    if not hasattr(layer, "_peft_kernels_pairs"):
        layer._peft_kernels_pairs = _put_on_pages(layer)
    return layer._peft_kernels_pairs


def _put_on_pages(layer: BaseLayerWithLoRA) -> list[Pair]:
    has_a = isinstance(layer, _WITH_A)
    if not has_a and not isinstance(layer, VocabParallelEmbeddingWithLoRA):
        return []
    if isinstance(layer, LogitsProcessorWithLoRA):
        prompt_rows.watch()
    all_b = _as_tuple(layer.lora_b_stacked)
    all_a = _as_tuple(layer.lora_a_stacked) if has_a else (None,)
    pairs = [
        Pair(None if a is None else paged.pages_of_a(a), paged.pages_of_b(b))
        for a, b in zip(all_a, all_b, strict=True)
    ]
    single = isinstance(layer.lora_b_stacked, Tensor)
    if has_a:
        layer.lora_a_stacked = _like(single, [a.stacked for a, _ in pairs if a])
    layer.lora_b_stacked = _like(single, [b.stacked for _, b in pairs])
    _follow(layer, pairs)
    return pairs


def _as_tuple(stacked: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (stacked,) if isinstance(stacked, Tensor) else tuple(stacked)


def _like(single: bool, stacked: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return stacked[0] if single else tuple(stacked)


def _follow(layer: BaseLayerWithLoRA, pairs: list[Pair]) -> None:
    """Keeps the ranks of what vLLM writes into the layer's slots."""
    set_lora, reset_lora = layer.set_lora, layer.reset_lora

    @wraps(set_lora)
    def set_and_rank(
        index: int, lora_a: Tensor | list[Tensor | None], lora_b: Tensor | list[Tensor | None]
    ) -> None:
        set_lora(index, lora_a, lora_b)
        for pair, rank in zip(pairs, _ranks(lora_a, len(pairs)), strict=True):
            for pages in pair.both:
                pages.assign(index, rank)

    @wraps(reset_lora)
    def reset_and_forget(index: int) -> None:
        reset_lora(index)
        for pages in (pages for pair in pairs for pages in pair.both):
            pages.assign(index, 0)

    layer.set_lora, layer.reset_lora = set_and_rank, reset_and_forget


def _ranks(lora_a: Tensor | Sequence[Tensor | None], slices: int) -> list[int]:
    """Of each slice: A's rows, before a process takes its part of them."""
    if isinstance(lora_a, Tensor):
        return [lora_a.shape[0]] * slices
    ranks = [0 if own is None else own.shape[0] for own in lora_a]
    return ranks if len(ranks) == slices else [max(ranks)] * slices


def _adopting(set_mapping):
    @wraps(set_mapping)
    def run(layer: BaseLayerWithLoRA, punica_wrapper: PunicaWrapperBase) -> None:
        set_mapping(layer, punica_wrapper)
        if isinstance(punica_wrapper, PunicaWrapperOfLayers):
            punica_wrapper.adopt(layer)

    return run


BaseLayerWithLoRA.set_mapping = _adopting(BaseLayerWithLoRA.set_mapping)
WorkerLoRAManager._load_adapter = loading.checked(WorkerLoRAManager._load_adapter)
