"""Rows whose prefixes differ in length: one call of the kernel, or one for each length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_kernels.ops._dispatch import wants_cpu_forward
from peft_kernels.ops._prefix_lengths import prefix_attention_lengths
from peft_kernels.ops.prefix_attention import prefix_attention


class Lengths:
    """How long each row's prefix is, and which rows have one length.

    Args:
        ids: integers ``[B]``, each row's prefix; -1: none.
        lengths: of the prefixes.
    """

    def __init__(self, ids: Tensor, lengths: Sequence[int]) -> None:
        self._ids, self._lengths = ids.to(torch.int32), tuple(lengths)
        self.of_rows = torch.tensor([*lengths, 0], device=ids.device)[ids.long()]  # -1 is the last
        rows: dict[int, list[int]] = {}
        without: list[int] = []
        for row, number in enumerate(ids.tolist()):
            (without if number < 0 else rows.setdefault(lengths[number], [])).append(row)
        # Rows without a prefix read none, so that they go with any others.
        rows.setdefault(next(iter(rows), 0), []).extend(without)
        self.groups = [
            (length, torch.tensor(chosen, device=ids.device)) for length, chosen in rows.items()
        ]
        order = [row for chosen in rows.values() for row in chosen]
        back = sorted(range(len(order)), key=order.__getitem__)
        self.back = torch.tensor(back, device=ids.device)

    def seen(self, length: int) -> Tensor:
        """Which of a bank's ``length`` keys are a row's prefix's: ``[B, 1, 1, length]``."""
        slots = torch.arange(length, device=self.of_rows.device)
        return slots < self.of_rows[:, None, None, None]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        ids: Tensor,
        mask: Tensor | None,
        **options: Any,
    ) -> Tensor:
        """:func:`prefix_attention`, as ``[B, S, Hq, D]``."""
        if len(self.groups) > 1 and wants_cpu_forward(q):
            options |= {"prefix_ids": self._ids, "prefix_lengths": self._lengths}
            out = prefix_attention_lengths(q, k, v, prefix_k, prefix_v, attn_mask=mask, **options)
            return out.transpose(1, 2)
        parts = []
        for length, rows in self.groups:
            bank = prefix_k[..., :length, :], prefix_v[..., :length, :]
            if len(self.groups) == 1:
                options |= {"prefix_ids": ids, "attn_mask": mask}
                return prefix_attention(q, k, v, *bank, **options).transpose(1, 2)
            options["prefix_ids"] = ids.index_select(0, rows)
            by_row = mask is not None and mask.dim() == 4 and mask.shape[0] > 1
            options["attn_mask"] = mask[rows] if mask is not None and by_row else mask
            own = [x.index_select(0, rows) for x in (q, k, v)]
            out = prefix_attention(own[0], own[1], own[2], *bank, **options)
            parts.append(out.transpose(1, 2))
        return torch.cat(parts).index_select(0, self.back)
