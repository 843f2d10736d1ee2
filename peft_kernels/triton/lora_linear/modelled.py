"""What each plan of ``lora_linear`` takes on paper, by the model of ``common/cost.py``.

The library's GEMM is counted at its roofline, for no library was measured: where products are the
bound, that is the plan, until `tune` measures it. Of the backward only dx differs between plans.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

from peft_kernels.triton.common import chips, cost
from peft_kernels.triton.lora_linear import tilings

if TYPE_CHECKING:
    from peft_kernels.triton.lora_linear.plans import Problem


def base(problem: Problem) -> cost.Product:
    """y's product with the frozen weight, or dx's."""
    n, k = problem.n, problem.k
    if problem.direction == "bwd":
        n, k = k, n
    return cost.Product(problem.m, n, k)


@functools.lru_cache(maxsize=4096)
def in_loop(problem: Problem) -> cost.Product:
    """The same with S from the same loop."""
    narrow = problem.adapter_dtype is problem.dtype
    return cost.Product(
        problem.m, problem.n, problem.k, ranks=chips.rank_block(problem.r),
        rank_bytes=problem.adapter_dtype.itemsize, terms=1 if narrow else problem.terms(),
    )  # fmt: skip


def seconds(name: str, problem: Problem, plan: str) -> float:
    """The modelled time of y and S, or of dx from dS."""
    chip, product = cost.CHIPS[name], base(problem)
    if plan == "ii":
        return tilings.seconds(name, "in_loop", problem.dtype, in_loop(problem))
    time = 0.0
    if problem.direction == "fwd":
        # S is split over k: its parts are added up in a second launch.
        time = 2 * cost.LAUNCH + 2 * problem.m * problem.k / chip.bandwidth
    if plan == "library":
        added = 2 * product.bytes_written() / chip.bandwidth
        return time + 2 * cost.LAUNCH + product.roofline(chip) + added
    masked = problem.direction == "bwd" and problem.dropout
    kernel = "tile_masked" if masked else "tile"
    return time + tilings.seconds(name, kernel, problem.dtype, product)


def roofline(name: str, problem: Problem) -> float:
    """What no plan goes below: one launch, and the products or bytes of all that `seconds` times.

    Neither counts what is of a row's or column's length times the rank: B, S and dS.
    """
    product = base(problem)
    if problem.direction == "fwd":
        product = replace(product, ranks=problem.r, rank_bytes=problem.adapter_dtype.itemsize)
    return cost.LAUNCH + product.roofline(cost.CHIPS[name])
