"""The norms of DoRA kept on a GPU, which looks itself whether they are still right.

The host would have to wait for the answer, and a graph of kernels could not ask at all. So kernels
compare A, ``scale B`` and W's diagonal with what they were, and make the norms only if any differs:

    norm_i = |W_i + scale B_i A|         [n]; W is read where something changed, and else not

Writes through ``.data`` are seen as all others are; of W, which is frozen, those that change the
diagonal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from peft_kernels import _library
from peft_kernels.ops._dtypes import acc_dtype
from peft_kernels.ops._transforms import is_recorded, wants_composition

# Called by itself: no graph records it, and an op costs a call more than all else of it.
_update = _library.launcher_of("peft_kernels.triton.dora_linear.norm_launch:dora_norm_kept")


class _State(NamedTuple):
    source: tuple  # which memory the weight was, and how often written
    norm: Tensor
    kept: tuple[Tensor, Tensor, Tensor]


class NormsOnDevice:
    """The norms of one layer, in memory that stays where it is: graphs of kernels hold it too."""

    def __init__(self) -> None:
        self._state: _State | None = None

    def of(
        self, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float | Tensor
    ) -> Tensor | None:
        """The norms ``[n]`` in float32, until the next call; None where they can't be kept."""
        if not _can_keep(weight, lora_a, lora_b):
            return None
        state, source = self._state, _source_of(weight, lora_a)
        if state is None or state.source != source:
            if _is_captured(weight):  # memory of a graph's own would go with it
                return None
            state = self._state = _state_of(source, weight, lora_a, lora_b, state)
        factor = scale if isinstance(scale, Tensor) else float(scale)
        with torch._C._AutoDispatchBelowAutograd():  # as no_grad, in less time
            _update(weight, lora_a, lora_b, factor, state.norm, *state.kept)
        return state.norm


def _can_keep(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> bool:
    """Whether Triton serves these, and nothing records the call or transforms it."""
    forced = _library.variant(weight.dtype) == "_triton"
    if not forced and weight.device.type == "cpu":
        return False  # the common case, at once
    if weight.is_meta or isinstance(weight, FakeTensor):
        return False  # there is nothing to look at
    if torch.compiler.is_compiling() or is_recorded() or wants_composition():
        return False
    if not forced and _library.backend_of("dora_linear", weight.device, weight.dtype) != "triton":
        return False
    (n, k), r = weight.shape, lora_a.shape[0]
    if weight.is_inference() or not n * k or lora_a.shape != (r, k) or lora_b.shape != (n, r):
        return False
    return acc_dtype(lora_a) is torch.float32 and lora_b.dtype is lora_a.dtype


def _is_captured(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def _source_of(weight: Tensor, lora_a: Tensor) -> tuple:
    """What other weights differ in; nothing of it keeps the weight's memory.

    Another one in the memory of one that is gone has another diagonal.
    """
    shapes = weight.shape, weight.stride(), lora_a.shape
    return weight.data_ptr(), weight._version, weight.dtype, weight.device, *shapes


def _shapes_of(state: _State) -> tuple:
    return state.norm.device, *(one.shape for one in state.kept)


def _state_of(
    source: tuple, weight: Tensor, lora_a: Tensor, lora_b: Tensor, old: _State | None
) -> _State:
    """Of nothing yet: no value is as NaN is. In the old one's memory, if it has the shapes."""
    (n, k), r = weight.shape, lora_a.shape[0]
    shapes = (r, k), (n, r), (min(n, k),)
    with torch.inference_mode(False), torch.no_grad():
        if old is not None and _shapes_of(old) == (weight.device, *shapes):
            old.kept[0].fill_(torch.nan)
            return old._replace(source=source)
        kept = [weight.new_full(shape, torch.nan, dtype=torch.float32) for shape in shapes]
        norm = weight.new_empty(n, dtype=torch.float32)
        return _State(source, norm, (kept[0], kept[1], kept[2]))
