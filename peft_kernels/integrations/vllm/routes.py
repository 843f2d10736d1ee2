"""The adapters of a step's rows, where a GPU's kernels read them: at addresses that stay.

What is captured in a CUDA graph, or compiled, reads the same buffers in every step, so a step is
written into them and nothing is allocated anew. All of it is known on the host: nothing waits for
the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from peft_kernels.ops.multi_lora_linear import sort_by_adapter


class Routes:
    """The slot of each of ``most`` rows, -1 for none, and the rows sorted by it.

    Rows beyond the step's own have none: they are those of a batch padded to a captured size. As
    rows without an adapter come last, the first m of ``order`` are a step's rows in any size m that
    it is padded to.
    """

    def __init__(self, most: int, slots: int, device: torch.device | str):
        self.slots = slots
        self.ids = torch.full((most,), -1, dtype=torch.int32, device=device)
        self.order = torch.arange(most, dtype=torch.int32, device=device)
        self.starts = torch.zeros(slots + 2, dtype=torch.int32, device=device)
        # On the host, in a tensor, for a compiled graph would have a number of the first step's.
        self.count = torch.zeros((), dtype=torch.int64, device="cpu")
        self.rows = 0
        self.present: list[int] = []

    def assign(self, names: Sequence[int], slot_of: Mapping[int, int]) -> None:
        """Takes a step's rows by the names of their adapters, 0 for none."""
        given, inverse = np.unique(np.asarray(names, dtype=np.int64), return_inverse=True)
        slots = np.array([slot_of[name] if name > 0 else -1 for name in given.tolist()], np.int32)
        ids = torch.full(self.ids.shape, -1, dtype=torch.int32, device="cpu")
        ids[: len(inverse)] = torch.from_numpy(slots[inverse])
        order, starts = sort_by_adapter(ids, self.slots)
        for buffer, values in ((self.ids, ids), (self.order, order), (self.starts, starts)):
            async_tensor_h2d(values, out=buffer)
        self.present = slots[slots >= 0].tolist()
        self.rows = len(inverse)
        self.count.fill_(int(starts[self.slots]))

    def of(self, x: Tensor) -> Routes:
        """Those of x's rows, which are the step's and perhaps some beyond."""
        if len(x) < self.rows:
            raise ValueError(
                f"x must have a row for each of the step's {self.rows} rows of logits; it has "
                f"{len(x)}, so that they can't be told which LoRA is theirs"
            )
        return self

    def part(self, rows: slice) -> Routes:
        """Those of some of the step's rows, in buffers of their own."""
        own = copy(self)
        own.ids = self.ids[rows]
        own.order, own.starts = sort_by_adapter(own.ids, self.slots)
        return own
