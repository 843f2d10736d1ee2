"""What an adapter pool holds, and who may still be reading it."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_kernels.calls.router import Router
from peft_kernels.nn.multi_lora import Bound, MultiLoRALinear
from peft_kernels.ops.multi_lora_linear import PAGE
from peft_kernels.pool.pages import PageBook, PoolFullError
from peft_kernels.pool.streams import StreamOrder
from peft_kernels.pool.versions import Version

Matrices = Callable[[str], tuple[Tensor, Tensor]]  # A [r, k] and B [n, r] of a layer


@dataclass(frozen=True)
class PoolMemory:
    """What an :class:`AdapterPool` costs; bytes are those of A and B in all layers together.

    Attributes:
        reserved: bytes of all pages.
        used: bytes of the pages that aren't free, those of dropped adapters in use included.
        free_pages: how many pages of 8 rank rows are free, by layer.
        adapters: bytes of each adapter's pages, by name.
    """

    reserved: int
    used: int
    free_pages: dict[str, int]
    adapters: dict[str, int]


class Store:
    """The adapters by name, the layers they lie in, and holds on them.

    Pages that a retired version leaves are free once its last hold is gone. Where a hold ends, such
    as in a tensor's destruction, there may be no waiting for a lock, so it only leaves a note in
    ``_released``, which whoever takes the lock next settles.
    """

    def __init__(
        self,
        layers: Mapping[str, MultiLoRALinear],
        *,
        pages: int,
        slots: int,
        router: Router,
        lru: bool,
    ) -> None:
        self.layers = dict(layers)
        self.book = PageBook(self.layers, pages, slots)
        self.adapters: dict[str, Version] = {}
        self.router, self._lru = router, lru
        self._streams = StreamOrder()
        self._lock = threading.Lock()  # guards all of this, and pages that are written over
        self._changing = threading.Lock()  # one change at a time; taken before _lock
        self._released: deque[tuple[list[Version], list[torch.cuda.Stream]]] = deque()
        self._clock = itertools.count(1)
        self._routes = 0

    def find(self, name: str) -> Version:
        """The adapter of this name, or a ValueError."""
        version = self.adapters.get(name)
        if version is None:
            present = ", ".join(map(repr, self.adapters)) or "none"
            raise ValueError(f"the pool has no adapter {name!r}; it has {present}")
        return version

    def _check_in_pages(self, version: Version) -> None:
        for layer in version.layers if version.trainable else ():
            try:
                self.layers[layer].check_in_pages(version.slot)
            except RuntimeError as error:
                raise RuntimeError(f"adapter {version.name!r} in {layer}: {error}") from None

    def _require_layers(self) -> None:
        if not self.layers:
            raise RuntimeError("the pool is detached; attach another to the model")

    def devices(self) -> tuple[torch.device, ...]:
        """Where the layers are."""
        devices = self.router.devices
        if devices is None:
            devices = tuple(dict.fromkeys(layer.weight.device for layer in self.layers.values()))
            self.router.devices = devices
        return devices

    # ---- reading -----------------------------------------------------------------------------

    @contextmanager
    def hold(
        self, names: Iterable[str]
    ) -> Iterator[tuple[dict[str, Version], Callable[[object], None]]]:
        """Keeps the present versions of these adapters where they are inside a ``with`` block.

        Yields them, and a function that keeps them longer: as long as an object lives.
        """
        with self._lock:
            self._require_layers()
            self._settle()
            versions = {name: self.find(name) for name in names}
            for version in versions.values():
                self._check_in_pages(version)
            held, streams = list(versions.values()), self._streams.begin_read(self.devices())
            now = next(self._clock)
            for version in held:
                version.holds += 1
                version.last_routed = now
            self._routes += 1

        def keep(holder: object) -> None:
            if held:
                with self._lock:
                    for version in held:
                        version.holds += 1
                note = weakref.finalize(holder, self._released.append, (held, streams))
                note.atexit = False

        try:
            yield versions, keep
        finally:
            self._released.append((held, streams))
            with self._lock:
                self._routes -= 1
                self._settle()

    def _settle(self) -> None:
        while self._released:
            held, streams = self._released.popleft()
            self._streams.end_read(streams)
            for version in held:
                version.holds -= 1
                if version.retired and not version.holds:
                    self._free(version)

    def bound(self, version: Version) -> dict[str, Bound]:
        """The Parameters of a trainable adapter, by layer."""
        return {
            name: self.layers[name].bound[version.slot]
            for name in version.layers
            if version.slot in self.layers[name].bound
        }

    def read(self, name: str) -> tuple[Version, dict[str, tuple[Tensor, Tensor]]]:
        """An adapter, and copies of its A [r, k] and B [n, r] by layer."""
        with self.hold([name]) as (versions, _):
            version = versions[name]
            matrices = {
                layer: self.layers[layer].read(version.placement.pages[layer], r)
                for layer, (r, _) in version.layers.items()
            }
        return version, matrices

    def memory(self) -> PoolMemory:
        """What is reserved, used and free."""
        with self._lock:
            self._settle()
            page_bytes = {name: layer.page_bytes for name, layer in self.layers.items()}
            free = {name: len(self.book.free[name]) for name in self.layers}
            count = self.book.page_count
            return PoolMemory(
                reserved=sum(count * size for size in page_bytes.values()),
                used=sum((count - free[name]) * size for name, size in page_bytes.items()),
                free_pages=free,
                adapters={
                    name: sum(
                        len(pages) * page_bytes[layer]
                        for layer, pages in version.placement.pages.items()
                    )
                    for name, version in self.adapters.items()
                },
            )

    # ---- changing ----------------------------------------------------------------------------

    def add(self, version: Version, matrices: Matrices, *, replaces: bool = False) -> None:
        """Finds room for an adapter, writes it, and gives it its name: then routes may find it.

        With ``replaces`` the name is taken over from another version, with its pin, its seed and
        whether it is trainable; in the same slot if nothing holds that.

        Raises:
            PoolFullError: there is no room. Nothing is changed then.
            ValueError: the name is taken, or with ``replaces`` isn't.
        """
        with self._changing:
            with self._lock:
                self._require_layers()
                self._settle()
                old = self.find(version.name) if replaces else None
                if old is not None:
                    version.pinned, version.trainable = old.pinned, old.trainable
                    version.seed = old.seed
                elif version.name in self.adapters:
                    raise ValueError(
                        f"the pool has an adapter {version.name!r} already; replace() it"
                    )
                if old is not None and not old.holds:
                    self._make_room(version, instead_of=old)
                    self._write(version, matrices, known=self._unbind(old))
                    self._publish(version)
                    return
                self._make_room(version, spared=old)
            # Nothing finds these pages yet, so routes needn't wait while they are written.
            try:
                self._write(version, matrices, known={})
            except BaseException:
                with self._lock:
                    self._free(version)
                raise
            with self._lock:
                if old is not None:
                    self._retire(old)
                self._publish(version)

    def drop(self, name: str) -> None:
        """Takes an adapter's name away; its pages are free when nothing holds it any more."""
        with self._changing, self._lock:
            self._settle()
            version = self.find(name)
            del self.adapters[name]
            self._retire(version)

    def close(self) -> dict[str, MultiLoRALinear]:
        """Drops everything, and returns the layers; a RuntimeError inside a route."""
        with self._changing, self._lock:
            self._settle()
            if self._routes:
                raise RuntimeError(f"detach must be outside of any route; {self._routes} are open")
            for version in self.adapters.values():
                self._unbind(version)
            layers, self.layers = self.layers, {}
            self.adapters.clear()
            return layers

    def _publish(self, version: Version) -> None:
        version.last_routed = next(self._clock)
        self.adapters[version.name] = version

    def _retire(self, version: Version) -> None:
        version.retired = True
        if not version.holds:
            self._free(version)

    def _free(self, version: Version) -> None:
        self._unbind(version)
        self.book.give(version.placement)

    def _unbind(self, version: Version) -> dict[str, Bound]:
        found = {}
        for name, layer in self.layers.items():
            if name in version.layers and (bound := layer.unbind(version.slot)) is not None:
                found[name] = bound
        return found

    def _make_room(
        self, version: Version, *, instead_of: Version | None = None, spared: Version | None = None
    ) -> None:
        """Places a version, evicting others if it must and may; tried out before it is done."""
        book = self.book.copy()
        if instead_of is not None:
            book.give(instead_of.placement)
        counts = {layer: -(-r // PAGE) for layer, (r, _) in version.layers.items()}
        evicted: list[Version] = []
        first: PoolFullError | None = None
        while True:
            try:
                placement = book.place(version.name, counts, runs=version.trainable)
                break
            except PoolFullError as full:
                first = first or full
                victim = self._victim(full.layer, (instead_of, spared, *evicted))
                if victim is None:
                    raise self._explained(first) from None
                evicted.append(victim)
                book.give(victim.placement)
        for victim in evicted:
            del self.adapters[victim.name]
            victim.retired = True
            self._unbind(victim)
        self.book, version.placement = book, placement

    def _explained(self, full: PoolFullError) -> PoolFullError:
        if not self._lru:
            return full
        why = "what could be evicted for it (not pinned, in use or in training) is too little"
        return PoolFullError(f"{full}; {why}", full.layer)

    def _victim(self, layer: str | None, spared: Iterable[Version | None]) -> Version | None:
        """The version routed longest ago that can be evicted and has pages in this layer."""
        if not self._lru:
            return None
        spared = set(spared)
        candidates = (
            version
            for version in self.adapters.values()
            if version not in spared
            and not version.pinned
            and not version.holds
            and (layer is None or layer in version.layers)
            and not self._in_training(version)
        )
        return min(candidates, key=lambda version: version.last_routed, default=None)

    def _in_training(self, version: Version) -> bool:
        return version.trainable and any(
            bound.lora_a.requires_grad or bound.lora_b.requires_grad
            for bound in self.bound(version).values()
        )

    def _write(self, version: Version, matrices: Matrices, known: Mapping[str, Bound]) -> None:
        slot, pages = version.placement
        self._streams.begin_write(self.devices())
        for name, layer in self.layers.items():
            if name not in pages:
                layer.clear(slot)
                continue
            r, scale = version.layers[name]
            layer.write(slot, pages[name], *matrices(name), scale)
            if version.trainable:
                bound = known.get(name)
                same = bound is not None and bound.lora_a.shape[0] == r
                layer.bind(slot, pages[name][0], r, bound if same else None)
        self._streams.end_write(self.devices())
