"""Many LoRA adapters on one linear layer, each row with its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
from peft_kernels.nn._paged import Bound, Paged
from peft_kernels.nn._sharded import Beside
from peft_kernels.nn.lora import check_weight
from peft_kernels.nn.lora_settings import adapter_dtype_for
from peft_kernels.ops import QuantizedWeight
from peft_kernels.ops._sharded_banks import parts_beside
from peft_kernels.ops.multi_lora_linear import PAGE, Trained, multi_lora_linear

__all__ = ["Bound", "MultiLoRALinear", "holders", "zero_grads"]


class MultiLoRALinear(Paged, HandsOn, nn.Linear):
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
    unrouted: Tensor
    router: Router
    place: Place
    _origin: Origin
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
        device = device_in_calls(weight)
        self._add_pages(slots, pages, max_pages, device, dtype)
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

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and "_origin" in self.__dict__:
            self._check_weight(value)
        super().__setattr__(name, value)

    def _check_weight(self, value: Any) -> None:
        check_weight(value, *self._size, self._matrix)

    def plain(self) -> nn.Module:
        """The layer whose place this took, with the Parameters, hooks and mode of this one."""
        return self._hand_on_to(self._origin.restore(self, self.weight, self.bias))

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MultiLoRALinear:
        super()._apply(fn, recurse)
        self.router.devices = None
        self._gradient_rows.clear()
        return self

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
