"""What each plan of ``lora_linear`` takes on paper, by the model of ``common/cost.py``.

The library's GEMM is counted at its roofline, for no library was measured: where products are the
bound, that is the plan, until `tune` measures it. Of the backward only dx differs between plans.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from peft_kernels.triton.common import chips, cost
from peft_kernels.triton.common.launch import chunks
from peft_kernels.triton.common.sizes import cdiv
from peft_kernels.triton.lora_linear import tilings

if TYPE_CHECKING:
    from peft_kernels.triton.lora_linear.plans import Problem

# What the names of plans end with that write A in terms first.
IN_TERMS = "_terms"
# In how many parts the library's plan may leave S to its last launch. Each number is a variant of
# the kernel that adds them up.
PARTS_OF_S = (2, 4, 8, 16)


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
    if problem.adapter_dtype is problem.dtype or name == chips.NO_TENSOR_CORES:
        return problem.adapter_dtype.itemsize, 1, 0
    if in_terms:
        return terms * problem.dtype.itemsize, chips.slots(terms), 0
    block_r = chips.rank_block(problem.r)
    slots = chips.joined_slots(name, kernel, problem.dtype, terms, block_r)
    products, stops = (terms, terms) if slots == 1 else (slots, 1)
    return problem.adapter_dtype.itemsize, products, stops


def seconds(name: str, problem: Problem, plan: str, chip: cost.Chip | None = None) -> float:
    """The modelled time of y and S, or of dx from dS, on ``chip`` or the architecture's."""
    chip, product = chip or cost.CHIPS[name], base(problem)
    time, in_terms = 0.0, plan.endswith(IN_TERMS)
    if in_terms:
        time, plan = _terms(chip, problem), plan.removesuffix(IN_TERMS)
    if plan == "ii":
        found = in_loop(name, problem, in_terms)
        return time + tilings.seconds(name, "in_loop", problem.dtype, found, chip)
    forward = problem.direction == "fwd"
    if plan == "library":
        time += _shrink_for_add(name, problem, in_terms, chip) if forward else 0.0
        size = product.bytes_written()
        added = cost.reread_seconds(chip, size) + size / chip.bandwidth
        added += chip.second_launch() if forward else cost.LAUNCH
        return time + cost.LAUNCH + product.roofline(chip) + added
    if forward:  # the tile's is a second launch
        time += _summed(name, problem, in_terms, chip) + chip.second_launch() - cost.LAUNCH
    masked = not forward and problem.dropout
    kernel = "tile_masked" if masked else "tile"
    return time + tilings.seconds(name, kernel, problem.dtype, product, chip)


def _terms(chip: cost.Chip, problem: Problem) -> float:
    """A in float32 read, its terms written."""
    numbers = problem.r * problem.k
    return cost.LAUNCH + (4 + 2 * problem.terms()) * numbers / chip.bandwidth


def _summed(name: str, problem: Problem, in_terms: bool, chip: cost.Chip) -> float:
    """S, split over k as far as fills the chip; parts are added up in a second launch."""
    time = _shrink(name, problem, in_terms, chip, 0)
    return time + chip.second_launch() * (_filling(name, problem, in_terms, chip)[1] > 1)


def _filling(name: str, problem: Problem, in_terms: bool, chip: cost.Chip) -> tuple[int, int]:
    """The parts of S that fill the chip: what each sums over, and how many."""
    k, block = problem.k, chips.tile(name, "shrink", problem.dtype, problem.m).k
    return chunks(chip.cores, k, block, _programs_of_s(name, problem, in_terms))


def _programs_of_s(name: str, problem: Problem, in_terms: bool) -> int:
    """Those of one part."""
    rows = chips.tile(name, "shrink", problem.dtype, problem.m).m
    return cdiv(problem.m, rows) * cdiv(problem.r, _block_r(problem, in_terms))


def _block_r(problem: Problem, in_terms: bool) -> int:
    block_r = chips.rank_block(problem.r)
    return min(block_r, chips.MAX_TERMS_BLOCK_R) if in_terms else block_r


