"""Many LoRA adapters on one linear layer, each row with its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels.calls.off import is_off
from peft_kernels.calls.router import Router, unrouted, unrouted_routing
from peft_kernels.calls.rows import Place
from peft_kernels.modules.bases import check_base, is_conv1d
from peft_kernels.modules.fully_sharded import is_gathered
from peft_kernels.modules.replaced import Origin, take_over
from peft_kernels.nn._gathered import (
    HandsOn,
    check_whole_in_calls,
    device_in_calls,
    share_parameters,
)
from peft_kernels.nn._sharded import Beside, let_view, part_of
from peft_kernels.nn.lora import check_weight
from peft_kernels.nn.lora_settings import adapter_dtype_for, init_adapter_
from peft_kernels.ops import QuantizedWeight
from peft_kernels.ops._sharded_banks import parts_beside
from peft_kernels.ops.multi_lora_linear import PAGE, LoRABank, Trained, multi_lora_linear


class Bound(NamedTuple):
    """Parameters that are views of the pages of one slot."""

    lora_a: nn.Parameter  # [r, k]
    lora_b: nn.Parameter  # [r, n]
    first: int  # row of the pages


class MultiLoRALinear(HandsOn, nn.Linear):
    """A frozen linear layer that adds to each row the update of that row's adapter.

    ``y[i] = weight @ x[i] + bias + scale_g * B_g @ A_g @ dropout_g(x[i])`` for the adapter g of row
    i (Chen et al. 2023, "Punica"), computed by :func:`peft_kernels.ops.multi_lora_linear`. Which
    adapters there are, and which rows have them, is up to an :class:`peft_kernels.AdapterPool`;
    outside of its routes the layer computes what its base computes. Dropout acts on the low-rank
    branch, in training mode only. The state dict is the base layer's.

    Parameters:
        weight: ``[n, k]``, frozen (``[k, n]`` when ``fan_in_fan_out``: taken from a Conv1D).
        bias: ``[n]`` or None, frozen.

    Buffers, none of them in the state dict:
        pages_a: ``[pages * 8, k]``, rank rows of A.
        pages_b: ``[pages * 8, n]``, rank rows of B transposed.
        table: ``[slots, max_pages]`` int32, the pages of the adapter in each slot.
        ranks: ``[slots]`` int32.
        scales: ``[slots]`` float32, whatever dtype the model is cast to.
        unrouted: the ids of rows outside of any route.

    Moving or casting the layer moves the pages along. Trained adapters' Parameters, which are views
    of the pages, stay the same objects and become views of the new ones.

    Where the weight is a DTensor, as tensor parallelism makes it, a process's pages hold what goes
    beside its part of the weight, and trained adapters' Parameters are DTensors.
    """

    weight: nn.Parameter
    pages_a: Tensor
    pages_b: Tensor
    table: Tensor
    ranks: Tensor
    scales: Tensor
    unrouted: Tensor
    router: Router
    place: Place
    fan_in_fan_out: bool
    _origin: Origin
    _size: tuple[int, int]  # n and k
    _beside: Beside | None  # where the weight is a DTensor
    bound: dict[int, Bound]  # by slot
    _gradient_rows: dict[tuple[tuple[int, int], ...], Tensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("MultiLoRALinear is built around a linear layer: use from_linear")

    @classmethod
    def from_linear(
        cls,
        linear: Any,
        *,
        slots: int,
        pages: int,
        max_pages: int,
        router: Router,
        adapter_dtype: torch.dtype | None = None,
        place: Place | None = None,
    ) -> MultiLoRALinear:
        """Builds the layer around ``linear``'s very Parameters, which it freezes.

        Args:
            linear: ``nn.Linear`` or ``transformers``' Conv1D.
            slots: how many adapters it can hold.
            pages: how many pages of 8 rank rows it has for them.
            max_pages: how many of those one adapter can have.
            router: tells the layer which adapters the rows have; shared by the model's layers.
            adapter_dtype: of the pages: float32 or the dtype of the weight, the default.
            place: where in its model it is.

        Raises:
            TypeError: as :meth:`LoRALinear.from_linear`, or a dtype that can't be mixed.
        """
        self = cls.__new__(cls)
        size, dtype = self._read_base(linear)
        dtype = adapter_dtype_for(dtype, adapter_dtype or dtype)
        nn.Module.__init__(self)
        self._size = size
        self.router, self.place = router, place or Place()
        self.bound = {}
        self._gradient_rows = {}
        self._adopt(linear, slots, pages, max_pages, dtype)
        return self

    @torch.inference_mode(False)
    def _adopt(
        self, linear: Any, slots: int, pages: int, max_pages: int, dtype: torch.dtype
    ) -> None:
        self.fan_in_fan_out = is_conv1d(linear)
        self.weight, self.bias = linear._parameters["weight"], linear.bias
        weight = self._matrix(self.weight)
        self.out_features, self.in_features = self._size
        self._beside = None if is_gathered(linear) else Beside.of(weight)
        n, k = self._size if self._beside is None else part_of(weight).shape
        device, rows = device_in_calls(weight), pages * PAGE
        for name, shape, buffer_dtype in (
            ("pages_a", (rows, k), dtype),
            ("pages_b", (rows, n), dtype),
            ("table", (slots, max_pages), torch.int32),
            ("ranks", (slots,), torch.int32),
            ("scales", (slots,), torch.float32),
        ):
            buffer = torch.zeros(shape, dtype=buffer_dtype, device=device)
            self.register_buffer(name, buffer, persistent=False)
        self.register_buffer("unrouted", unrouted(slots, device), persistent=False)
        self.train(linear.training)
        self._origin = take_over(linear, self)
        share_parameters(linear, self)
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad_(False)

    def _read_base(self, linear: Any) -> tuple[tuple[int, int], torch.dtype]:
        """The size [n, k] and the dtype of a layer, once this one can take its place."""
        check_base(linear, takes_values=True, may_be_sharded=True)
        check_whole_in_calls(linear)
        n, k = linear.weight.shape
        return (k, n) if is_conv1d(linear) else (n, k), linear.weight.dtype

    def _base(self) -> Tensor | QuantizedWeight:
        """The weight as the op takes it."""
        return self._matrix(self.weight)

    def _bias_for(self, x: Tensor) -> Tensor | None:
        return self.bias

    def _matrix(self, weight: Tensor) -> Tensor:
        """``weight`` as [n, k], however it is stored."""
        return weight.T if self.fan_in_fan_out else weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and "_origin" in self.__dict__:
            self._check_weight(value)
        super().__setattr__(name, value)

    def _check_weight(self, value: Any) -> None:
        check_weight(value, *self._size, self._matrix)

    def plain(self) -> nn.Module:
        """The layer whose place this took, with the Parameters, hooks and mode of this one."""
        return self._hand_on_to(self._origin.restore(self, self.weight, self.bias))

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

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., k]`` in the dtype of the base, any rank, to ``[..., n]``.

        Raises:
            ValueError: x' rows aren't those that the route has names for.
            RuntimeError: the route has ended, or there is none and the pool wants one.
        """
        selection = None if is_off(self) else self.router.current()
        routing, dropout, trained, plan = None, None, None, "auto"
        if selection is not None:
            selection = self.router.serving(selection, x, self.place)
            here = selection.on(x.device)
            routing, plan = here.routing, selection.plan(x)
            if self.training:
                dropout = here.dropout()
            if selection.trained and torch.is_grad_enabled():
                trained = self._trained(selection.trained)
        try:
            return multi_lora_linear(
                x,
                self._base(),
                self.bank,
                unrouted_routing(self.unrouted) if routing is None else routing,
                bias=self._bias_for(x),
                dropout=dropout,
                trained=trained,
                plan=plan,
            )
        except ValueError:
            self._check_weight(self.weight)  # a resize in place, of what it is tied to
            raise

    def _trained(self, slots: Sequence[int]) -> Trained | None:
        """Those of ``slots`` that want gradients here. Others must not get zeros for theirs."""
        found = [(slot, self.bound[slot]) for slot in slots if slot in self.bound]
        found = [
            (slot, one)
            for slot, one in found
            if one.lora_a.requires_grad or one.lora_b.requires_grad
        ]
        if not found:
            return None
        ranks = tuple((slot, one.lora_a.shape[0]) for slot, one in found)
        rows = self._first_rows(ranks)
        pairs: list[tuple[Tensor, Tensor]] = [(one.lora_a, one.lora_b) for _, one in found]
        if self._beside is not None:
            weight = self._matrix(self.weight)
            parts = [parts_beside(weight, a, b.T) for a, b in pairs]
            pairs = [(a, b.T) for a, b in parts]
        return Trained(rows, [a for a, _ in pairs], [b for _, b in pairs])

    def _first_rows(self, ranks: tuple[tuple[int, int], ...]) -> Tensor:
        """Where the gradients of each slot begin, when these (slot, rank) receive them."""
        if ranks in self._gradient_rows:
            return self._gradient_rows[ranks]
        rows, first = [-1] * self.ranks.shape[0], 0
        for slot, r in ranks:
            rows[slot] = first
            first += r
        with torch.inference_mode(False):
            tensor = torch.tensor(rows, dtype=torch.int32, device=self.ranks.device)
        if not torch.compiler.is_compiling():
            if len(self._gradient_rows) >= 64:
                self._gradient_rows.clear()
            self._gradient_rows[ranks] = tensor
        return tensor

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of what the layer has, and of the adapters that train in it."""
        super().zero_grad(set_to_none)
        for one in list(self.bound.values()):
            for parameter in (one.lora_a, one.lora_b):
                if set_to_none or parameter.grad is None:
                    parameter.grad = None
                else:
                    parameter.grad = torch.zeros_like(parameter.grad)

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MultiLoRALinear:
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
        self.router.devices = None
        self._gradient_rows.clear()
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

    def extra_repr(self) -> str:
        slots, max_pages = self.table.shape
        pages = self.pages_a.shape[0] // PAGE
        return f"{super().extra_repr()}, slots={slots}, pages={pages}, max_rank={max_pages * PAGE}"


def holders(model: nn.Module) -> list[nn.Module]:
    """The modules that have a MultiLoRALinear somewhere below them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    paths: set[str] = set()
    for path, module in modules.items():
        while isinstance(module, MultiLoRALinear) and path:
            path = path.rpartition(".")[0]
            paths.add(path)
    return list(dict.fromkeys(modules[path] for path in paths))


def zero_grads(module: nn.Module, proceed: Callable[..., None], set_to_none: bool = True) -> None:
    """Around a module's ``zero_grad``: adapters that train in layers below it are told too."""
    proceed(set_to_none)
    for layer in module.modules():
        if isinstance(layer, MultiLoRALinear):
            layer.zero_grad(set_to_none)
