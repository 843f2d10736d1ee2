"""The modelled table as `report` prints it, whose sums over k may be made in parts."""

import pytest

from peft_kernels.tools.report import modelled

LIMIT = 1.5
# (chip, n, k): by m, what stays above the limit. Two launches against one are too many for a
# product of a few microseconds, and small tiles want more from L2 than the cores' ports give.
OVER = {
    ("sm_80", 1024, 4096): {64: 1.66, 128: 1.97, 512: 1.55},
    ("sm_90", 1024, 4096): {64: 1.55, 128: 1.70, 512: 2.22, 2048: 1.67},
    ("sm_100", 4096, 4096): {64: 1.84, 128: 2.0, 512: 1.78},
    ("sm_100", 1024, 4096): {1: 1.66, 16: 1.73, 64: 1.94, 128: 2.46, 512: 2.72, 2048: 1.93},
    ("sm_86", 1024, 4096): {64: 1.6},
    ("sm_89", 1024, 4096): {128: 1.62},
    ("sm_120", 1024, 4096): {64: 1.59, 128: 1.89},
    ("gfx90a", 1024, 4096): {64: 1.61, 128: 1.84},
    ("gfx942", 4096, 4096): {128: 1.54, 512: 1.55},
    ("gfx942", 1024, 4096): {1: 1.55, 16: 1.57, 64: 1.73, 128: 1.92, 512: 2.34, 2048: 1.69},
    ("gfx950", 4096, 4096): {128: 1.59, 512: 1.85},
    ("gfx950", 1024, 4096): {
        1: 1.65,
        16: 1.67,
        64: 1.8,
        128: 1.94,
        512: 2.45,
        2048: 2.01,
        16384: 1.53,
    },
}


def test_every_cell_is_within_the_limit_or_named():
    found: dict[tuple, dict[int, float]] = {}
    for row in modelled.rows():
        if row.ratio() > LIMIT:
            cells = found.setdefault((row.chip, row.n, row.k), {})
            cells[row.m] = pytest.approx(row.ratio(), abs=0.006)
    assert found == OVER


def test_parts_serve_narrow_layers_of_few_rows():
    """1024 columns of one row: 32 programs of an H100's 132 cores, times 4."""
    rows = {(r.chip, r.m, r.n, r.k): r for r in modelled.rows()}
    assert rows["sm_90", 1, 1024, 4096].tile == "64x32x64 in 4"
    assert " in " not in rows["sm_80", 1, 4096, 4096].tile
