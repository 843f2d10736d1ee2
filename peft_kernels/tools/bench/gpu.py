"""What is other on a GPU: the shapes that ``--all`` measures, and the clock.

The floors of the suites are of CPUs; on a GPU a case has none.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch

# MxNxK as on the command line: what language models have, decoding and in training.
SHAPES = {
    "lora_linear": (
        *((1, 4096, 4096), (16, 4096, 4096), (512, 4096, 4096), (4096, 4096, 4096)),
        (4096, 14336, 4096),
    ),
    "dora_linear": ((16, 4096, 4096), (4096, 4096, 4096)),
    "multi_lora_linear": ((1, 4096, 4096), (16, 4096, 4096), (64, 4096, 4096), (512, 4096, 4096)),
    "adapter": ((512, 768, 48), (4096, 1024, 64)),
    "adapter_fusion": ((512, 768, 48), (4096, 1024, 64)),
    "prefix_attention": ((128, 12, 20), (512, 32, 20), (512, 32, 200)),
    "prompt_lookup": ((128, 768, 20), (512, 4096, 100)),
}
L2_AT_LEAST = 256 << 20  # bytes written before each call, and no less than twice the GPU's L2
CALLS_AT_MOST = 50  # in a block: each has its flush, which isn't counted


def is_gpu(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def make_current(device: torch.device | str) -> None:
    """Events are recorded on the current GPU; without a number it is that one already."""
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)


def cases(suite: ModuleType, op: str) -> list[Any]:
    """The op's shapes forward and backward, in bfloat16 or where there is none in float16."""
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if has_bfloat16 else torch.float16
    return [case for ways in (False, True) for case in suite.cases(SHAPES[op], dtype, ways)]


class Event(Protocol):
    """One of torch.cuda's."""

    def record(self) -> object: ...

    def elapsed_time(self, end: Any) -> float: ...


@dataclass(frozen=True)
class EventClock:
    """Seconds of a call between two events on its stream, L2 flushed before each call.

    The host runs ahead while the GPU flushes, so that what a call's launches take the host is
    counted only where it takes longer than that.
    """

    flush: Callable[[], object]
    event: Callable[[], Event]
    synchronize: Callable[[], object]
    most: int = CALLS_AT_MOST

    def __call__(self, call: Callable[[], object], repeats: int) -> float:
        """The median of ``repeats`` calls."""
        self.synchronize()
        pairs = [self._timed(call) for _ in range(repeats)]
        self.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3

    def _timed(self, call: Callable[[], object]) -> tuple[Event, Event]:
        start, end = self.event(), self.event()
        self.flush()
        start.record()
        call()
        end.record()
        return start, end


def event_clock(device: torch.device | str) -> EventClock:
    """The clock of the current GPU, whose current stream is what is timed."""
    of_device = torch.cuda.get_device_properties(device)
    size = max(L2_AT_LEAST, 2 * getattr(of_device, "L2_cache_size", 0))
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    return EventClock(
        buffer.zero_,
        lambda: torch.cuda.Event(enable_timing=True),
        torch.cuda.synchronize,
    )
