"""Counts the memory traffic of the Triton kernels from their own loads and stores.

Run under the Triton interpreter: `Traffic` sees every address that a kernel loads or stores, and
every torch operation between the launches. Run as a program (``python -m
peft_kernels.tools._traffic``, with ``TRITON_INTERPRET=1``), it prints the rows as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from peft_kernels.triton import _plans
from peft_kernels.triton import lora_linear as launchers

# Operations that touch no element on the device; views are recognised by their schema.
_UNTOUCHING = {
    "empty",
    "new_empty",
    "_local_scalar_dense",  # .item() of a host scalar
}


# ---- the instrument ----------------------------------------------------------------------------


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
            self._watch(kernel, name, value)
            for name, value in named.items()
            if isinstance(value, Tensor)
        ]
        self.launches += 1
        self._inside = True
        try:
            run(executor, *args, **kwargs)
        finally:
            self._inside = False
        for watched in self._watched:
            watched.access.read = int(watched.read.sum())
            watched.access.written = int(watched.written.sum())
            self.accesses.append(watched.access)

    @staticmethod
    def _watch(kernel: str, name: str, tensor: Tensor) -> _Watched:
        access = Access(kernel, name, tuple(tensor.shape), tensor.element_size())
        storage = tensor.untyped_storage()
        elements = storage.nbytes() // tensor.element_size()
        empty = np.zeros((2, elements), dtype=bool)
        return _Watched(access, storage.data_ptr(), empty[0], empty[1])

    def _find(self, pointers: Any, mask: Any) -> tuple[_Watched, np.ndarray] | None:
        # The interpreter leaves a mask with a scalar condition in it as an integer.
        selected = np.broadcast_to(mask.data.astype(bool), pointers.data.shape)
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
        for tensor in (a for a in args if isinstance(a, Tensor)):
            self._record(name, tensor, read=tensor.numel())
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._record(name, tensor, written=tensor.numel())
        return result

    def _record(self, name: str, tensor: Tensor, read: int = 0, written: int = 0) -> None:
        shape, itemsize = tuple(tensor.shape), tensor.element_size()
        self.accesses.append(Access(name, "", shape, itemsize, read, written, read + written))

    # -- sums

    def passes(self, *shapes: tuple[int, int]) -> float:
        """Reads and writes of tensors of these shapes, in units of the tensor's own size."""
        full = {frozenset(shape) for shape in shapes}  # a transposed view is the same tensor
        return sum(
            (access.read + access.written) / np.prod(access.shape)
            for access in self.accesses
            if len(access.shape) == 2 and frozenset(access.shape) in full
        )

    def bytes_moved(self) -> int:
        return sum((a.read + a.written) * a.itemsize for a in self.accesses)

    def bytes_requested(self) -> int:
        return sum(a.requests * a.itemsize for a in self.accesses)


# ---- the table ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrafficRow:
    """The traffic of one direction of the op under one plan."""

    direction: str
    plan: str
    sizes: tuple[int, int, int, int]  # m, n, k, r
    launches: int
    extra_passes: float  # over full-size activations, beyond the base layer's own two
    bytes_moved: int  # every launch's different elements: DRAM traffic if nothing stays in L2
    bytes_floor: int  # every input read once, every output written once
    atomics: int


# The base layer reads x and writes y; its backward reads dy and writes dx.
BASE_PASSES = 2


def count(
    plan: str,
    m: int,
    n: int,
    k: int,
    r: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype = torch.float32,
    dropout_p: float = 0.1,
    arch: str = "sm_90",
) -> list[TrafficRow]:
    """Runs forward and backward under ``plan`` with the tiles of ``arch``, and counts.

    m, n, k and r must differ, so that a tensor is known by its shape.
    """
    if len({m, n, k, r}) != 4:
        raise ValueError(f"m, n, k and r must be four different numbers; got {(m, n, k, r)}")
    op = importlib.import_module("peft_kernels.ops.lora_linear")
    inputs = op.example_inputs(m, n, k, r, dtype=dtype, adapter_dtype=adapter_dtype)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    a, b = inputs["lora_a"], inputs["lora_b"]
    dy = torch.randn(m, n).to(dtype)
    scale = torch.tensor(2.0)
    seed = torch.tensor(1) if dropout_p else None

    with _plans.force(plan), patch.object(_plans, "arch_name", lambda device: arch):
        with Traffic() as forward:
            y, s = launchers.lora_linear_fwd(x, weight, bias, a, b, scale, dropout_p, seed)
        with Traffic() as backward:
            gradients = launchers.lora_linear_bwd(
                dy, x, weight, a, b, s, scale, dropout_p, seed, True, True, True
            )

    def row(direction: str, traffic: Traffic, *tensors: Tensor) -> TrafficRow:
        return TrafficRow(
            direction=direction,
            plan=plan,
            sizes=(m, n, k, r),
            launches=traffic.launches,
            extra_passes=round(traffic.passes((m, k), (m, n)) - BASE_PASSES, 3),
            bytes_moved=traffic.bytes_moved(),
            bytes_floor=sum(t.numel() * t.element_size() for t in tensors),
            atomics=traffic.atomics,
        )

    return [
        row("fwd", forward, x, weight, bias, a, b, y, s),
        row("bwd", backward, dy, x, weight, a, b, s, *gradients),
    ]


def traffic_rows(m: int, n: int, k: int, r: int) -> list[TrafficRow]:
    rows = [row for plan in _plans.PLANS for row in count(plan, m, n, k, r)]
    # The backward of "ii" is that of "i".
    return [row for row in rows if (row.direction, row.plan) != ("bwd", "ii")]


if __name__ == "__main__":
    json.dump([asdict(row) for row in traffic_rows(*map(int, sys.argv[1:]))], sys.stdout)
