"""Time and memory, measured so that a noisy machine doesn't decide who wins.

Absolute times on a shared machine drift by more than the differences that matter, so everything is
timed in one process, implementation after implementation, again and again, and compared within a
round: the drift is slower than a round and cancels in the ratio.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SECONDS = 0.005

Clock = Callable[[Callable[[], object], int], float]  # seconds of one of so many calls


@dataclass(frozen=True)
class Budget:
    """How long an implementation is timed.

    It takes part in at least ``rounds`` rounds and for ``seconds`` seconds, but once it has used
    ``cap_seconds`` three rounds are enough: one that is slower than the rest by orders of magnitude
    needs no 15 to show it.
    """

    rounds: int = 15
    seconds: float = 1.0
    cap_seconds: float = 20.0

    def is_spent(self, samples: list[float], elapsed: float) -> bool:
        if elapsed >= self.cap_seconds and len(samples) >= min(3, self.rounds):
            return True
        return len(samples) >= self.rounds and elapsed >= self.seconds


@dataclass(frozen=True)
class Timing:
    """The median time of a call in seconds, and its ratio to the base's.

    ``ratio`` is the median over rounds of (this time / the base's time in the same round).
    """

    median: float
    ratio: float
    rounds: int


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    base: str,
    budget: Budget | None = None,
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Times ``calls`` round-robin and compares each with ``calls[base]``.

    In a round each implementation runs one block of back-to-back calls, about 5 ms or one call, and
    counts with the block's median call; the order rotates from round to round, so that none always
    follows the same neighbour. The base runs in every round. ``clock`` is the host's by default.
    """
    budget, clock = budget or Budget(), clock or host_clock
    repeats = {name: _block_size(call, clock) for name, call in calls.items()}
    samples: dict[str, dict[int, float]] = {name: {} for name in calls}
    elapsed = dict.fromkeys(calls, 0.0)
    running = list(calls)
    turn = 0
    while running:
        shift = turn % len(running)
        for name in running[shift:] + running[:shift]:
            start = time.perf_counter()
            samples[name][turn] = clock(calls[name], repeats[name])
            elapsed[name] += time.perf_counter() - start
        running = _still_running(running, base, budget, samples, elapsed)
        turn += 1
    return {name: _timing(samples[name], samples[base]) for name in calls}


def _still_running(running, base, budget, samples, elapsed) -> list[str]:
    spent = {n for n in running if budget.is_spent(list(samples[n].values()), elapsed[n])}
    if len(spent) == len(running) or set(running) - spent == {base}:
        return [base] if base in running and base not in spent else []
    return [n for n in running if n == base or n not in spent]


def _timing(own: dict[int, float], base: dict[int, float]) -> Timing:
    ratio = statistics.median(seconds / base[turn] for turn, seconds in own.items())
    return Timing(statistics.median(own.values()), ratio, len(own))


def _block_size(call: Callable[[], object], clock: Clock) -> int:
    """Warms ``call`` up, and says how many of it fill a block."""
    clock(call, 1)
    most = getattr(clock, "most", 1000)
    return max(1, min(most, round(BLOCK_SECONDS / max(clock(call, 1), 1e-9))))


def host_clock(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one of ``repeats`` back-to-back calls."""
    if torch.cuda.is_initialized():
        return _block_seconds(call, repeats) / repeats
    # The median leaves out calls during which the system ran something else.
    return statistics.median(_block_seconds(call, 1) for _ in range(repeats))


def _block_seconds(call: Callable[[], object], repeats: int) -> float:
    """Seconds of all the calls together: a GPU is waited for once."""
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Waits for the GPU, if this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def saved_bytes(forward: Callable[[], object], excluded: Iterable[Tensor]) -> int:
    """Bytes of distinct storages that ``forward`` keeps for its backward, ``excluded`` left out."""
    known = {_address(t) for t in excluded}
    kept: dict[int, int] = {}
    held: list[object] = []

    def pack(tensor: Tensor) -> Tensor:
        # Detached: an operation that saves its own result would hold itself, and never be freed.
        tensor = tensor.detach()
        # Held until the end, so that no address is given to a second storage meanwhile.
        held.append(tensor)
        if _address(tensor) not in known:
            kept[_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held.append(forward())
    return sum(kept.values())


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
