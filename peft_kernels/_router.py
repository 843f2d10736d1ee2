"""Carries a route's choice of adapters down to the layers of a model."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from peft_kernels.ops._dropout import draw_seed
from peft_kernels.ops.multi_lora_linear import BankDropout, Routing, sort_by_adapter

Ids = Sequence[str | None] | Sequence[Sequence[str | None]]
Buffers = dict[tuple[torch.device, int], Tensor]


def flat_names(ids: Ids) -> list[str | None]:
    """The entries of a route, one after the other; or a TypeError or ValueError."""

    def is_list(value: object) -> bool:
        return isinstance(value, Sequence) and not isinstance(value, str | bytes)

    rows: list[Any] = list(ids) if is_list(ids) else [ids]
    if is_list(ids) and any(map(is_list, rows)):
        lengths = {len(row) if is_list(row) else -1 for row in rows}
        if len(lengths) > 1:
            raise ValueError(f"ids by token must be lists of one length; got {ids!r}")
        rows = [name for row in rows for name in row]
    if not is_list(ids) or not all(name is None or isinstance(name, str) for name in rows):
        raise TypeError(f"ids must be a sequence of names and Nones, or of such; got {ids!r}")
    return rows


class OnDevice(NamedTuple):
    """A selection's tensors on one device."""

    routing: Routing
    p: Tensor | None  # [slots] float64; None if no adapter has dropout
    seeds: Tensor | None  # [slots] int64, what tells one adapter's masks from another's

    def dropout(self) -> BankDropout | None:
        """Masks for one call of a layer: one number from torch's generator, as LoRALinear draws."""
        if self.p is None or self.seeds is None:
            return None
        return BankDropout(self.p, self.seeds ^ draw_seed(self.p.device))


class Selection:
    """What one route chooses, the same for every layer.

    A CPU kernel gets the ids alone. A GPU gets them in one copy that nobody waits for, and sorts
    the rows itself, once for all layers. While gradients are off, the result goes into a buffer of
    this thread that keeps its address, so that a CUDA graph captured in one route can be replayed
    in another. An autograd graph keeps its tensors, so while gradients are on they are new ones.

    Args:
        ids: each row's slot, or -1.
        slots: how many there are.
        trained: the slots whose adapters may want gradients.
        dropout: (p, seed) by slot, for the adapters that have dropout.
        buffers: the thread's, by device and number of ids.
        on_graph: is told of a tensor that lives as long as any graph does that reads the adapters.
    """

    def __init__(
        self,
        ids: Sequence[int],
        slots: int,
        *,
        trained: tuple[int, ...] = (),
        dropout: Mapping[int, tuple[float, int]] | None = None,
        buffers: Buffers | None = None,
        on_graph: Callable[[Tensor], object] = lambda ids: None,
    ) -> None:
        self.trained = trained
        self._count, self._slots = len(ids), slots
        self._dropout = dropout or {}
        self._buffers: Buffers = {} if buffers is None else buffers
        self._on_graph = on_graph
        self._on: dict[tuple[torch.device, bool], OnDevice] = {}
        with torch.inference_mode(False):
            self._ids = torch.tensor(ids, dtype=torch.int32)

    def on(self, device: torch.device) -> OnDevice:
        """The tensors on ``device`` for the present grad mode."""
        key = (device, torch.is_grad_enabled())
        found = self._on.get(key)
        if found is None:
            found = self._on[key] = self._make(device, for_graphs=key[1])
        return found

    def prepare(self, devices: Iterable[torch.device]) -> None:
        """Makes the tensors now, and fills the buffers that CUDA graphs may read."""
        for device in devices:
            self.on(device)
            if (device, self._count) in self._buffers:
                self._on[device, False] = self._make(device, for_graphs=False)

    @torch.inference_mode(False)
    def _make(self, device: torch.device, *, for_graphs: bool) -> OnDevice:
        if not _reads_sorted(device):
            routing = Routing(self._ids.clone())
        else:
            ids = self._ids
            if device.type == "cuda":
                ids = ids.pin_memory()  # else the host would wait for the copy
            ids = ids.to(device, non_blocking=True)
            packed = torch.cat((ids, *sort_by_adapter(ids, self._slots)))
            if not for_graphs:
                packed = self._buffer(packed).copy_(packed)
            routing = _unpacked(packed, self._count)
        if for_graphs:
            self._on_graph(routing.ids)
        if not self._dropout:
            return OnDevice(routing, None, None)
        p, seeds = [0.0] * self._slots, [0] * self._slots
        for slot, (share, seed) in self._dropout.items():
            p[slot], seeds[slot] = share, seed
        return OnDevice(
            routing,
            torch.tensor(p, dtype=torch.float64, device=device),
            torch.tensor(seeds, dtype=torch.int64, device=device),
        )

    def _buffer(self, like: Tensor) -> Tensor:
        key = (like.device, self._count)
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(like)
        return self._buffers[key]


def _reads_sorted(device: torch.device) -> bool:
    """Whether kernels of this device read ``order`` and ``starts``."""
    return device.type != "cpu"


def _unpacked(packed: Tensor, count: int) -> Routing:
    """ids, order and starts from one tensor of them."""
    return Routing(packed[:count], packed[count : 2 * count], packed[2 * count :])


def unrouted(slots: int, device: torch.device) -> Tensor:
    """The packed routing of rows that have no adapter, which one id serves: see ``_unpacked``."""
    return torch.tensor([-1, 0, *[0] * (slots + 1), 1], dtype=torch.int32, device=device)


def unrouted_routing(packed: Tensor) -> Routing:
    """The routing that :func:`unrouted` holds."""
    return _unpacked(packed, 1) if _reads_sorted(packed.device) else Routing(packed[:1])


class _Thread:
    """What one thread has routed."""

    def __init__(self) -> None:
        self.selection: Selection | None = None
        self.routed = False  # whether its last forward was
        self.buffers: Buffers = {}


class _Local(threading.local):
    def __init__(self) -> None:
        self.thread = _Thread()


class Router:
    """The selection in force, which is each thread's own; the layers of one pool share a router."""

    def __init__(self) -> None:
        self._local = _Local()
        # Autograd's threads see the context variables of the thread that called backward.
        self._caller: ContextVar[weakref.ref[_Thread]] = ContextVar("peft_kernels_caller")
        self.devices: tuple[torch.device, ...] | None = None  # of the layers; None when not known

    def __deepcopy__(self, memo: object) -> NoReturn:
        self._refuse()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TypeError(
            "a model in an AdapterPool can't be copied or pickled: the copy would have no pool. "
            "Detach the pool first, or copy the state_dict, which is the base model's"
        )

    @property
    def buffers(self) -> Buffers:
        """This thread's, for a :class:`Selection`."""
        return self._local.thread.buffers

    @contextmanager
    def use(self, selection: Selection, devices: Iterable[torch.device]) -> Iterator[None]:
        """Has this thread's forwards take their adapters from ``selection``."""
        thread = self._local.thread
        self._caller.set(weakref.ref(thread))
        previous, thread.selection = thread.selection, selection
        try:
            selection.prepare(devices)
            yield
        finally:
            thread.selection = previous
            if previous is not None:
                previous.prepare(devices)  # its buffers may have been filled anew

    def current(self) -> Selection | None:
        """What a layer's forward must use now; None outside of any route."""
        thread = self._local.thread
        if torch.compiler.is_compiling():
            return thread.selection
        if torch._C._current_graph_task_id() == -1:
            thread.routed = thread.selection is not None
            return thread.selection
        # A backward computes a checkpointed forward again, for a GPU on a thread of autograd's.
        thread = self._caller_of_backward() or thread
        if thread.selection is None and thread.routed:
            raise RuntimeError(
                "a routed forward is computed again (gradient checkpointing) outside of its route; "
                "call backward() inside the route's with-block"
            )
        return thread.selection

    def _caller_of_backward(self) -> _Thread | None:
        if not torch._C._is_key_in_tls("context"):
            return None
        reference = torch._C._get_obj_in_tls("context").get(self._caller)
        return reference() if reference else None
