"""Launches that may begin before the one ahead of them in the stream has ended.

CUDA's programmatic dependent launch, between the launches of one call. By these rules a second
launch is right after a first:

1. The first is launched as any other: what was launched before it has ended when it begins, and so
   whatever the call was given is written. The second may read that at once.
2. Each program of the second waits (`wait_for_first` of ``blocks.py``) before it reads what the
   first writes, before it writes at all, and before it ends. The wait is over when the first has
   ended and its stores can be read. The allocator may have given the second memory that the first
   still reads; and what comes next in the stream waits for the second alone.
3. A second may be the first of a third. The third's wait is for the second's end, which comes after
   the second's wait: both are over then, and of what it reads before, rule 1 still holds.
4. A first without programs isn't launched. Then the second is launched as any other, for it would
   begin before the end of something that isn't this call's.

Whatever torch launches between the two, as it fills new memory in its deterministic mode, begins
after the first has ended, and the second's wait for that is one for both.

A first lets the second begin as it starts itself (`let_next_begin`). The second's programs get
their cores when all of the first's have had theirs, so none of these waits for one of those.
"""

from __future__ import annotations

import os

import torch

from peft_kernels.triton.common import chips

# What captures such launches in a CUDA graph as what they are: CUDA 12.3's driver.
CAPTURES = 12030


def launches(name: str, device: torch.device) -> bool:
    """Whether ``device``, of the architecture ``name``, has them. ``PEFT_KERNELS_PDL=0``: none."""
    if name not in chips.DEPENDENT or os.environ.get("PEFT_KERNELS_PDL") == "0":
        return False
    # Without data there is no driver to ask. The interpreter has no such launches.
    if device.type == "cuda":
        return getattr(torch._C, "_cuda_getDriverVersion", int)() >= CAPTURES
    return device.type == "meta"


def first(followed: bool) -> dict[str, bool]:
    """The options of a launch that lets the next begin if it is ``followed`` by its second."""
    return {"PDL": followed}


def second(follows: bool) -> dict[str, bool]:
    """The options of a launch that ``follows`` its first, which it may be itself of a third."""
    return {"PDL": True, "launch_pdl": True} if follows else {"PDL": False}
