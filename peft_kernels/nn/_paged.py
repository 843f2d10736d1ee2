"""Pages for the adapters of one linear layer: what is written there, read, trained and moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.nn._sharded import Beside, let_view, part_of
from peft_kernels.nn.lora_settings import init_adapter_
from peft_kernels.ops.multi_lora_linear import PAGE, LoRABank

if TYPE_CHECKING:
    from typing_extensions import Self


class Bound(NamedTuple):
    """Parameters that are views of the pages of one slot."""

    lora_a: nn.Parameter  # [r, k]
    lora_b: nn.Parameter  # [r, n]
    first: int  # row of the pages


class Paged(nn.Linear):
    """A linear layer with adapters in pages of 8 rank rows."""

    weight: nn.Parameter
    pages_a: Tensor
    pages_b: Tensor
    table: Tensor
    ranks: Tensor
    scales: Tensor
    fan_in_fan_out: bool
    _size: tuple[int, int]  # n and k
    _beside: Beside | None  # where the weight is a DTensor
    bound: dict[int, Bound]  # by slot

    def _add_pages(
        self, slots: int, pages: int, max_pages: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Empty ones, beside what this process has of the weight."""
        self.bound = {}
        n, k = self._size if self._beside is None else part_of(self._matrix(self.weight)).shape
        rows = pages * PAGE
        for name, shape, buffer_dtype in (
            ("pages_a", (rows, k), dtype),
            ("pages_b", (rows, n), dtype),
            ("table", (slots, max_pages), torch.int32),
            ("ranks", (slots,), torch.int32),
            ("scales", (slots,), torch.float32),
        ):
            buffer = torch.zeros(shape, dtype=buffer_dtype, device=device)
            self.register_buffer(name, buffer, persistent=False)

    def _matrix(self, weight: Tensor) -> Tensor:
        """``weight`` as [n, k], however it is stored."""
        return weight.T if self.fan_in_fan_out else weight

    @property
    def bank(self) -> LoRABank:
        """What the op reads."""
        held: Any = self._buffers  # as attributes, nn.Module would look for each in vain elsewhere
        return LoRABank(
            held["pages_a"], held["pages_b"], held["table"], held["ranks"], held["scales"]
        )

    @property
    def page_bytes(self) -> int:
        """What one page costs in A and B."""
        columns = self.pages_a.shape[1] + self.pages_b.shape[1]
        return PAGE * columns * self.pages_a.element_size()

    @torch.inference_mode(False)
    @torch.no_grad()
    def draw(self, r: int, init: str) -> tuple[Tensor, Tensor]:
        """A new A ``[r, k]`` and B ``[n, r]``: the first process's, where the weight is sharded."""
        n, k = self._size
        lora_a, lora_b = self.pages_a.new_empty(r, k), self.pages_b.new_empty(n, r)
        init_adapter_(lora_a, lora_b, init)
        if self._beside is not None:
            lora_a = self._beside.of_the_first(lora_a)
        return lora_a, lora_b

    # Writes go through .data: whoever writes knows that no graph reads those rows any more, and
    # graphs that read others must not take the whole buffer for modified.

    @torch.inference_mode(False)
    @torch.no_grad()
    def write(
        self, slot: int, pages: Sequence[int], lora_a: Tensor, lora_b: Tensor, scale: float
    ) -> None:
        """Puts an adapter into a slot that nothing reads now.

        Args:
            slot: its number.
            pages: ``ceil(r / 8)`` of them, which are that slot's alone.
            lora_a, lora_b: ``[r, k]`` and ``[n, r]`` on any device, in any floating dtype.
            scale: the factor of its update.
        """
        r = lora_a.shape[0]
        rows = self._rows(pages, r)
        for which, (buffer, matrix) in enumerate(
            ((self.pages_a, lora_a), (self.pages_b, lora_b.T))
        ):
            if self._beside is not None:
                matrix = self._beside.part(matrix.to(buffer.device), which)
            buffer.data.index_copy_(0, rows, matrix.to(buffer.device, buffer.dtype))
        self.table.data[slot, : len(pages)] = torch.tensor(pages, dtype=torch.int32, device="cpu")
        self.scales.data[slot] = scale
        self.ranks.data[slot] = r

    @torch.inference_mode(False)
    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Has the adapter in a slot that nothing reads now leave this layer as it is."""
        self.ranks.data[slot] = 0

    @torch.inference_mode(False)
    @torch.no_grad()
    def read(self, pages: Sequence[int], r: int) -> tuple[Tensor, Tensor]:
        """Copies of A ``[r, k]`` and B ``[n, r]`` of an adapter in these pages."""
        rows = self._rows(pages, r)
        a, b = self._whole(self.pages_a[rows], self.pages_b[rows])
        return a, b.T.contiguous()

    def _whole(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A ``[r, k]`` and B^T ``[r, n]``, of which this process has these parts."""
        beside = self._beside
        return (a, b) if beside is None else (beside.whole(a, 0), beside.whole(b, 1))

    def _rows(self, pages: Sequence[int], r: int) -> Tensor:
        """The rows of the buffers that hold the r rank rows of an adapter in these pages."""
        rows = [page * PAGE + row for page in pages for row in range(PAGE)]
        return torch.tensor(rows[:r], dtype=torch.int64, device=self.pages_a.device)

    @torch.inference_mode(False)
    def bind(self, slot: int, page: int, r: int, known: Bound | None = None) -> None:
        """Makes A and B of a slot, whose pages follow ``page``, into Parameters.

        Args:
            slot: the adapter's place in the bank.
            page: the first of its pages.
            r: its rank.
            known: Parameters of the same shapes that become views of these pages.
        """
        a, b = self._views(page * PAGE, r)
        if known is None:
            a, b = self._whole(a, b)
            self.bound[slot] = Bound(nn.Parameter(a), nn.Parameter(b), page * PAGE)
        else:
            let_view(known.lora_a, a)
            let_view(known.lora_b, b)
            known.lora_a.grad = known.lora_b.grad = None  # they were the old values'
            self.bound[slot] = known._replace(first=page * PAGE)

    def check_in_pages(self, slot: int) -> None:
        """Raises a RuntimeError unless a slot's Parameters, if it has any, lie in its pages."""
        if (one := self.bound.get(slot)) is None:
            return
        views = self._views(one.first, one.lora_a.shape[0])
        for parameter, view in zip((one.lora_a, one.lora_b), views, strict=True):
            if part_of(parameter).data_ptr() != view.data_ptr():
                raise RuntimeError(
                    "its Parameters were given other memory (p.data = ..., vector_to_parameters), "
                    "which isn't served: put the former .data back, or replace() the adapter, and "
                    "write into them in place (p.data.copy_(...))"
                )

    def _views(self, first: int, r: int) -> tuple[Tensor, Tensor]:
        return self.pages_a.data[first : first + r], self.pages_b.data[first : first + r]

    @torch.inference_mode(False)
    def unbind(self, slot: int) -> Bound | None:
        """Gives the Parameters of a slot, if it has any, memory of their own.

        An optimizer that still has them then no longer writes into the pages.
        """
        one = self.bound.pop(slot, None)
        if one is not None:
            for parameter in (one.lora_a, one.lora_b):
                let_view(parameter, part_of(parameter).clone())
        return one

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if fn(self.scales[:0]).is_meta:
            raise RuntimeError(
                "a model in an AdapterPool can't go to the meta device, where its adapters would "
                "be lost; detach the pool first"
            )
        self._check_stays_sharded(fn)
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype is not torch.float32:
            self.scales = scales.to(self.scales.device)
        for lora_a, lora_b, first in self.bound.values():
            views = self._views(first, lora_a.shape[0])
            for parameter, view in zip((lora_a, lora_b), views, strict=True):
                let_view(parameter, view)
                if parameter.grad is not None and self._beside is None:
                    parameter.grad.data = fn(parameter.grad.data)
        return self

    def _check_stays_sharded(self, fn: Callable[[Tensor], Tensor]) -> None:
        """That ``fn`` leaves DTensors as they are, which can't be given other memory in place."""
        if self._beside is None or not self.bound:
            return
        old, new = self.pages_a[:0], fn(self.pages_a[:0])
        if (old.dtype, old.device) != (new.dtype, new.device):
            raise RuntimeError(
                "a pool's trainable adapters can't be moved or cast once the layer is sharded: do "
                "that before create() or load(..., trainable=True)"
            )

    @torch.inference_mode(False)
    @torch.no_grad()
    def keep_part(self, source: int | None = 0) -> None:
        """Of the pages, keeps what goes beside this process's part of the weight, a DTensor.

        Trained adapters get other Parameters, DTensors too.

        Args:
            source: the process whose pages are divided; None if all have the same.
        """
        beside = Beside.of(self._matrix(self.weight))
        assert beside is not None
        self.pages_a = beside.part(self.pages_a, 0, source)
        self.pages_b = beside.part(self.pages_b, 1, source)
        self._beside = beside
        for slot, old in list(self.bound.items()):
            self.bind(slot, old.first // PAGE, old.lora_a.shape[0])
            for former, parameter in zip(old[:2], self.bound[slot][:2], strict=True):
                parameter.requires_grad_(former.requires_grad)