def _shrink(name: str, problem: Problem, in_terms: bool, chip: cost.Chip, splits: int) -> float:
    """One launch: S in ``splits`` parts, 0 for as many as fill the chip."""
    tile = chips.tile(name, "shrink", problem.dtype, problem.m)
    rank_bytes, products, stops = _operand(name, "shrink", problem, in_terms)
    block_r = _block_r(problem, in_terms)
    chunk = tile.k * cdiv(cdiv(problem.k, tile.k), max(splits, 1))
    if not splits:
        chunk, splits = _filling(name, problem, in_terms, chip)
    programs = splits * _programs_of_s(name, problem, in_terms)
    operands = 2 * tile.m + rank_bytes * block_r
    busy = max(cost.busy_seconds(chip, tile.m * products * block_r, operands, chunk))
    stopped = cost.stopped_seconds(chip, tile, operands, programs, cdiv(chunk, tile.k) * stops)
    read = 2 * problem.m * problem.k / chip.bandwidth
    drawn = max(1, chip.cores / (cost.SHARES * max(programs, 1)))
    return cost.LAUNCH + max(cdiv(programs, chip.cores) * busy, stopped, drawn * read)


def _parts_of_s(name: str, problem: Problem, in_terms: bool, chip: cost.Chip, splits: int) -> float:
    """S in parts that each tile of columns adds up in the launch after the library's GEMM."""
    read = cdiv(problem.n, tilings.ADDED_S.n) * 4 * splits * problem.m * problem.r
    # Through the ports: what was just written, and is read again and again.
    return _shrink(name, problem, in_terms, chip, splits) + read / cost.ports(chip)


@functools.lru_cache(maxsize=4096)
def parts_of_s(
    name: str, problem: Problem, in_terms: bool = False, chip: cost.Chip | None = None
) -> int:
    """In how many parts the library's plan leaves S to its last launch; 0: it has S before."""
    ours = name in chips.ARCHS and name != chips.NO_TENSOR_CORES
    if chip is None or not ours or problem.dtype is torch.float32 or not problem.n:
        return 0
    times = {0: _summed(name, problem, in_terms, chip)}
    for splits in PARTS_OF_S:
        times[splits] = _parts_of_s(name, problem, in_terms, chip, splits)
    return min(times, key=times.__getitem__)


def _shrink_for_add(name: str, problem: Problem, in_terms: bool, chip: cost.Chip) -> float:
    splits = parts_of_s(name, problem, in_terms, chip)
    if not splits:
        return _summed(name, problem, in_terms, chip)
    return _parts_of_s(name, problem, in_terms, chip, splits)


class Launches(NamedTuple):
    """How many, the library's among them, and how many of them may overlap with the one before."""

    total: int
    overlapping: int

    def beyond_the_first(self, chip: cost.Chip) -> float:
        """Seconds that these take besides their work."""
        others = self.total - 1 - self.overlapping
        return others * cost.LAUNCH + self.overlapping * chip.second_launch()


def launches(name: str, problem: Problem, plan: str) -> Launches:
    """Those that `seconds` counts."""
    in_terms = plan.endswith(IN_TERMS)
    plan = plan.removesuffix(IN_TERMS)
    chip, product, kernel = cost.CHIPS[name], base(problem), "tile"
    if plan == "ii":
        product, kernel = in_loop(name, problem, in_terms), "in_loop"
    if plan == "library":
        whole = not parts_of_s(name, problem, in_terms, chip)
        added = 1
    else:
        whole = True
        added = int(tilings.tiling(name, kernel, problem.dtype, product).splits > 1)
    if problem.direction == "bwd":
        return Launches(1 + added, 0 if plan == "library" else added)
    if plan == "ii":
        return Launches(1 + added + in_terms, added)
    summed = whole and _filling(name, problem, in_terms, chip)[1] > 1
    # After S, whose launch is a first one, all of ours do.
    after = summed + added + (plan == "i")
    return Launches(1 + after + in_terms + (plan == "library"), after)


def roofline(name: str, problem: Problem) -> float:
    """What no plan goes below: one launch, and the products or bytes of all that `seconds` times.

    Neither counts what is of a row's or column's length times the rank: B, S and dS.
    """
    product = base(problem)
    if problem.direction == "fwd":
        product = replace(product, ranks=problem.r, rank_bytes=problem.adapter_dtype.itemsize)
    return cost.LAUNCH + product.roofline(cost.CHIPS[name])
