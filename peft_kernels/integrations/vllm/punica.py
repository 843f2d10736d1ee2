"""The class that vLLM's LoRA layers call, on the kernels of many adapters."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.lora.layers import BaseLayerWithLoRA

from peft_kernels.integrations.vllm import pages as paged
from peft_kernels.integrations.vllm.layers import pairs_of
from peft_kernels.integrations.vllm.pages import Pages
from peft_kernels.integrations.vllm.plugin import LOGGER
from peft_kernels.integrations.vllm.wrapper import PunicaWrapperOfLayers, not_ours, rows_of
from peft_kernels.ops._multi_lora_prepared import PreparedBanks


class RowIds:
    """The adapter of each row of a step, -1 for none."""

    def __init__(self, most: int, what: str):
        self.ids = torch.full((most,), -1, dtype=torch.int32)
        self.count, self.what = 0, what
        self.own = self.ids[:0]
        self.present: list[int] = []

    def assign(self, given: Tensor) -> None:
        self.count = len(given)
        self.own = self.ids[: self.count]
        self.own.copy_(given)
        self.ids[self.count :] = -1
        self.present = given[given >= 0].unique().tolist()

    @property
    def any(self) -> bool:
        return bool(self.present)

    def of(self, x: Tensor) -> Tensor:
        """Those of x's rows: rows beyond the step's own have none."""
        if len(x) == self.count:
            return self.own
        if not self.count <= len(x) <= len(self.ids):
            raise ValueError(
                f"x must have a row for each of the step's {self.count} {self.what}, and at most "
                f"{len(self.ids)} rows; it has {len(x)}, so that they can't be told which LoRA "
                "is theirs"
            )
        return self.ids[: len(x)]

    def part(self, rows: slice) -> Tensor:
        return self.ids[rows]


class PunicaWrapperPEFTKernels(PunicaWrapperOfLayers):
    """What vLLM's ``PunicaWrapperBase`` asks for, in ``multi_lora_linear``'s kernels.

    Semantics: those of the base class's methods, whose A and B are a layer's stacked tensors; they
    must be of a layer that was given this object (``set_mapping``). Sums are in float32, at the
    true rank of each adapter, and rounded once. A row without an adapter keeps its bits, and what
    is added to a row doesn't depend on others.
    """

    _tokens: RowIds
    _prompts: RowIds

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device, **kwargs: Any):
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self._tokens = RowIds(max_num_batched_tokens, "tokens")
        self._prompts = RowIds(max_num_batched_tokens, "rows of logits")
        self._pages: dict[int, Pages] = {}  # by the id() of the stacked tensor, which they hold
        self._slices: dict[int, PreparedBanks] = {}  # by that of the first B: with A
        self._expands: dict[int, PreparedBanks] = {}  # by that of B: without
        init_logger(LOGGER).info_once("peft_kernels serves LoRA requests on its CPU kernels.")

    # ---- layers ------------------------------------------------------------------------------

    def adopt(self, layer: BaseLayerWithLoRA) -> None:
        pairs = pairs_of(layer)
        for pages in (pages for pair in pairs for pages in pair.both):
            self._pages[id(pages.stacked)] = pages
        if pairs and all(pair.is_whole for pair in pairs):
            b = [pages for _, pages in pairs]
            a = [pages.rows for pages, _ in pairs if pages]
            self._slices[id(b[0].stacked)] = paged.prepared(paged.slices_of(a, b))

    def _pages_of(self, stacked: Tensor) -> Pages:
        return _known(self._pages, stacked)

    def _slices_of(self, stacked: Tensor) -> PreparedBanks:
        return _known(self._slices, stacked)

    def _expand_of(self, stacked: Tensor) -> PreparedBanks:
        if id(stacked) not in self._expands:
            b = self._pages_of(stacked)
            slices = paged.slices_of([self._units_of(b)], [b])
            self._expands[id(stacked)] = paged.prepared(slices)
        return self._expands[id(stacked)]

    # ---- steps -------------------------------------------------------------------------------

    def update_metadata(
        self,
        mapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self._tokens.assign(self.token_lora_indices)
        self._prompts.assign(self.sampler_indices)

    # ---- products ----------------------------------------------------------------------------

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        if not add_inputs:
            y.zero_()
        if self._tokens.any:
            y, x = rows_of(y), rows_of(x)
            slices = self._slices_of(lora_b_stacked[0])
            paged.add_(y, x, slices, self._tokens.of(x), scale=scale)

    def add_shrink(
        self,
        y: tuple[Tensor, ...] | Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        if not self._tokens.any:
            return
        x = rows_of(x)
        for part, stacked in zip(y, lora_a_stacked, strict=True):
            s = paged.shrunk(x, self._pages_of(stacked), self._tokens.of(x))
            part.add_(s.view_as(part), alpha=scale)

    def _add_whole(self, y: Tensor, x: Tensor, b: Tensor, rows: Tensor, scale: float) -> None:
        paged.add_(y, x, self._slices_of(b), rows, scale=scale)

    def _add_expanded(self, y: Tensor, s: Tensor, b: Tensor, column: int) -> None:
        if self._tokens.any:
            paged.add_(y, s, self._expand_of(b), self._tokens.of(s), column=column)


Found = TypeVar("Found")


def _known(by_id: dict[int, Found], stacked: Tensor) -> Found:
    found = by_id.get(id(stacked))
    if found is None:
        raise not_ours(stacked)
    return found
