"""Launchers of ``prompt_lookup``: one launch forward, one backward, and nothing is waited for.

The maths and the schemas are in ``peft_kernels/ops/prompt_lookup.py``, the kernels in
``kernels.py``.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from peft_kernels.triton.common.launch import launch
from peft_kernels.triton.common.sizes import cdiv, next_power_of_2
from peft_kernels.triton.prompt_lookup import kernels

# All is memory traffic: the same on every chip. A row of 256 elements is a vector of 16 bytes for
# each thread of a warp, and divides the width of most models.
BLOCK_N, ELEMENTS, WARPS = 256, 2048, 4
MAX_BLOCK_M = 64
BLOCK_ROW = 512  # places of a row that are counted at once
BLOCK_SLOTS, AT_ONCE = 4, 4  # of a prompt's sum: slots, and rows of the batch on their way


def prompt_lookup_fwd(
    embeddings: Tensor,
    prompts: Tensor,
    task_ids: Tensor | None,
    positions: Tensor,
    mask: Tensor | None,
    labels: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out ``[B, L + S, d]``; its mask, positions and labels, ``[B, L + S]``, int64."""
    (batch, seq, d), length = embeddings.shape, positions.shape[1]
    total = length + seq
    out = embeddings.new_empty(batch, total, d)
    out_mask = embeddings.new_empty(batch, total, dtype=torch.int64)
    position_ids = torch.empty_like(out_mask)
    out_labels = out_mask.new_empty((0,) if labels is None else (batch, total))
    tile = _tile(d)
    with torch.cuda.device_of(embeddings):
        launch(
            kernels.prompt_lookup_fwd_kernel,
            (batch + _tiles(batch, total, d, tile),) if total else (0,),
            embeddings, prompts, task_ids, positions, mask, labels,
            out, out_mask, position_ids, out_labels,
            batch, seq, length, d, prompts.shape[0], length.bit_length(),
            *embeddings.stride(), *prompts.stride(), *_strides(task_ids, 1),
            *positions.stride(), *_strides(mask, 2), *_strides(labels, 2),
            HAS_IDS=task_ids is not None, HAS_MASK=mask is not None,
            HAS_LABELS=labels is not None, **tile, BLOCK_ROW=BLOCK_ROW, num_warps=WARPS,
        )  # fmt: skip
    return out, out_mask, position_ids, out_labels


def prompt_lookup_bwd(
    d_out: Tensor,
    task_ids: Tensor | None,
    positions: Tensor,
    prompts: int,
    needs_embeddings: bool,
    needs_prompts: bool,
) -> tuple[Tensor, Tensor]:
    """d_embeddings ``[B, S, d]`` in d_out's dtype, d_prompts ``[P, L, d]`` in float32."""
    (batch, length), (_, total, d) = positions.shape, d_out.shape
    seq = total - length
    d_embeddings = d_out.new_empty((batch, seq, d) if needs_embeddings else (0,))
    soft = (prompts, length, d) if needs_prompts else (0,)
    d_prompts = d_out.new_empty(soft, dtype=torch.float32)
    tile = _tile(d)
    sums = copies = 0
    if needs_prompts:
        sums = _tiles(prompts, length, d, tile | {"BLOCK_M": BLOCK_SLOTS})
    if needs_embeddings:
        copies = _tiles(batch, seq, d, tile)
    with torch.cuda.device_of(d_out):
        launch(
            kernels.prompt_lookup_bwd_kernel,
            (sums + copies,),
            d_out, task_ids, positions, d_embeddings, d_prompts,
            batch, seq, length, d, length.bit_length(), sums,
            *d_out.stride(), *_strides(task_ids, 1), *positions.stride(),
            HAS_IDS=task_ids is not None, AT_ONCE=AT_ONCE,
            **tile, BLOCK_SLOTS=BLOCK_SLOTS, num_warps=WARPS,
        )  # fmt: skip
    return d_embeddings, d_prompts


@functools.lru_cache(maxsize=256)
def _tile(d: int) -> dict[str, int]:
    """Tokens x elements of a tile: few elements leave room for more tokens."""
    columns = min(BLOCK_N, max(16, next_power_of_2(d)))
    return {"BLOCK_M": min(MAX_BLOCK_M, ELEMENTS // columns), "BLOCK_N": columns}


def _tiles(rows: int, tokens: int, d: int, tile: dict[str, int]) -> int:
    """How many tiles cover [rows, tokens, d]."""
    return rows * cdiv(tokens, tile["BLOCK_M"]) * cdiv(d, tile["BLOCK_N"])


def _strides(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    return (0,) * dimensions if tensor is None else tensor.stride()
