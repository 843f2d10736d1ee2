"""The model of a product's time, by hand."""

from dataclasses import replace

import pytest

from peft_kernels.triton.common import chips, cost
from peft_kernels.triton.common.chips import Tile
from peft_kernels.triton.common.cost import LAUNCH, Chip, Product, seconds

# 10 cores of 1e9 products a second that we reach, 1e9 bytes a second and 1e9 through a port
CHIP = Chip(10, 2e10 / cost.REACHED, 1e9, 1e9 / cost.PORT)
TILE = Tile(64, 64, 64, 4, 3)


def test_every_chip_has_figures():
    for name, arch in chips.ARCHS.items():
        chip = cost.CHIPS[name]
        assert chip.cores == arch.cores
        assert chip.flops / chip.bandwidth == pytest.approx(arch.balance, rel=0.02)


def test_products_bind():
    chip = replace(CHIP, bandwidth=1e15, clock=1e15)
    for m, waves in ((64, 1), (640, 1), (641, 2), (1280, 2), (1281, 3)):
        time = seconds(chip, Product(m, 64, 1000), TILE) - LAUNCH
        assert time == pytest.approx(waves * 64 * 64 * 1000 / 1e9), m


def test_the_port_binds():
    chip = replace(CHIP, flops=1e20, bandwidth=1e15)
    time = seconds(chip, Product(64, 64, 1000), TILE) - LAUNCH
    assert time == pytest.approx(2 * (64 + 64) * 1000 / 1e9)
    # rows and columns that aren't there aren't loaded
    time = seconds(chip, Product(3, 5, 1000), TILE) - LAUNCH
    assert time == pytest.approx(2 * (3 + 5) * 1000 / 1e9)


def test_memory_binds_and_one_core_draws_its_shares_alone():
    chip = replace(CHIP, flops=1e20, clock=1e15)
    moved = 2 * (640 * 1000 + 64 * 1000 + 640 * 64)
    time = seconds(chip, Product(640, 64, 1000), TILE) - LAUNCH
    assert time == pytest.approx(moved / 1e9)
    moved = 2 * (64 * 1000 + 64 * 1000 + 64 * 64)
    time = seconds(chip, Product(64, 64, 1000), TILE) - LAUNCH
    assert time == pytest.approx(10 / cost.SHARES * moved / 1e9)


def test_parts_are_written_and_added_up_in_a_launch():
    chip = replace(CHIP, flops=1e20, clock=1e15)
    parts = 4 * 10 * 64 * 64
    read = 2 * (64 * 1000 + 64 * 1000)
    time = seconds(chip, Product(64, 64, 1000), TILE, splits=10)
    expected = 2 * LAUNCH + (read + parts) / 1e9 + (parts + 2 * 64 * 64) / 1e9
    assert time == pytest.approx(expected)


def test_what_the_launch_before_wrote_is_read_from_l2_where_it_fits():
    chip = replace(CHIP, flops=1e20, l2=2000)
    assert cost.reread_seconds(chip, 1000) == pytest.approx(1000 / 10e9)
    assert cost.reread_seconds(chip, 1001) == pytest.approx(1001 / 1e9)
    product, parts = Product(64, 64, 1000), 4 * 10 * 64 * 64
    in_l2, in_dram = (seconds(replace(chip, l2=size), product, TILE, 10) for size in (1 << 20, 0))
    assert in_dram - in_l2 == pytest.approx(parts / 1e9 - parts / 10e9)


def test_a_second_product_takes_columns_and_bytes():
    alone, beside = Product(64, 64, 1000), Product(64, 64, 1000, 16, 4, 3)
    chip = replace(CHIP, bandwidth=1e15, clock=1e15)
    ratio = (seconds(chip, beside, TILE) - LAUNCH) / (seconds(chip, alone, TILE) - LAUNCH)
    assert ratio == pytest.approx((64 + 3 * 16) / 64)
    assert beside.bytes_read() - alone.bytes_read() == 4 * 16 * 1000


def test_stops_bind_and_programs_of_a_core_stop_beside_each_other():
    """19 blocks of 16, three stops each; 4 of these programs share a core, or 2 by its memory."""
    tile = Tile(64, 64, 16, 4, 3)
    chip = replace(CHIP, flops=1e20, bandwidth=1e15, shared=1 << 20)
    one = 19 * 3 * cost.STOP / chip.clock
    product = Product(64, 64, 300, 16, 4, 3, stops=3)
    for m, rounds in ((64, 1), (64 * 40, 1), (64 * 41, 2)):
        found = seconds(chip, replace(product, m=m), tile) - LAUNCH
        assert found == pytest.approx(rounds * one), m
    held = (2 * (64 + 64) + 4 * 16) * 16 * 3
    tight = replace(chip, shared=2 * held)
    assert seconds(tight, replace(product, m=64 * 40), tile) - LAUNCH == pytest.approx(2 * one)
    # what is loaded as it is multiplied doesn't stop, nor do other tensor cores
    for other, has in ((chip, replace(product, stops=0)), (replace(chip, shared=0), product)):
        assert seconds(other, has, tile) - LAUNCH < one / 2


def test_nothing_takes_a_launch():
    for sizes in ((0, 64, 0), (64, 0, 0), (0, 0, 0)):
        assert seconds(CHIP, Product(*sizes), TILE) == LAUNCH


@pytest.mark.parametrize(
    ("name", "n", "tile", "at_least"),
    [
        # 16 programs, and 4, for an H100's 132 cores; 32 for an MI300X's 304
        ("sm_90", 4096, Tile(128, 256, 64, 8, 3), 3.4),
        ("sm_90", 1024, Tile(128, 256, 64, 8, 3), 9.5),
        ("gfx942", 4096, Tile(128, 128, 64, 8, 2), 4.5),
    ],
)
def test_a_big_tile_leaves_cores_idle(name, n, tile, at_least):
    """What 128 rows took with one tile for all shapes of more than 64 rows."""
    chip, product = cost.CHIPS[name], Product(128, n, 4096)
    assert seconds(chip, product, tile) / (LAUNCH + product.roofline(chip)) > at_least
