"""What a device offers besides computing: graphs, and another device beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

NO_GPU = "no GPU"
WARM_UPS = 2

Replay = Callable[[], Any]


@dataclass(frozen=True)
class Machine:
    """A device, what captures a graph on it, and a second device; or why there is none."""

    device: torch.device
    capture: Callable[[Callable[[], Any]], Replay] | None = None
    why_no_capture: str = NO_GPU
    other: torch.device | None = None
    why_no_other: str = NO_GPU

    def is_lost(self) -> bool:
        """Whether nothing runs there any more, as after an access out of bounds on a GPU."""
        try:
            torch.ones(1, device=self.device).cpu()
        except RuntimeError:
            return True
        return False


def machine_at(device: torch.device) -> Machine:
    """What there is at a device; on a GPU the current one is the device without a number."""
    if device.type != "cuda":
        return Machine(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    here = torch.device("cuda", index)
    others = [i for i in range(torch.cuda.device_count()) if i != index]
    other = torch.device("cuda", others[0]) if others else None
    return Machine(here, capture_cuda, "", other, "" if others else "only one GPU")


def capture_cuda(call: Callable[[], Any]) -> Replay:
    """Captures ``call`` in a CUDA graph; what is returned replays it, for the same tensors."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay
