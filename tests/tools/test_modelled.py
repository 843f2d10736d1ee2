"""The modelled table: every chip's default plan over its roofline."""

from unittest.mock import patch

import pytest

from peft_kernels.tools.report import modelled
from peft_kernels.triton.common import chips, cost
from peft_kernels.triton.lora_linear import tilings

LIMIT = 1.5
# (chip, n, k): by m, what the model can't get to the limit. Two launches against one are too many
# for a product of a few microseconds, small tiles want more from L2 than the cores' ports give, and
# a float32 A stops a program of sm_90 or sm_100 once a block of k.
OVER = {
    ("sm_80", 1024, 4096): {16: 1.54, 64: 1.82, 128: 1.86},
    ("sm_86", 1024, 4096): {64: 1.59},
    ("sm_90", 1024, 4096): {16: 1.54, 64: 1.77, 128: 1.76, 512: 1.75},
    ("sm_100", 4096, 4096): {64: 1.65, 128: 1.68, 512: 1.55},
    ("sm_100", 1024, 4096): {1: 1.88, 16: 2.26, 64: 2.25, 128: 2.24, 512: 2.12, 2048: 1.66},
    ("gfx90a", 1024, 4096): {64: 1.66, 128: 1.65},
    ("gfx942", 4096, 4096): {128: 1.6},
    ("gfx942", 1024, 4096): {1: 1.65, 16: 1.97, 64: 1.92, 128: 2.28, 512: 1.98, 2048: 1.53},
    ("sm_89", 1024, 4096): {128: 1.59},
    ("sm_120", 1024, 4096): {1: 1.53, 16: 1.51, 128: 1.61},
    ("gfx950", 4096, 4096): {64: 1.57, 128: 1.74, 512: 1.65},
    ("gfx950", 1024, 4096): {1: 1.78, 16: 2.11, 64: 2.07, 128: 2.41, 512: 2.29, 2048: 1.76},
}


@pytest.fixture(scope="module")
def rows():
    """With whole sums alone; test_modelled_parts.py has those that may be made in parts."""
    with patch.object(tilings, "SPLITS", (1,)):
        tilings.tiling.cache_clear()
        yield modelled.rows()
    tilings.tiling.cache_clear()


def test_every_cell_is_within_the_limit_or_named(rows):
    found: dict[tuple, dict[int, float]] = {}
    for row in rows:
        if row.ratio() > LIMIT:
            found.setdefault((row.chip, row.n, row.k), {})[row.m] = pytest.approx(
                row.ratio(), abs=0.006
            )
    assert found == OVER


def test_nothing_is_below_its_roofline(rows):
    assert {row.chip for row in rows} == set(chips.ARCHS)
    assert len(rows) == len(chips.ARCHS) * len(modelled.LAYERS) * len(modelled.ROWS)
    assert all(row.ratio() >= 1 for row in rows)


def test_a_roofline_by_hand(rows):
    """16 rows of an H100's 4096 x 4096: x, W, A and y once, and a launch."""
    (row,) = (r for r in rows if (r.chip, r.m, r.n, r.k) == ("sm_90", 16, 4096, 4096))
    moved = 2 * (16 * 4096 + 4096 * 4096 + 16 * 4096) + 4 * 16 * 4096
    assert row.roofline == pytest.approx(1e6 * (cost.LAUNCH + moved / 3.35e12))
    assert row.plan == "ii" and row.tile.startswith("64x")


def test_the_library_has_no_tile(rows):
    assert all((row.tile == "") == (row.plan == "library") for row in rows)
