"""The traffic of `prompt_lookup`: one launch a direction, every byte once.

The floor: text, places, mask, labels, ids and outputs once, and of the prompts those that rows
have; backward, places, ids and gradients once, and of dout all but the slots without a prompt.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_kernels.tools.report.traffic.counted import Traffic, TrafficRow
from peft_kernels.triton.prompt_lookup import launch as launchers

op = importlib.import_module("peft_kernels.ops.prompt_lookup")


@dataclass
class Counted:
    """One forward and backward, and what they moved."""

    inputs: tuple[Tensor, ...]  # embeddings, prompts, task_ids, positions, mask, labels
    outputs: tuple[Tensor, ...]
    dout: Tensor
    gradients: tuple[Tensor, ...]
    forward: Traffic
    backward: Traffic

    def traffic(self, direction: str) -> Traffic:
        return self.forward if direction == "fwd" else self.backward

    def floor(self, direction: str) -> int:
        embeddings, prompts, ids, positions, mask, labels = self.inputs
        tasks = [task for task in ids.tolist() if task >= 0]
        if direction == "fwd":
            read = [embeddings, ids, positions, mask, labels]
            return _bytes(*read, *self.outputs) + len(set(tasks)) * prompts[0].nbytes
        without = (len(ids) - len(tasks)) * prompts[0].numel() * self.dout.element_size()
        return _bytes(self.dout, ids, positions, *self.gradients) - without


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def count(
    batch: int,
    seq: int,
    d: int,
    length: int,
    prompts: int,
    *,
    on_end: bool,
    dtype: torch.dtype = torch.bfloat16,
    prompt_dtype: torch.dtype = torch.float32,
) -> Counted:
    """Runs a forward and its backward; slots follow each other (``on_end``) or stand apart.

    The first row has no prompt, the next ones the first, second and so on.
    """
    example = op.example_inputs(
        batch, seq, d, length, prompts, dtype=dtype, prompt_dtype=prompt_dtype
    )
    apart = 1 if on_end else (length + seq) // length
    places = (apart * torch.arange(length)).expand(batch, length)
    ids = torch.arange(batch).int() % (prompts + 1) - 1
    inputs = (
        example["embeddings"], example["prompts"], ids, places.int(),
        example["attention_mask"], example["labels"],
    )  # fmt: skip
    with Traffic() as forward:
        outputs = launchers.prompt_lookup_fwd(*inputs)
    dout = torch.randn(outputs[0].shape).to(dtype)
    with Traffic() as backward:
        gradients = launchers.prompt_lookup_bwd(dout, ids, inputs[3], prompts, True, True)
    return Counted(inputs, outputs, dout, gradients, forward, backward)


# ---- the table ---------------------------------------------------------------------------------


def rows() -> list[TrafficRow]:
    """Soft tokens that follow each other, and such among the text; a prompt by row."""
    sizes = (4, 60, 320, 12, 3)
    calls = {
        "on end": count(*sizes, on_end=True),
        "among the text": count(*sizes, on_end=False),
    }
    return [_row(call, name, way) for name, call in calls.items() for way in ("fwd", "bwd")]


def _row(counted: Counted, name: str, direction: str) -> TrafficRow:
    traffic = counted.traffic(direction)
    embeddings, prompts, *_ = counted.inputs
    batch, seq, d = embeddings.shape
    return TrafficRow(
        op="prompt_lookup",
        direction=direction,
        plan=name,
        sizes=(batch, seq, prompts.shape[1], prompts.shape[0], d),
        launches=traffic.launches,
        extra_passes=0,
        bytes_moved=traffic.bytes_moved(),
        bytes_floor=counted.floor(direction),
        atomics=traffic.atomics,
    )
