"""A pool in its model: its layers in place of the model's own, and out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peft_kernels.calls.carried import unwrap, wrap
from peft_kernels.calls.router import Router
from peft_kernels.calls.rows import place_of
from peft_kernels.codes.layers import readable
from peft_kernels.models.fast_paths import choose_fast_paths, has_adapters
from peft_kernels.models.freezing import freeze
from peft_kernels.models.in_place import keep_in_place, let_go
from peft_kernels.models.input_grads import let_gradients_be, let_gradients_through
from peft_kernels.models.resizing import choose_resizing
from peft_kernels.models.swap import named, replace_modules
from peft_kernels.models.targets import required_targets
from peft_kernels.modules.bases import check_bases
from peft_kernels.modules.fully_sharded import reshard
from peft_kernels.modules.names import plain_parameters, unwrapped
from peft_kernels.modules.replaced import fault_of_instance
from peft_kernels.nn._gathered import check_can_leave
from peft_kernels.nn.multi_lora import MultiLoRALinear, holders, zero_grads
from peft_kernels.nn.multi_lora_codes import QuantizedMultiLoRALinear
from peft_kernels.ops.multi_lora_linear import PAGE
from peft_kernels.pool.store import Store

if TYPE_CHECKING:
    from typing_extensions import Self


class Attached:
    """What of a pool goes into a model and leaves it."""

    _model: nn.Module
    _store: Store
    _router: Router
    _thawed: Sequence[str]  # what required gradients before
    _holders: Sequence[nn.Module]  # whose zero_grad() is told of the layers below
    _slots: int
    _max_rank: int
    _task_type: str | None

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        target_modules: str | Iterable[str],
        *,
        capacity: int,
        max_rank: int = 64,
        max_adapters: int | None = None,
        adapter_dtype: torch.dtype | None = None,
        evict: str | None = None,
        unrouted: str = "base",
        exclude_modules: str | Iterable[str] | None = None,
        layers_to_transform: int | Sequence[int] | None = None,
        layers_pattern: str | Sequence[str] | None = None,
        task_type: str | None = None,
    ) -> Self:
        """Swaps MultiLoRALinear into ``model``, in place, and freezes all of it.

        A RuntimeWarning names another method's parameters that trained until now. A head is frozen
        without one, for most are served: unfreeze a new one to train it with :meth:`create`.
        :meth:`detach` has all of them train again.

        The model may be moved and cast afterwards; its adapters go with it. While it is in a pool
        it can't be deep-copied or pickled; its state dict is the base model's.

        Args:
            model: any module; the layers to replace are below it, and must be plain linear layers.
            target_modules, exclude_modules, layers_to_transform, layers_pattern: which layers, as
                in :func:`peft_kernels.swap_linear`.
            capacity: the rank rows that each layer has room for, rounded up to whole pages of 8. An
                adapter of rank r takes r of them, rounded up likewise.
            max_rank: the highest rank of one adapter, rounded up likewise.
            max_adapters: how many adapters fit at most; by default as many as a layer has pages.
            adapter_dtype: of the adapters: float32, or the dtype of the base, which is the default.
            evict: ``"lru"`` lets an adapter that doesn't fit take the place of those that were
                routed longest ago. Pinned ones, those in use and those in training stay.
            unrouted: what a forward without a route gets: ``"base"``, the base model, or
                ``"error"``, a RuntimeError, for a server in which every row has a tenant.
            task_type: PEFT's name of the task, which :meth:`save` writes.

        Raises:
            ValueError: a pattern that selects nothing, or a value out of range.
            TypeError: a target that isn't a plain linear layer, or a value of the wrong type.

        Nothing is changed when one is raised.
        """
        given, model = model, unwrapped(model)
        targets = required_targets(
            model,
            target_modules,
            exclude_modules=exclude_modules,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            task_type=task_type,
        )
        in_codes = readable(targets)
        reshard(model)
        check_bases(model, targets, takes_values=True, may_be_sharded=True, in_codes=in_codes)
        pages = _pages_for("capacity", capacity)
        max_pages = min(_pages_for("max_rank", max_rank), pages)
        slots = pages if max_adapters is None else _positive("max_adapters", max_adapters)
        if evict not in (None, "lru"):
            raise ValueError(f"evict must be None or 'lru'; got {evict!r}")
        if unrouted not in ("base", "error"):
            raise ValueError(f"unrouted must be 'base' or 'error'; got {unrouted!r}")

        self = cls.__new__(cls)
        self._model, self._max_rank = model, max_pages * PAGE
        self._router, self._slots = Router(refuses=unrouted == "error"), slots
        self._task_type = task_type
        parameters = plain_parameters(model)  # by name: parallelize_module makes others
        self._thawed = [name for name, p in parameters.items() if p.requires_grad]
        try:
            layers: dict[str, MultiLoRALinear] = {}
            for name, module in targets.items():
                with named(name):
                    kind = QuantizedMultiLoRALinear if module in in_codes else MultiLoRALinear
                    layers[name] = kind.from_linear(
                        module,
                        slots=slots,
                        pages=pages,
                        max_pages=max_pages,
                        router=self._router,
                        adapter_dtype=adapter_dtype,
                        place=place_of(model, name),
                    )
        except BaseException:
            self._thaw()
            raise
        self._store = Store(
            layers, pages=pages, slots=slots, router=self._router, lru=evict == "lru"
        )
        replace_modules(model, {targets[name]: layer for name, layer in layers.items()})
        freeze(model, train_head=False)
        keep_in_place(model, layers.values())
        choose_fast_paths(model)
        choose_resizing(model)
        let_gradients_through(model)
        for method, around in self._arounds():
            if callable(getattr(model, method, None)):
                wrap(model, method, around)
        self._holders = holders(given)
        for module in self._holders:
            wrap(module, "zero_grad", zero_grads)
        return self

    def _arounds(self) -> list[tuple[str, Callable[..., Any]]]:
        """What goes around which of the model's methods."""
        packing = ("generate_batch", "init_continuous_batching")
        return [
            ("_call_impl", self._router.around_call),
            ("generate", self._router.around_generate),
            *((method, self._router.around_packing) for method in packing),
        ]

    def _thaw(self) -> None:
        parameters = plain_parameters(self._model)
        for name in parameters.keys() & self._thawed:
            parameters[name].requires_grad_(True)

    def detach(self) -> None:
        """Puts the model's own layers back, with their Parameters, and drops all adapters.

        What required gradients before :meth:`attach` does so again. Parameters of trainable
        adapters keep their values, in memory of their own. The pool has no layers any more.

        Raises:
            RuntimeError: a route is open, in this thread or another; a weight is in codes that
                fully_shard holds.
            TypeError: a layer was given another forward, was compiled by itself, parametrized,
                pruned or the like.

        Nothing is changed when one is raised.
        """
        for name, layer in self._store.layers.items():
            if fault := fault_of_instance(layer):
                raise TypeError(f"{name} {fault}")
            check_can_leave(name, layer)
        layers = self._store.close()
        for method, around in self._arounds():
            unwrap(self._model, method, around)
        for module in self._holders:
            unwrap(module, "zero_grad", zero_grads)
        let_go(self._model, layers.values())
        replace_modules(self._model, {layer: layer.plain() for layer in layers.values()})
        choose_fast_paths(self._model)
        choose_resizing(self._model)
        if not has_adapters(self._model):
            let_gradients_be(self._model)
        self._thaw()
        self._thawed, self._holders = [], []


def _positive(argument: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument} must be an int; got {value!r}")
    if value < 1:
        raise ValueError(f"{argument} must be at least 1; got {value}")
    return value


def _pages_for(argument: str, rows: int) -> int:
    return -(-_positive(argument, rows) // PAGE)
