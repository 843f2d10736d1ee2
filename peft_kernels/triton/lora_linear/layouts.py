"""The grids and options of the launches of ``lora_linear``."""

from __future__ import annotations

from typing import Any, NamedTuple

from peft_kernels.triton.common import chips, dependent
from peft_kernels.triton.common.launch import GROUP_M, options
from peft_kernels.triton.common.layouts import Prepared
from peft_kernels.triton.common.sizes import cdiv
from peft_kernels.triton.lora_linear import tilings
from peft_kernels.triton.lora_linear.calls import Call
from peft_kernels.triton.lora_linear.tilings import Tiling


class Summed(NamedTuple):
    """A launch whose sum is in ``splits`` parts, each over ``chunk`` of its length."""

    splits: int
    chunk: int
    launch: Prepared


class Added(NamedTuple):
    """What a launch that adds is given: which of its arguments there are, and where they are."""

    has_bias: bool
    has_gain: bool
    factor_on_device: bool
    seed_on_device: bool

    def settings(self, factor: str = "FACTOR") -> dict[str, bool]:
        return {
            "HAS_BIAS": self.has_bias,
            "HAS_GAIN": self.has_gain,
            f"{factor}_ON_DEVICE": self.factor_on_device,
            "SEED_ON_DEVICE": self.seed_on_device,
        }


# ---- forward -----------------------------------------------------------------------------------


def shrink_launch(
    call: Call, in_terms: bool, splits: int, seed_on_device: bool, pdl: bool
) -> Summed:
    """Of S in ``splits`` parts; 0: as many as fill the GPU. ``pdl``: what reads S is next."""
    tile = call.tile("shrink")
    block_r = min(call.block_r, chips.MAX_TERMS_BLOCK_R) if in_terms else call.block_r
    programs = cdiv(call.m, tile.m) * cdiv(call.r, block_r)
    if splits:
        chunk = _chunk(call.k, Tiling(tile, splits))
    else:
        chunk, splits = call.chunks(call.k, tile.k, programs)
        splits = max(splits, 1)  # k = 0 still has an S, of zeros
    settings = {
        "DROPOUT": call.dropout, "SEED_ON_DEVICE": seed_on_device, "TERMS": call.problem.terms(),
        "SLOTS": call.slots_of_a("shrink", in_terms), "PRECISION": call.precision,
        "BLOCK_M": tile.m, "BLOCK_K": tile.k, "BLOCK_R": block_r, **options(tile),
        **dependent.first(pdl),
    }  # fmt: skip
    return Summed(splits, chunk, ((programs, splits), settings))


def in_loop_launch(call: Call, tiling: Tiling, in_terms: bool, added: Added) -> Summed:
    """Of y and S in one loop over k."""
    tile, splits = tiling.tile, tiling.splits
    settings: dict[str, Any] = {
        **added.settings("SCALE"), "DROPOUT": call.dropout, "TERMS": call.problem.terms(),
        "SLOTS": call.slots_of_a("in_loop", in_terms),
        **_product(call, tiling), "BLOCK_R": call.block_r,
        **dependent.first(call.pdl and splits > 1),
    }  # fmt: skip
    grid = cdiv(call.m, tile.m) * cdiv(call.n, tile.n), splits
    return Summed(splits, _chunk(call.k, tiling), (grid, settings))


# ---- y and dx ----------------------------------------------------------------------------------


def tile_launch(
    call: Call, tiling: Tiling, n: int, depth: int, dropout: bool, added: Added, pdl: bool
) -> Summed:
    """Of n columns, summed over ``depth``. ``pdl``: after what makes P.

    In parts it is a first launch itself, of the one that adds them up.
    """
    first = dependent.first(call.pdl and tiling.splits > 1)
    pair = dependent.second(True) if pdl else first
    tile = tiling.tile
    settings = {
        **added.settings(), "DROPOUT": dropout, **_product(call, tiling),
        "BLOCK_R": min(call.block_r, chips.MAX_TILE_BLOCK_R), **pair,
    }  # fmt: skip
    grid = cdiv(call.m, tile.m) * cdiv(n, tile.n), tiling.splits
    return Summed(tiling.splits, _chunk(depth, tiling), (grid, settings))


def add_launch(
    call: Call, n: int, parts: int, parts_of_p: int, dropout: bool, added: Added, pdl: bool
) -> Prepared:
    """Of n columns; ``parts_of_p``: of S, which the launch adds up, 0 where it doesn't.

    ``pdl``: after what makes P or the parts.
    """
    tile = tilings.ADDED_S if parts_of_p else call.tile("add_low_rank")
    tile = tilings.ADDED if parts > 1 else tile
    return (cdiv(call.m, tile.m) * cdiv(n, tile.n),), {
        **added.settings(), "DROPOUT": dropout, "PRECISION": call.precision,
        "PARTS": parts, "P_PARTS": parts_of_p or 1, "GROUP_M": GROUP_M,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n,
        "BLOCK_R": min(call.block_r, chips.MAX_TILE_BLOCK_R), **options(tile),
        **dependent.second(pdl),
    }  # fmt: skip


def _product(call: Call, tiling: Tiling) -> dict[str, Any]:
    """The options of every product with the frozen weight."""
    tile = tiling.tile
    return {
        "PRECISION": call.precision, "SPLIT": tiling.splits > 1, "GROUP_M": GROUP_M,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, **options(tile),
    }  # fmt: skip


def _chunk(length: int, tiling: Tiling) -> int:
    """What each split sums over, in whole blocks; the last splits may have nothing left."""
    block = tiling.tile.k
    return block * cdiv(cdiv(length, block), tiling.splits)


# ---- the factors' gradients --------------------------------------------------------------------


class FromDy(NamedTuple):
    """dS in parts by group of columns, dB in parts by chunk of rows."""

    groups: int
    group: int
    splits: int
    chunk: int
    launch: Prepared


def from_dy_launch(call: Call, needs_ds: bool, needs_db: bool) -> FromDy:
    tile = call.tile("from_dy")
    group, groups = call.column_groups(tile.n)
    chunk, splits = call.chunks(call.m, tile.m, groups * call.rank_blocks)
    settings = {
        "NEEDS_DS": needs_ds, "NEEDS_DB": needs_db, "TERMS": call.problem.terms(),
        "SLOTS": call.slots("from_dy"), "PRECISION": call.precision,
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_R": call.block_r, **options(tile),
    }  # fmt: skip
    grid = groups * call.rank_blocks, splits
    return FromDy(groups, group, splits, chunk, (grid, settings))


def grad_a_launch(call: Call, seed_on_device: bool) -> Summed:
    tile = call.tile("grad_a")
    programs = cdiv(call.k, tile.k) * call.rank_blocks
    chunk, splits = call.chunks(call.m, tile.m, programs)
    settings = {
        "DROPOUT": call.dropout, "SEED_ON_DEVICE": seed_on_device, "TERMS": call.problem.terms(),
        "SLOTS": call.slots("grad_a"), "PRECISION": call.precision,
        "BLOCK_M": tile.m, "BLOCK_K": tile.k, "BLOCK_R": call.block_r, **options(tile),
    }  # fmt: skip
    return Summed(splits, chunk, ((programs, splits), settings))
