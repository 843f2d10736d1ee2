"""Launches that overlap, in the interpreter, which runs one after the other."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from peft_kernels.triton.common import dependent, launch
from peft_kernels.triton.lora_linear import calls


@contextmanager
def overlapping() -> Iterator[list[str]]:
    """As on a chip that has them. Yields the kernels whose launches are second ones."""
    seconds = []

    def run(kernel, grid, args, options):
        if options.get("launch_pdl"):
            seconds.append(kernel.fn.__name__.removesuffix("_kernel"))
        launch_run(kernel, grid, args, {k: v for k, v in options.items() if k != "launch_pdl"})

    launch_run = launch.run
    calls._call.cache_clear()
    with (
        patch.object(launch, "run", run),
        patch.object(dependent, "launches", lambda name, device: True),
    ):
        yield seconds
    calls._call.cache_clear()
