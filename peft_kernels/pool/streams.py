"""Orders reads and writes of the same memory on CUDA streams, without the host waiting for either.

On other devices, where kernels run one after the other, nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


class StreamOrder:
    """Writes wait for the reads that ended before them, and reads for the writes.

    Reads count on the stream that is current where they begin; work that they put on another must
    be joined to that one, as the caching allocator asks for too. No read may begin while a CUDA
    graph is captured: a capture can't wait for what was launched outside it.
    """

    def __init__(self) -> None:
        self._reads: dict[torch.cuda.Stream, torch.cuda.Event] = {}
        self._writes: dict[torch.cuda.Stream, torch.cuda.Event] = {}

    @staticmethod
    def _current(devices: Iterable[torch.device]) -> list[torch.cuda.Stream]:
        return [torch.cuda.current_stream(device) for device in devices if device.type == "cuda"]

    def begin_read(self, devices: Iterable[torch.device]) -> list[torch.cuda.Stream]:
        """Waits for the writes so far; what it returns goes to :meth:`end_read`."""
        streams = self._current(devices)
        for stream in streams:
            for event in list(self._writes.values()):
                stream.wait_event(event)
        return streams

    def end_read(self, streams: Iterable[torch.cuda.Stream]) -> None:
        for stream in streams:
            self._reads[stream] = stream.record_event()

    def begin_write(self, devices: Iterable[torch.device]) -> None:
        """Waits for the reads that have ended so far, and for other streams' writes."""
        for stream in self._current(devices):
            for event in [*self._reads.values(), *self._writes.values()]:
                stream.wait_event(event)

    def end_write(self, devices: Iterable[torch.device]) -> None:
        for stream in self._current(devices):
            self._writes[stream] = stream.record_event()
