"""Carries a route's choice of adapters down to the layers of a model."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from peft_kernels.calls.carried import Carried, Frame, of_backward_s_caller
from peft_kernels.calls.rows import (
    Batch,
    Entries,
    Place,
    are_rows_of,
    is_batch_s,
    unfit,
    unfit_batch,
)
from peft_kernels.ops._dropout import draw_seed
from peft_kernels.ops.multi_lora_linear import BankDropout, Routing, plan_of, sort_by_adapter


class Buffer:
    """Memory that CUDA graphs may read, and whose ids it holds now."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.filled_for: object = None


Buffers = dict[tuple[torch.device, int], Buffer]


class OnDevice(NamedTuple):
    """A selection's tensors on one device."""

    routing: Routing
    p: Tensor | None  # [slots] float64; None if no adapter has dropout
    seeds: Tensor | None  # [slots] int64, what tells one adapter's masks from another's
    packed: Tensor | None  # the routing as one tensor, where kernels read it sorted

    def dropout(self) -> BankDropout | None:
        """Masks for one call of a layer: one number from torch's generator, as LoRALinear draws."""
        if self.p is None or self.seeds is None:
            return None
        return BankDropout(self.p, self.seeds ^ draw_seed(self.p.device))


class Selection:
    """What one route chooses, the same for every layer.

    A CPU kernel gets the ids alone. A GPU gets them in one copy that nobody waits for, and sorts
    the rows itself, once for all layers. While gradients are off, the result is also in a buffer of
    this thread that keeps its address, so that a CUDA graph captured in one route can be replayed
    in another. Only the thread that entered the route reads that, filled for this very route: other
    threads and tasks may be in it too, and compiled code doesn't look who else has filled it.

    Args:
        ids: each row's slot, or -1.
        slots: how many there are.
        entries: whether the ids are of rows or of tokens; of rows by default.
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
        entries: Entries | None = None,
        trained: tuple[int, ...] = (),
        dropout: Mapping[int, tuple[float, int]] | None = None,
        buffers: Buffers | None = None,
        on_graph: Callable[[Tensor], object] = lambda ids: None,
    ) -> None:
        self.trained = trained
        self.entries = entries or Entries(len(ids))
        self.flat: set[int] = set()  # how many rows inputs had that were tokens on end
        # Whether a forward had it that no backward computed again.
        self.served = torch._C._current_graph_task_id() != -1
        self._list, self._parts = list(ids), dict[Entries, Selection]()
        self._plan = plan_of(ids)
        self._count, self._slots = len(ids), slots
        self._dropout = dropout or {}
        self._buffers: Buffers = {} if buffers is None else buffers
        self._thread: int | None = threading.get_ident()
        self._mark = object()
        self._on_graph = on_graph
        self._on: dict[tuple[torch.device, bool], OnDevice] = {}
        self._in_buffer: dict[torch.device, OnDevice] = {}
        with torch.inference_mode(False):
            self._ids = torch.tensor(ids, dtype=torch.int32, device="cpu")

    def on(self, device: torch.device) -> OnDevice:
        """The tensors on ``device`` for the present grad mode."""
        key = (device, torch.is_grad_enabled())
        found = self._on.get(key)
        if found is None:
            found = self._on[key] = self._make(device, for_graphs=key[1])
        if key[1] or torch.compiler.is_compiling() or not _reads_sorted(device):
            return found
        return self._buffered(device) if threading.get_ident() == self._thread else found

    def plan(self, x: Tensor) -> str:
        """The op's plan for x, whose rows the ids serve."""
        return self._plan if x.is_cuda and x.numel() == self._count * x.shape[-1] else "auto"

    def for_all(self) -> Selection | None:
        """The same with one entry for all rows, if all entries are the same."""
        return self._part(Entries(1), self._list[:1]) if len(set(self._list)) == 1 else None

    def for_rows(self) -> Selection | None:
        """The same with an entry for each row, if all entries by token of a row are the same."""
        rows, tokens = self.entries
        if not tokens or any(
            len(set(self._list[first : first + tokens])) > 1
            for first in range(0, self._count, tokens)
        ):
            return None
        return self._part(Entries(rows), self._list[::tokens])

    def _part(self, entries: Entries, ids: Sequence[int]) -> Selection:
        if entries not in self._parts:
            part = Selection(
                ids,
                self._slots,
                entries=entries,
                trained=self.trained,
                dropout=self._dropout,
                on_graph=self._on_graph,
            )
            part._thread = None  # has no buffers
            self._parts[entries] = part
        return self._parts[entries]

    def prepare(self, devices: Iterable[torch.device]) -> None:
        """Makes the tensors now, and fills the buffers that CUDA graphs may read.

        In any grad mode, for a capture may come in another: what it made itself, it would keep.
        """
        for device in devices:
            self.on(device)
            if _reads_sorted(device) and threading.get_ident() == self._thread:
                self._buffered(device)

    def _buffered(self, device: torch.device) -> OnDevice:
        """The tensors in this thread's buffer, which other routes may have filled meanwhile."""
        key, plain = (device, self._count), (device, False)
        if plain not in self._on:
            trained = self._on.get((device, True))
            self._on[plain] = trained or self._make(device, for_graphs=False)
        packed = self._on[plain].packed
        assert packed is not None
        if key not in self._buffers:
            self._buffers[key] = Buffer(torch.empty_like(packed))
        buffer = self._buffers[key]
        if buffer.filled_for is not self._mark:
            with torch.inference_mode(False):
                buffer.tensor.copy_(packed)
            buffer.filled_for = self._mark
        if device not in self._in_buffer:
            routing = _unpacked(buffer.tensor, self._count)
            self._in_buffer[device] = self._on[plain]._replace(routing=routing)
        return self._in_buffer[device]

    @torch.inference_mode(False)
    def _make(self, device: torch.device, *, for_graphs: bool) -> OnDevice:
        packed: Tensor | None = None
        if not _reads_sorted(device):
            routing = Routing(self._ids.clone())
        else:
            ids = self._ids
            if device.type == "cuda":
                ids = ids.pin_memory()  # else the host would wait for the copy
            ids = ids.to(device, non_blocking=True)
            packed = torch.cat((ids, *sort_by_adapter(ids, self._slots)))
            routing = _unpacked(packed, self._count)
        if for_graphs:
            self._on_graph(routing.ids)
        if not self._dropout:
            return OnDevice(routing, None, None, packed)
        p, seeds = [0.0] * self._slots, [0] * self._slots
        for slot, (share, seed) in self._dropout.items():
            p[slot], seeds[slot] = share, seed
        return OnDevice(
            routing,
            torch.tensor(p, dtype=torch.float64, device=device),
            torch.tensor(seeds, dtype=torch.int64, device=device),
            packed,
        )


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


