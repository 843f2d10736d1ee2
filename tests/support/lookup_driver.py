"""prompt_lookup's device code, run on the CPU: compiles csrc/simt and calls it by ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from decode_driver import DTYPE_CODES, DecodeError, Traffic, compile_driver
from torch import Tensor

READ = ("embeddings", "prompts", "task_ids", "positions", "mask", "labels")
WRITTEN = ("out", "out_mask", "position_ids", "out_labels")
SIZES = ("batch", "seq", "length", "d", "prompt_count", "row_stride", "token_stride")


class _Call(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("prompt_dtype", ctypes.c_int32),
        ("backward", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in (*READ, *WRITTEN)),
        *((name, ctypes.c_int64) for name in (*SIZES, "position_stride", "seed", "left_out")),
        ("vector", ctypes.c_int64),
        ("traffic", (ctypes.c_int64 * 4) * (len(READ) + len(WRITTEN))),
        ("error", ctypes.c_char * 512),
    ]


class Run(NamedTuple):
    """What a launch wrote, the traffic by buffer, and how many elements it moved at once."""

    results: tuple[Tensor, ...]
    traffic: dict[str, Traffic]
    vector: int


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@functools.cache
def _library() -> ctypes.CDLL:
    if path := os.environ.get("PEFT_KERNELS_SIMT_LOOKUP"):
        return ctypes.CDLL(path)
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    output = Path(_folder().name, "lookup.so")
    return ctypes.CDLL(str(compile_driver(output, "-O2", op="prompt_lookup")))


def _launch(call: _Call, tensors: dict[str, Tensor | None]) -> tuple[dict[str, Traffic], int]:
    for name, tensor in tensors.items():
        setattr(call, name, None if tensor is None else tensor.data_ptr())
    positions = tensors["positions"]
    call.batch, call.length = positions.shape
    call.position_stride = positions.stride(0)
    if _library().prompt_lookup_simt(ctypes.byref(call)):
        raise DecodeError(call.error.decode())
    rows = zip((*READ, *WRITTEN), call.traffic, strict=True)
    return {name: Traffic(*row) for name, row in rows}, call.vector


def forward(
    embeddings: Tensor,
    prompts: Tensor,
    task_ids: Tensor | None,
    positions: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
    **schedule: int,
) -> Run:
    """out, its mask, positions and labels; ``seed`` and ``left_out`` are of the schedule."""
    (batch, seq, d), total = embeddings.shape, positions.shape[1] + embeddings.shape[1]
    out = embeddings.new_full((batch, total, d), torch.nan)
    integers = [torch.full((batch, total), -7) for _ in range(2 + (labels is not None))]
    call = _Call(DTYPE_CODES[embeddings.dtype], DTYPE_CODES[prompts.dtype], **schedule)
    call.seq, call.d, call.prompt_count = seq, d, prompts.shape[0]
    call.row_stride, call.token_stride = embeddings.stride()[:2]
    read = (embeddings, prompts, task_ids, positions, mask, labels)
    tensors = dict(zip((*READ, *WRITTEN), (*read, out, *integers), strict=False))
    return Run((out, *integers), *_launch(call, tensors))


def backward(
    d_out: Tensor,
    task_ids: Tensor | None,
    positions: Tensor,
    prompts: int,
    needs_embeddings: bool = True,
    needs_prompts: bool = True,
    **schedule: int,
) -> Run:
    """d_embeddings and d_prompts, NaN where they weren't written."""
    (batch, total, d), length = d_out.shape, positions.shape[1]
    d_embeddings = d_out.new_full((batch, total - length, d), torch.nan)
    d_prompts = torch.full((prompts, length, d), torch.nan)
    call = _Call(DTYPE_CODES[d_out.dtype], backward=1, **schedule)
    call.seq, call.d, call.prompt_count = total - length, d, prompts
    call.row_stride, call.token_stride = d_out.stride()[:2]
    tensors = {"task_ids": task_ids, "positions": positions, "out": d_out}
    tensors["embeddings"] = d_embeddings if needs_embeddings else None
    tensors["prompts"] = d_prompts if needs_prompts else None
    return Run((d_embeddings, d_prompts), *_launch(call, tensors))
