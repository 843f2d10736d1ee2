"""What each plan of ``lora_linear`` takes on paper, by the model of ``common/cost.py``.

The library's GEMM is counted at its roofline, for no library was measured: where products are the
bound, that is the plan, until `tune` measures it. Of the backward only dx differs between plans.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

from peft_kernels.triton.common import chips, cost
from peft_kernels.triton.common.launch import chunks
from peft_kernels.triton.common.sizes import cdiv
from peft_kernels.triton.lora_linear import tilings

if TYPE_CHECKING:
    from peft_kernels.triton.lora_linear.plans import Problem

# What the names of plans end with that write A in terms first.
IN_TERMS = "_terms"


def base(problem: Problem) -> cost.Product:
    """y's product with the frozen weight, or dx's."""
    n, k = problem.n, problem.k
    if problem.direction == "bwd":
        n, k = k, n
    return cost.Product(problem.m, n, k)


@functools.lru_cache(maxsize=4096)
def in_loop(name: str, problem: Problem, in_terms: bool = False) -> cost.Product:
    """The same with S from the same loop; ``in_terms``: of an A that was written in terms."""
    return cost.Product(
        problem.m, problem.n, problem.k, chips.rank_block(problem.r),
        *_operand(name, "in_loop", problem, in_terms),
    )  # fmt: skip


def _operand(name: str, kernel: str, problem: Problem, in_terms: bool) -> tuple[int, int, int]:
    """Of a kernel's A: bytes of a number, how often it is multiplied, and a block's stops."""
    terms = problem.terms()
    if problem.adapter_dtype is problem.dtype:
        return problem.dtype.itemsize, 1, 0
    if in_terms:
        return terms * problem.dtype.itemsize, chips.slots(terms), 0
    block_r = chips.rank_block(problem.r)
    slots = chips.joined_slots(name, kernel, problem.dtype, terms, block_r)
    products, stops = (terms, terms) if slots == 1 else (slots, 1)
    return problem.adapter_dtype.itemsize, products, stops


def seconds(name: str, problem: Problem, plan: str) -> float:
    """The modelled time of y and S, or of dx from dS."""
    chip, product = cost.CHIPS[name], base(problem)
    time, in_terms = 0.0, plan.endswith(IN_TERMS)
    if in_terms:
        time, plan = _terms(chip, problem), plan.removesuffix(IN_TERMS)
    if plan == "ii":
        found = in_loop(name, problem, in_terms)
        return time + tilings.seconds(name, "in_loop", problem.dtype, found)
    if problem.direction == "fwd":
        time += _shrink(name, problem, in_terms)
    if plan == "library":
        added = 2 * product.bytes_written() / chip.bandwidth
        return time + 2 * cost.LAUNCH + product.roofline(chip) + added
    masked = problem.direction == "bwd" and problem.dropout
    kernel = "tile_masked" if masked else "tile"
    return time + tilings.seconds(name, kernel, problem.dtype, product)


def _terms(chip: cost.Chip, problem: Problem) -> float:
    """A in float32 read, its terms written."""
    numbers = problem.r * problem.k
    return cost.LAUNCH + (4 + 2 * problem.terms()) * numbers / chip.bandwidth


def _shrink(name: str, problem: Problem, in_terms: bool) -> float:
    """S, split over k, whose parts are added up in a second launch."""
    chip, tile = cost.CHIPS[name], chips.tile(name, "shrink", problem.dtype, problem.m)
    rank_bytes, products, stops = _operand(name, "shrink", problem, in_terms)
    block_r = chips.rank_block(problem.r)
    if in_terms:
        block_r = min(block_r, chips.MAX_TERMS_BLOCK_R)
    programs = cdiv(problem.m, tile.m) * cdiv(problem.r, block_r)
    chunk, splits = chunks(chip.cores, problem.k, tile.k, programs)
    programs *= splits
    operands = 2 * tile.m + rank_bytes * block_r
    busy = cost.busy_seconds(chip, tile.m * products * block_r, operands, chunk)
    stopped = cost.stopped_seconds(chip, tile, operands, programs, cdiv(chunk, tile.k) * stops)
    read = 2 * problem.m * problem.k / chip.bandwidth
    return 2 * cost.LAUNCH + max(cdiv(programs, chip.cores) * busy, stopped, read)


def roofline(name: str, problem: Problem) -> float:
    """What no plan goes below: one launch, and the products or bytes of all that `seconds` times.

    Neither counts what is of a row's or column's length times the rank: B, S and dS.
    """
    product = base(problem)
    if problem.direction == "fwd":
        product = replace(product, ranks=problem.r, rank_bytes=problem.adapter_dtype.itemsize)
    return cost.LAUNCH + product.roofline(cost.CHIPS[name])