def _computed_again(where: str) -> RuntimeError:
    return RuntimeError(
        f"a routed forward is computed again (gradient checkpointing) {where}; call backward() "
        "inside the route that the forward had, in its with-block"
    )


class _Local(threading.local):
    def __init__(self) -> None:
        self.buffers: Buffers = {}


# Of which routers the last forward was routed, as far as the running call knows.
_ROUTED: ContextVar[frozenset[int]] = ContextVar("peft_kernels_routed")
_NUMBER = itertools.count(1)


class Router:
    """The selection in force, which belongs to the call; the layers of one pool share a router.

    Args:
        refuses: whether a forward without a route is an error.
    """

    def __init__(self, refuses: bool = False) -> None:
        self.routes: Carried[Selection] = Carried("a pool's route")
        self.batches: Carried[Batch] = Carried("a call of the pool's model")
        self.generating: Carried[bool] = Carried("a generation of the pool's model")
        self.devices: tuple[torch.device, ...] | None = None  # of the layers; None when not known
        self._refuses, self._number = refuses, next(_NUMBER)
        self._local = _Local()

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
        return self._local.buffers

    @contextmanager
    def use(self, selection: Selection, devices: Iterable[torch.device]) -> Iterator[None]:
        """Has the forwards of this call take their adapters from ``selection``."""
        outer, frame = self.routes.top(), self.routes.enter(selection)
        try:
            selection.prepare(devices)
            yield
        finally:
            self.routes.leave(frame)
            if outer is not None and outer.value is not None:
                outer.value.prepare(devices)  # its buffers may have been filled anew

    def current(self) -> Selection | None:
        """What a layer's forward must use now; None outside of any route."""
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise RuntimeError(
                "a model with an AdapterPool can't be put into a graph by torch.jit.trace or "
                "torch.export, which would keep today's route and slots, whoever has them later: "
                "trace a model with the one adapter (pool.save(), load_adapter()), or "
                "torch.compile this one"
            )
        frame = self.routes.top()
        compiling = torch.compiler.is_compiling()
        # A backward computes a checkpointed forward again, for a GPU on a thread of autograd's.
        again = not compiling and torch._C._current_graph_task_id() != -1
        if frame is not None and frame.value is not None:
            if again and not frame.value.served:
                raise _computed_again("in a route that it didn't have")
            if not compiling:
                self._note(True)
                frame.value.served = True
            return frame.value
        if again:
            if frame is not None or self._number in self._routed():
                raise _computed_again("outside of its route")
            return None
        self.routes.get()  # says that the route has ended
        if self._refuses:
            raise RuntimeError(
                "the model has an AdapterPool that was attached with unrouted='error', and this "
                "forward has no route: run it in pool.route(...), hand pool.bind(function, ids) to "
                "the thread that runs it, or pool.route([None]) for the base model"
            )
        if not compiling:
            self._note(False)
        return None

    def tells_rows_apart(self) -> bool:
        """Whether the route has more than one entry."""
        frame = self.routes.top()
        return frame is not None and frame.value is not None and frame.value.entries != (1, None)

    # ---- which rows -----------------------------------------------------------------------------

    def serving(self, selection: Selection, x: Tensor, place: Place) -> Selection:
        """The selection whose entries serve equal parts of x's rows; or a ValueError."""
        entries = selection.entries
        if entries == (1, None):
            return selection
        batch = self.batches.get()
        if place.is_unsure(x.shape, batch):
            part = selection.for_all()
            if part is None:
                raise unfit(entries, x.shape, batch, place)
            return part
        if place.apart is None and x.dim() > 2 and entries == (x.shape[0], None):
            return selection
        repeats = self.generating.get() is not None
        if place.apart is None and are_rows_of(entries, x.shape, batch, repeats):
            if batch is not None and not torch.compiler.is_compiling():
                selection.flat.add(x.shape[0])
            return selection
        other = self._serving_otherwise(selection, x, place, batch, repeats)
        if other is None:
            raise unfit(entries, x.shape, batch, place)
        return other

    def _serving_otherwise(
        self, selection: Selection, x: Tensor, place: Place, batch: Batch | None, repeats: bool
    ) -> Selection | None:
        if 0 in x.shape[:-1]:
            return selection
        part = None
        if place.apart is not None:
            fits = batch is None or is_batch_s(selection.entries, batch, repeats)
            part = selection.for_all() if fits else None
        elif x.dim() == 2 and x.shape[0] == selection.entries.rows:
            part = selection.for_rows()
        elif x.dim() == 2 and not torch.compiler.is_compiling():
            # A backward computes again what a forward of the model computed.
            again = torch._C._current_graph_task_id() != -1 and x.shape[0] in selection.flat
            return selection if again else None
        if part is not None and x.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{place.name} can't be captured in a CUDA graph in this route; route one name"
            )
        return part

    def around_call(
        self, module: nn.Module, proceed: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Around the model's calls: notes what the model was called with."""
        frame = self.routes.top()
        batch = None if frame is None else Batch.of(args, kwargs)
        if frame is None or frame.value is None or batch is None:
            return proceed(*args, **kwargs)
        repeats = self.generating.get() is not None
        if batch.is_tokens and not is_batch_s(frame.value.entries, batch, repeats):
            raise unfit_batch(frame.value.entries, batch)
        if torch.compiler.is_compiling():
            return proceed(*args, **kwargs)
        # Not closed afterwards: a checkpointed forward that is computed again has the same batch.
        with self.batches.restored((Frame(batch),)):
            return proceed(*args, **kwargs)

    def around_generate(
        self, module: nn.Module, proceed: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Around the model's generate: a row's copies (beams, sequences) have its adapter."""
        selection, batch = self.routes.get(), Batch.of(args, kwargs)
        if selection is None:
            return proceed(*args, **kwargs)
        if selection.entries.tokens is not None:
            raise ValueError(
                f"{selection.entries.said()}, and each step of generate has other tokens: route "
                "one name for each row"
            )
        if batch is not None and not is_batch_s(selection.entries, batch, False):
            raise unfit_batch(selection.entries, batch)
        with self.generating.within(True):
            return proceed(*args, **kwargs)

    def around_packing(
        self, module: nn.Module, proceed: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Around what runs packed rows in a thread of its own, where no route is."""
        if self.routes.get() is not None:
            raise ValueError(
                "continuous batching packs several requests into one row, and runs in a thread "
                "that has no route: use pool.continuous_batching(), outside of any route, whose "
                "requests name their adapters"
            )
        return proceed(*args, **kwargs)

    def _note(self, is_routed: bool) -> None:
        found = self._routed()
        if (self._number in found) is not is_routed:
            _ROUTED.set(found ^ {self._number})

    def _routed(self) -> frozenset[int]:
        found = _ROUTED.get(None)
        nothing: frozenset[int] = frozenset()
        return of_backward_s_caller(_ROUTED, nothing) if found is None else found
