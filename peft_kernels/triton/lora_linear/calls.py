"""What the launches of one call of ``lora_linear`` share.

All but a dropout's seed follows from sizes, dtypes and the GPU: it is worked out once for every
call of the same, and of launches what ``layouts.py`` makes of it is kept too.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels.ops._dropout import threshold
from peft_kernels.triton.common import chips, cost, dependent, layouts
from peft_kernels.triton.common.launch import MAX_SPLITS, argument, chunks
from peft_kernels.triton.common.sizes import cdiv
from peft_kernels.triton.lora_linear import modelled, plans, tilings


class Sizes(NamedTuple):
    """What a call follows from, but for its dropout's share and seed."""

    direction: str
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    m: int
    n: int
    k: int
    r: int
    dropout: bool
    codes: str
    gain: bool
    device: torch.device
    arch_name: str
    cores: int
    precision: str


class Call(layouts.Layout):
    """The sizes, tiles and dropout of one call of the op; without dropout, of all of its sizes."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.m, self.n, self.k, self.r, self.dropout = sizes[3:8]
        self.problem = plans.Problem(*sizes[:10])
        self.arch_name, self.cores = sizes.arch_name, sizes.cores
        self.chip = cost.of_device(sizes.arch_name, sizes.device)
        self.block_r = chips.rank_block(self.r)
        self.rank_blocks = cdiv(self.r, self.block_r)
        self.precision = sizes.precision
        # Without ranks there is no first launch.
        self.pdl = self.r > 0 and dependent.launches(sizes.arch_name, sizes.device)
        self.dropout_p, self.inv_keep, self.threshold = 0.0, 1.0, 0
        self.seed: Any = 0
        self.seed_on_device = False

    def dropping(self, dropout_p: float, seed: Tensor | None) -> Call:
        """The call of these sizes whose dropout this is, if it has one."""
        if seed is None:
            return self
        call = copy.copy(self)
        call.dropout_p = dropout_p
        if dropout_p:
            # What kept elements are multiplied by, and below what the words of dropped ones are.
            call.inv_keep, call.threshold = 1.0 / (1.0 - dropout_p), threshold(dropout_p)
        call.seed, call.seed_on_device = argument(seed, 0)
        return call

    def over_dense(self) -> Call:
        """The same call where its weight isn't in codes."""
        call = copy.copy(_call(self.sizes._replace(codes="")))
        call.dropout_p, call.inv_keep, call.threshold = (
            self.dropout_p, self.inv_keep, self.threshold,
        )  # fmt: skip
        call.seed, call.seed_on_device = self.seed, self.seed_on_device
        return call

    def tile(self, kernel: str) -> chips.Tile:
        return chips.tile(self.arch_name, kernel, self.problem.dtype, self.m)

    def tiling(self, kernel: str, product: cost.Product) -> tilings.Tiling:
        return tilings.tiling(self.arch_name, kernel, self.problem.dtype, product, self.chip)

    def product_in_loop(self, in_terms: bool) -> cost.Product:
        return modelled.in_loop(self.arch_name, self.problem, in_terms)

    def slots(self, kernel: str) -> int:
        """In how many slots a kernel joins the terms of S or dS."""
        terms, dtype = self.problem.terms(), self.problem.dtype
        return chips.joined_slots(self.arch_name, kernel, dtype, terms, self.block_r)

    def slots_of_a(self, kernel: str, in_terms: bool) -> int:
        """Those of A: [terms, r, k], or joined by the kernel."""
        if in_terms:
            return chips.slots(self.problem.terms())
        return self.slots(kernel) if self.problem.adapter_dtype is torch.float32 else 1

    def chunks(self, length: int, block: int, programs: int) -> tuple[int, int]:
        return chunks(self.cores, length, block, programs)

    def column_groups(self, block: int) -> tuple[int, int]:
        """Splits the columns of dy in groups: (blocks in a group, groups).

        G groups and C chunks of rows fill the GPU when G C is about twice the cores; their partial
        sums, (G m + C n) r numbers, are fewest at G / C = n / m.
        """
        blocks = cdiv(self.n, block)
        wanted = 2 * self.cores / max(self.rank_blocks, 1)
        groups = round(math.sqrt(wanted * self.n / max(self.m, 1)))
        group = cdiv(blocks, min(max(groups, 1), MAX_SPLITS))
        return group, cdiv(blocks, group) if blocks else 0


def call_of(
    direction: str,
    x: Tensor,
    n: int,
    lora_a: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    codes: str = "",
    gain: bool = False,
) -> Call:
    """That of x and A over a layer of n outputs."""
    (m, k), device = x.shape, x.device
    sizes = (
        direction, x.dtype, lora_a.dtype, m, n, k, lora_a.shape[0], seed is not None, codes, gain,
        device, chips.arch_name(device), chips.cores(device), chips.float32_precision(device),
    )  # fmt: skip
    return _call(Sizes(*sizes)).dropping(dropout_p, seed)


_call = functools.lru_cache(maxsize=4096)(Call)
