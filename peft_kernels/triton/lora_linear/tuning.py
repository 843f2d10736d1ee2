"""Timing the plans on a GPU, and when a process does so by itself.

``PEFT_KERNELS_TUNE`` says what happens at the first call of a bucket that isn't in the tune cache:

``0``     nothing is measured: the plan of the nearest bucket, or the default
``1``     it is measured, unless a bucket was that differs by two in one of n, k and rank alone
``full``  it is measured

Without it, ``1``; but nothing is measured under ``torch.use_deterministic_algorithms``, for clocks
decide, nor in distributed ranks other than 0, which read what rank 0 has measured meanwhile.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import statistics
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import triton
from triton.errors import TritonError

from peft_kernels.triton.lora_linear import plan_cache

Run = Callable[[str], object]  # computes an op by the plan of that name
Timer = Callable[[Callable[[], object]], float]

MODES = ("0", "1", "full")
# The distance of a measured bucket from which on another is measured.
_NEAR_ENOUGH = {"0": math.inf, "1": 1, "full": 0, "another rank": 1}
ROUNDS = 3
# More than any GPU's L2. The host launches a call while the GPU still writes them.
FLUSHED_BYTES, FLUSHES = 1 << 28, 4
# Where another rank measures, the file is looked at no oftener.
LOOK_AGAIN_SECONDS = 5.0

_LOG = logging.getLogger("peft_kernels")


# ---- timing ------------------------------------------------------------------------------------


class Times(NamedTuple):
    """Milliseconds of the plans that ran, and why the others didn't."""

    milliseconds: dict[str, float]
    left_out: dict[str, str]

    def best(self) -> str:
        return min(self.milliseconds, key=self.milliseconds.__getitem__)


def time_plans(plans: Iterable[str], run: Run, timer: Timer, rounds: int = ROUNDS) -> Times:
    """The median of ``rounds`` rounds; the plans take turns, so that a drift of the clock hits all.

    A plan that raises is left out: a GPU may be smaller than its tiles, or too full.
    """
    rounds_of: dict[str, list[float]] = {plan: [] for plan in plans}
    left_out: dict[str, str] = {}
    for number in range(rounds + 1):
        for plan in list(rounds_of):
            try:
                if number == 0:
                    run(plan)  # compiles
                else:
                    rounds_of[plan].append(timer(functools.partial(run, plan)))
            except (TritonError, RuntimeError) as error:
                del rounds_of[plan]
                left_out[plan] = f"{type(error).__name__}: {error}"
    times = {plan: statistics.median(rounds) for plan, rounds in rounds_of.items()}
    return Times(times, left_out)


def gpu_timer(call: Callable[[], object]) -> float:
    """Milliseconds of ``call`` on the current GPU, with nothing of it in the L2 cache."""
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(FLUSHES):
        flushed.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


# ---- by itself ---------------------------------------------------------------------------------

# One thread measures, and the others wait for what it finds; a plan that calls another op may
# measure that within its first run.
_lock = threading.RLock()


class Found(NamedTuple):
    """A plan, or None for the default; after ``seconds`` it must be asked for again."""

    plan: str | None
    seconds: float


def find(device: torch.device, bucket: str, able: tuple[str, ...], run: Run | None) -> Found:
    """The one of the plans ``able`` to serve ``bucket`` that was measured, or is now by ``run``.

    Nothing is measured on a CPU, under Triton's interpreter, nor while a CUDA graph is captured.

    Raises:
        ValueError: ``PEFT_KERNELS_TUNE`` has another value.
    """
    mode = _mode() if run is not None and _compiles_for(device) else "0"
    with _lock:
        if mode != "0":
            plan_cache.load_again()  # another process may have been first
        near = plan_cache.nearest(device, bucket, able)
        plan, distance = near or (None, math.inf)
        if distance <= _NEAR_ENOUGH[mode]:
            return Found(plan, math.inf)
        if mode == "another rank":
            return Found(plan, LOOK_AGAIN_SECONDS)
        if torch.cuda.is_current_stream_capturing():
            return Found(plan, 0.0)
        return Found(_measured(device, bucket, able, run) or plan, math.inf)


def _compiles_for(device: torch.device) -> bool:
    return device.type == "cuda" and not triton.knobs.runtime.interpret


def _mode() -> str:
    asked = os.environ.get("PEFT_KERNELS_TUNE")
    if asked and asked not in MODES:
        raise ValueError(f"PEFT_KERNELS_TUNE must be one of {', '.join(MODES)}; got {asked!r}")
    if asked:
        return asked
    if torch.are_deterministic_algorithms_enabled():
        return "0"
    return "1" if _rank() == 0 else "another rank"


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def _measured(
    device: torch.device, bucket: str, able: tuple[str, ...], run: Run | None
) -> str | None:
    """The fastest plan, which goes into the cache; None where none ran."""
    assert run is not None
    times = time_plans(able, run, gpu_timer)
    shown = [f"{plan} {value:.4f} ms" for plan, value in times.milliseconds.items()]
    shown += [f"{plan} left out ({why})" for plan, why in times.left_out.items()]
    _LOG.info("measured lora_linear's plans for %s: %s", bucket, ", ".join(shown))
    if not times.milliseconds:
        return None
    try:
        plan_cache.save({plan_cache.device_key(device): {bucket: times.best()}})
    except OSError as error:
        warnings.warn(
            f"the tune cache {plan_cache.cache_file()} can't be written ({error}): plans are"
            " measured again in each process. Name a folder for it in PEFT_KERNELS_CACHE, or set"
            " PEFT_KERNELS_TUNE=0 to measure nothing.",
            stacklevel=2,
        )
    return times.best()
