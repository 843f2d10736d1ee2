"""What the wrappers of every device share: the calls of vLLM's layers, down to one product."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from peft_kernels.integrations.vllm import pages as paged
from peft_kernels.integrations.vllm.pages import Pages
from peft_kernels.integrations.vllm.prompt_rows import tokens_of


class StepRows(Protocol):
    """The adapters of a step's tokens, or of its rows of logits, as a device's kernels read."""

    present: list[int]  # the slots that rows have

    def of(self, x: Tensor) -> Any:
        """Those of x's rows: rows beyond the step's own have none."""

    def part(self, rows: slice) -> Any:
        """Those of some of the step's rows."""


class PunicaWrapperOfLayers(PunicaWrapperBase):
    """One that is told of each layer which is given it, by way of ``set_mapping``."""

    _tokens: StepRows
    _prompts: StepRows

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device, **kwargs: Any):
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self._units: dict[tuple[int, int], Tensor] = {}

    # ---- what a device has its own of --------------------------------------------------------

    def adopt(self, layer: BaseLayerWithLoRA) -> None:
        raise NotImplementedError

    def _pages_of(self, stacked: Tensor) -> Pages:
        raise NotImplementedError

    def _add_whole(self, y: Tensor, x: Tensor, b: Tensor, rows: Any, scale: float) -> None:
        """y += scale B A x, for all slices of the layer whose first B this is."""
        raise NotImplementedError

    def _add_expanded(self, y: Tensor, s: Tensor, b: Tensor, column: int) -> None:
        """y += B s for the step's tokens, in y's columns from ``column`` on."""
        raise NotImplementedError

    # ---- what all do alike -------------------------------------------------------------------

    def _units_of(self, b: Pages) -> Tensor:
        key = b.slots, b.rank
        if key not in self._units:
            self._units[key] = paged.units(b)
        return self._units[key]

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        own = tokens_of(x)
        step = self._prompts if own is None else self._tokens
        if any(self._pages_of(lora_b_stacked).known[slot] for slot in step.present):
            y, x = rows_of(y), rows_of(x)
            rows = step.of(x) if own is None else step.part(own)
            self._add_whole(y, x, lora_b_stacked, rows, scale)

    def add_expand(
        self,
        y: Tensor,
        x: tuple[Tensor, ...] | Tensor,
        lora_b_stacked: tuple[Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        y, column = rows_of(y), offset_start
        for i, b in enumerate(lora_b_stacked):
            self._expand(y, x[i], b, column, output_slices[i], add_inputs)
            column += output_slices[i]

    def add_lora_embedding(
        self,
        y: Tensor,
        x: Tensor,
        lora_b_stacked: Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        y = rows_of(y)
        self._expand(y, x, lora_b_stacked, 0, y.shape[1], add_inputs)

    def _expand(self, y, s, b, column: int, width: int, add_inputs: bool) -> None:
        if not add_inputs:
            y[:, column : column + width] = 0
        self._add_expanded(y, rows_of(s), b, column)

    def apply_lora_full_linear(
        self,
        y: Tensor,
        x: Tensor,
        weight_stacked: Tensor,
        bias_stacked: Tensor,
        module_enabled: Tensor,
    ) -> None:
        # A few requests by a few labels: gathering the weights costs nothing that matters.
        weights = weight_stacked[self.sampler_indices.clamp_min(0), 0].float()
        own = torch.bmm(weights, x.float().unsqueeze(2)).squeeze(2)
        y.copy_(self._select_full_linear_output(y, own, bias_stacked, module_enabled))


def rows_of(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.view(-1, tensor.shape[-1])


def not_ours(stacked: Tensor) -> RuntimeError:
    return RuntimeError(
        "peft_kernels serves vLLM's linear layers, embeddings and logits, and was called "
        f"with adapters of shape {tuple(stacked.shape)} of another layer; start vLLM with "
        "PEFT_KERNELS_VLLM=0 to serve this model on vLLM's own code"
    )
