"""Which tile a product gets, and in how many parts its sum is made."""

from dataclasses import replace

import pytest
import torch

from peft_kernels.triton.common import chips, cost
from peft_kernels.triton.common.cost import Product
from peft_kernels.triton.lora_linear import tilings

BF16, F32 = torch.bfloat16, torch.float32
KERNELS = ("tile", "tile_masked", "in_loop")


def programs(product, tiling):
    tile = tiling.tile
    return -(-product.m // tile.m) * -(-product.n // tile.n) * tiling.splits


@pytest.mark.parametrize("name", tilings.TILES)
def test_the_cores_are_filled_where_the_tile_decides(name):
    """128 rows of a layer had 16 programs on an H100, and 32 on an MI300X's 304 cores."""
    product = Product(128, 4096, 4096)
    tiling = tilings.tiling(name, "tile", BF16, product)
    one = tilings.Tiling(chips.tile(name, "tile", BF16, 128))
    assert programs(product, tiling) >= 2 * programs(product, one)


@pytest.mark.parametrize("name", tilings.TILES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("m", [1, 64, 65, 700, 16384])
def test_no_other_choice_is_faster_on_paper(name, kernel, m):
    product = Product(m, 1024, 4096)
    chip = cost.CHIPS[name]
    chosen = tilings.tiling(name, kernel, BF16, product)
    tiles = tilings.candidates(name, kernel, BF16, m)
    choices = [(tile, n) for tile in tiles for n in tilings.splits_of(kernel, tile)]
    least = min(cost.seconds(chip, product, *choice) for choice in choices)
    assert cost.seconds(chip, product, chosen.tile, chosen.splits) == least
    assert chosen.splits == 1 or m < 2048


@pytest.mark.parametrize("name", tilings.TILES)
def test_small_tiles_are_for_few_rows(name):
    for kernel in KERNELS:
        many = tilings.candidates(name, kernel, BF16, chips.FEW_ROWS + 1)
        few = tilings.candidates(name, kernel, BF16, chips.FEW_ROWS)
        big = chips.tile(name, kernel, BF16, chips.FEW_ROWS + 1)
        assert set(many) == {tile for tile in few if tile.m >= 64} | {big}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("m", [9, 900])
def test_one_tile_where_no_others_are_known(kernel, m):
    product = Product(m, 4096, 4096)
    for name, dtype in (("other", BF16), ("sm_90", F32)):
        tile = chips.tile(name, kernel, dtype, m)
        assert tilings.tiling(name, kernel, dtype, product) == tilings.Tiling(tile)


def test_the_cores_at_hand_count():
    """A seventh of an H100 has 16 SMs: a big tile fills them."""
    product = Product(256, 4096, 4096)
    whole = tilings.tiling("sm_90", "tile", BF16, product)
    h100 = cost.CHIPS["sm_90"]
    part = replace(h100, cores=16, flops=h100.flops * 16 / h100.cores)
    seventh = tilings.tiling("sm_90", "tile", BF16, product, part)
    assert programs(product, seventh) < programs(product, whole)


@pytest.mark.parametrize("name", tilings.TILES)
def test_the_parts_of_a_sum_take_little_memory(name):
    for m in (512, 2048, 16384):
        product = cost.Product(m, 14336, 14336)
        found = tilings.tiling(name, "tile", torch.bfloat16, product)
        assert found.splits == 1 or 4 * found.splits * m * 14336 <= tilings.PARTS_BYTES
