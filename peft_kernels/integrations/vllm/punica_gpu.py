"""The class that vLLM's LoRA layers call on a GPU, on the kernels of many adapters."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from vllm.logger import init_logger
from vllm.lora.layers import BaseLayerWithLoRA, FusedMoEWithLoRA

from peft_kernels.integrations.vllm import pages as paged
from peft_kernels.integrations.vllm.layers import pairs_of
from peft_kernels.integrations.vllm.pages import Pages, Slices
from peft_kernels.integrations.vllm.plugin import LOGGER
from peft_kernels.integrations.vllm.routes import Routes
from peft_kernels.integrations.vllm.traced import lora_add, lora_shrink
from peft_kernels.integrations.vllm.wrapper import PunicaWrapperOfLayers, not_ours, rows_of


class Held(NamedTuple):
    """What a stacked tensor has with it, as its attribute ``peft_kernels``.

    There a graph that is traced finds it by way of the layer; an address would not be the same in
    the process that takes the graph out of vLLM's cache.
    """

    pages: Pages
    shrink: Slices | None = None  # the first A of a layer: of all slices
    expand: Slices | None = None  # a B without its A
    whole: Slices | None = None  # the first B of a layer: both products of all slices


class PunicaWrapperPEFTKernelsGPU(PunicaWrapperOfLayers):
    """What vLLM's ``PunicaWrapperBase`` asks for, in the Triton kernels of ``multi_lora_linear``.

    Semantics: those of the base class's methods, whose A and B are a layer's stacked tensors; they
    must be of a layer that was given this object (``set_mapping``). Sums are in float32, at the
    true rank of each adapter, and rounded once. A row without an adapter keeps its bits.

    Each product is one op in a compiled graph, and launches the same kernels whatever adapters a
    step has, on buffers that stay: a captured graph serves any step of its size. An op launches
    nothing where a step, or the one that was captured, has no adapter. Experts' LoRA is vLLM's own.
    """

    _tokens: Routes
    _prompts: Routes

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device, **kwargs: Any):
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        slots = kwargs["lora_config"].max_loras
        self._own = max_num_batched_tokens, max_batches, device, kwargs
        self._tokens = Routes(max_num_batched_tokens, slots, device)
        self._prompts = Routes(max_num_batched_tokens, slots, device)
        self._experts: Any = None
        init_logger(LOGGER).info_once("peft_kernels serves LoRA requests on its Triton kernels.")

    # ---- layers ------------------------------------------------------------------------------

    def adopt(self, layer: BaseLayerWithLoRA) -> None:
        if isinstance(layer, FusedMoEWithLoRA):
            self._serve_experts()
        pairs = pairs_of(layer)
        all_a, all_b = [a for a, _ in pairs if a], [b for _, b in pairs]
        is_whole = bool(pairs) and all(pair.is_whole for pair in pairs)
        for i, a in enumerate(all_a):
            shrink = None if i else paged.slices_of([own.rows for own in all_a], all_a)
            _attach(Held(a, shrink=shrink))
        for i, b in enumerate(all_b):
            whole = expand = None
            if not is_whole:
                b.units[:] = [self._units_of(b)]
                expand = paged.slices_of(b.units, [b])
            elif i == 0:
                whole = paged.slices_of([a.rows for a in all_a], all_b)
            _attach(Held(b, expand=expand, whole=whole))

    # ---- steps -------------------------------------------------------------------------------

    def update_metadata(
        self,
        mapping,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        rest = mapping, lora_index_to_id, max_loras, vocab_size
        self._update_base_metadata(*rest)
        slot_of = {name: i for i, name in enumerate(lora_index_to_id) if name is not None}
        self._tokens.assign(mapping.index_mapping, slot_of)
        self._prompts.assign(mapping.prompt_mapping, slot_of)
        if self._experts is not None:
            self._experts.update_metadata(*rest, **kwargs)

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
        self._add_whole(rows_of(y), rows_of(x), lora_b_stacked[0], self._tokens, scale)

    def add_shrink(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        a: Any = _held(lora_a_stacked[0]).shrink
        routes = self._tokens
        lora_shrink(
            y, rows_of(x), a.a, a.tables, a.ranks, a.scales,
            routes.ids, routes.order, routes.starts, routes.count, scale,
        )  # fmt: skip

    def _pages_of(self, stacked: Tensor) -> Pages:
        return _held(stacked).pages

    def _add_whole(self, y: Tensor, x: Tensor, b: Tensor, rows: Routes, scale: float) -> None:
        _add(y, x, _held(b).whole, rows, scale=scale)

    def _add_expanded(self, y: Tensor, s: Tensor, b: Tensor, column: int) -> None:
        _add(y, s, _held(b).expand, self._tokens, column=column)

    # ---- experts -----------------------------------------------------------------------------

    def _serve_experts(self) -> None:
        if self._experts is None:
            from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

            most, batches, device, rest = self._own
            self._experts = PunicaWrapperGPU(most, batches, device, **rest)

    @property
    def token_mapping_meta(self) -> Any:
        """What experts read of a step, where vLLM's own class has it."""
        return self._experts.token_mapping_meta

    def moe_lora_align_block_size(self, *args: Any, **kwargs: Any) -> Any:
        return self._experts.moe_lora_align_block_size(*args, **kwargs)

    def add_lora_fused_moe(self, *args: Any, **kwargs: Any) -> Any:
        return self._experts.add_lora_fused_moe(*args, **kwargs)

    def add_lora_w13(self, *args: Any, **kwargs: Any) -> Any:
        return self._experts.add_lora_w13(*args, **kwargs)

    def add_lora_w2(self, *args: Any, **kwargs: Any) -> Any:
        return self._experts.add_lora_w2(*args, **kwargs)


def _attach(held: Held) -> None:
    held.pages.stacked.peft_kernels = held  # type: ignore[attr-defined]


def _held(stacked: Tensor) -> Held:
    held = getattr(stacked, "peft_kernels", None)
    if held is None:
        raise not_ours(stacked)
    return held


def _add(
    y: Tensor, x: Tensor, slices: Any, routes: Routes, *, scale: float = 1.0, column: int = 0
) -> None:
    lora_add(
        y, x, slices.a, slices.b, slices.tables, slices.ranks, slices.scales,
        routes.ids, routes.order, routes.starts, routes.count, column, scale,
    )  # fmt: skip
