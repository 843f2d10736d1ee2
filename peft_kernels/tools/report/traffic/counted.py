"""Counts the memory traffic of the Triton kernels from their own loads and stores.

Run under the Triton interpreter: `Traffic` sees every address that a kernel loads or stores, and
every torch operation between the launches. What is counted of each op is in ``_traffic_<op>.py``,
and ``rows.py`` brings the rows of all together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

# Operations that touch no element on the device; views are recognised by their schema.
_UNTOUCHING = {
    "empty",
    "empty_like",
    "new_empty",
    "_local_scalar_dense",  # .item() of a host scalar
}
# Operations that take shape and dtype of their argument, and don't read it.
_UNREADING = {"new_zeros"}


# ---- the instrument ----------------------------------------------------------------------------


def _nothing() -> np.ndarray:
    return np.zeros(0, dtype=bool)


@dataclass
class Access:
    """What one launch, or one torch operation, did to one of its tensors, in elements."""

    launch: str
    argument: str
    shape: tuple[int, ...]
    itemsize: int
    read: int = 0  # different elements read
    written: int = 0  # different elements written
    requests: int = 0  # loads and stores, repetitions included: what the caches see
    storage: int = 0  # the address of the tensor's storage, by which its views are known
    # Which elements of the storage a kernel read and wrote; empty for a torch operation.
    read_at: np.ndarray = field(default_factory=_nothing, repr=False, compare=False)
    written_at: np.ndarray = field(default_factory=_nothing, repr=False, compare=False)

    def bytes_moved(self) -> int:
        return (self.read + self.written) * self.itemsize


@dataclass
class _Watched:
    """A tensor of the launch under way, and which elements of its storage were touched."""

    access: Access
    first: int
    read: np.ndarray
    written: np.ndarray

    def touch(self, addresses: np.ndarray, touched: np.ndarray) -> None:
        touched[(addresses - np.uint64(self.first)) // np.uint64(self.access.itemsize)] = True
        self.access.requests += addresses.size


@dataclass
class Traffic(TorchDispatchMode):
    """Context manager that fills ``accesses`` and ``atomics`` while kernels run interpreted."""

    accesses: list[Access] = field(default_factory=list)
    launches: int = 0
    atomics: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._watched: list[_Watched] = []
        self._inside = False
        self._patches = ExitStack()
        self._storages: list[torch.UntypedStorage] = []  # kept, so that no address serves twice

    def __enter__(self) -> Traffic:
        builder = interpreter.InterpreterBuilder
        self._wrap(interpreter.GridExecutor, "__call__", self._on_launch)
        self._wrap(builder, "create_masked_load", self._on_load)
        self._wrap(builder, "create_masked_store", self._on_store)
        self._wrap(builder, "create_atomic_rmw", self._on_atomic)
        self._wrap(builder, "create_atomic_cas", self._on_atomic)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _wrap(self, owner: type, name: str, handler: Any) -> None:
        original = getattr(owner, name)

        def wrapped(this: Any, *args: Any, **kwargs: Any) -> Any:
            return handler(original, this, *args, **kwargs)

        self._patches.enter_context(patch.object(owner, name, wrapped))

    # -- kernels

    def _on_launch(self, run: Any, executor: Any, *args: Any, **kwargs: Any) -> None:
        named = {**dict(zip(executor.arg_names, args, strict=False)), **kwargs}
        kernel = executor.fn.__name__
        self._watched = [
            self._watch(kernel, name, tensor)
            for argument, value in named.items()
            for name, tensor in _tensors(argument, value)
        ]
        self.launches += 1
        self._inside = True
        try:
            run(executor, *args, **kwargs)
        finally:
            self._inside = False
        for watched in self._watched:
            access = watched.access
            access.read_at, access.written_at = watched.read, watched.written
            access.read, access.written = int(watched.read.sum()), int(watched.written.sum())
            self.accesses.append(access)

    def _watch(self, kernel: str, name: str, tensor: Tensor) -> _Watched:
        access = self._access(kernel, name, tensor)
        elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        empty = np.zeros((2, elements), dtype=bool)
        return _Watched(access, access.storage, empty[0], empty[1])

    def _access(self, launch: str, argument: str, tensor: Tensor) -> Access:
        storage = tensor.untyped_storage()
        self._storages.append(storage)
        shape, itemsize = tuple(tensor.shape), tensor.element_size()
        return Access(launch, argument, shape, itemsize, storage=storage.data_ptr())

    def _find(self, pointers: Any, mask: Any) -> tuple[_Watched, np.ndarray] | None:
        # The interpreter leaves a mask with a scalar condition in it as an integer, and that of a
        # descriptor's block as a bare array.
        values = mask if isinstance(mask, np.ndarray) else mask.data
        selected = np.broadcast_to(values.astype(bool), pointers.data.shape)
        addresses = pointers.data[selected]
        if not addresses.size:
            return None
        for watched in self._watched:
            size = watched.read.size * watched.access.itemsize
            if watched.first <= int(addresses[0]) < watched.first + size:
                return watched, addresses
        raise RuntimeError("a kernel touched memory that is none of its arguments")

    def _on_load(
        self, load: Any, builder: Any, pointers: Any, mask: Any, *rest: Any, **more: Any
    ) -> Any:
        found = self._find(pointers, mask)
        if found:
            found[0].touch(found[1], found[0].read)
        return load(builder, pointers, mask, *rest, **more)

    def _on_store(
        self, store: Any, builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        found = self._find(pointers, mask)
        if found:
            found[0].touch(found[1], found[0].written)
        return store(builder, pointers, value, mask, *rest)

    def _on_atomic(self, atomic: Any, *args: Any, **kwargs: Any) -> Any:
        self.atomics += 1
        return atomic(*args, **kwargs)

    # -- torch operations between the launches: the library's GEMM, and any copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self._inside or func.is_view or name in _UNTOUCHING:
            return result
        self.launches += 1
        for tensor in (a for a in args if isinstance(a, Tensor) and name not in _UNREADING):
            self._record(name, tensor, read=tensor.numel())
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._record(name, tensor, written=tensor.numel())
        return result

    def _record(self, name: str, tensor: Tensor, read: int = 0, written: int = 0) -> None:
        access = self._access(name, "", tensor)
        access.read, access.written, access.requests = read, written, read + written
        self.accesses.append(access)

    # -- sums

    def of(self, tensor: Tensor) -> list[Access]:
        """The accesses to a tensor and to any view of it."""
        storage = tensor.untyped_storage().data_ptr()
        return [access for access in self.accesses if access.storage == storage]

    def passes(self, *shapes: tuple[int, int]) -> float:
        """Reads and writes of tensors of these shapes, in units of the tensor's own size."""
        full = {frozenset(shape) for shape in shapes}  # a transposed view is the same tensor
        return sum(
            (access.read + access.written) / np.prod(access.shape)
            for access in self.accesses
            if len(access.shape) == 2 and frozenset(access.shape) in full
        )

    def bytes_moved(self) -> int:
        return sum(access.bytes_moved() for access in self.accesses)

    def bytes_requested(self) -> int:
        return sum(a.requests * a.itemsize for a in self.accesses)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a kernel's argument; those of a tuple are named ``name[i]``."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, TensorDescriptor):
        yield name, value.base
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _tensors(f"{name}[{i}]", item)


# ---- the table ---------------------------------------------------------------------------------

# The base layer reads x and writes y; its backward reads dy and writes dx.
BASE_PASSES = 2


@dataclass(frozen=True)
class TrafficRow:
    """The traffic of one direction of an op under one plan."""

    op: str
    direction: str
    plan: str  # or, of an op without plans, what the call has: residuals, LayerNorms, a query
    sizes: tuple[int, ...]  # m, n, k and, where there is one rank, r
    launches: int
    extra_passes: float  # over full-size activations, beyond the base layer's two, or the floor's
    bytes_moved: int  # every launch's different elements: DRAM traffic if nothing stays in L2
    bytes_floor: int  # what has to be read, once, and every output written once
    atomics: int
