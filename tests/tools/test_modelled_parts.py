"""The modelled table as `report` prints it, whose sums over k may be made in parts."""

import pytest
import torch

from peft_kernels.tools.report import modelled
from peft_kernels.triton.common import chips, cost, launch
from peft_kernels.triton.lora_linear import modelled as on_paper
from peft_kernels.triton.lora_linear import plans
from peft_kernels.triton.lora_linear.launch import lora_linear_fwd

BF16 = torch.bfloat16

LIMIT = 1.5
# (chip, n, k): by m, what stays above the limit. Two launches or three against one are too many for
# a product of a few microseconds; in two cells tiles want more from L2 as well than the ports give.
OVER = {
    ("sm_80", 1024, 4096): {64: 1.55, 128: 1.86},
    ("sm_86", 1024, 4096): {64: 1.59},
    ("sm_90", 1024, 4096): {512: 1.75},
    ("sm_100", 4096, 4096): {64: 1.64, 128: 1.68, 512: 1.55},
    ("sm_100", 1024, 4096): {64: 1.59, 128: 2.12, 512: 2.12, 2048: 1.66},
    ("gfx90a", 1024, 4096): {128: 1.65},
    ("gfx942", 1024, 4096): {1: 1.55, 16: 1.56, 64: 1.69, 128: 1.75, 512: 1.98, 2048: 1.53},
    ("sm_89", 1024, 4096): {128: 1.57},
    ("sm_120", 1024, 4096): {128: 1.61},
    ("gfx950", 4096, 4096): {128: 1.51, 512: 1.65},
    ("gfx950", 1024, 4096): {1: 1.65, 16: 1.66, 64: 1.74, 128: 1.82, 512: 2.25, 2048: 1.76},
}


def test_every_cell_is_within_the_limit_or_named():
    found: dict[tuple, dict[int, float]] = {}
    for row in modelled.rows():
        if row.ratio() > LIMIT:
            cells = found.setdefault((row.chip, row.n, row.k), {})
            cells[row.m] = pytest.approx(row.ratio(), abs=0.006)
    assert found == OVER


def test_what_is_above_the_limit_is_launches():
    """Of all but two cells; those wait for L2 too."""
    rows = modelled.rows()
    above = {row.above for row in rows if row.ratio() > LIMIT}
    assert above == {"launches", "launches, L2"}
    assert all(not row.above for row in rows if row.ratio() <= LIMIT)
    of_l2 = {(row.chip, row.m, row.n) for row in rows if row.above.endswith("L2")}
    assert of_l2 == {("sm_100", 128, 1024), ("gfx950", 512, 1024)}


@pytest.mark.parametrize(
    ("name", "m", "plan"),
    [
        ("sm_90", 512, "library"),  # S in parts
        ("sm_86", 64, "library"),  # S summed
        ("sm_90", 1, "ii"),  # y in parts
        ("sm_80", 1, "ii"),
        ("sm_90", 64, "i"),
        ("sm_120", 64, "i"),
        ("sm_100", 2, "i"),  # y in parts
        ("sm_90", 16384, "i"),  # S whole
        ("sm_90", 16384, "library_terms"),
        ("sm_90", 64, "i_terms"),
    ],
)
def test_the_launches_are_those_of_the_launchers(monkeypatch, name, m, plan):
    """Of the library's GEMM nothing is recorded."""
    recorded = []

    def record(kernel, grid, args, options):
        recorded.append((kernel.__name__, options.get("launch_pdl", False)))

    monkeypatch.setattr(launch, "run", record)
    monkeypatch.setattr(chips, "arch_name", lambda device: name)
    x, weight = (torch.empty(rows, 4096, dtype=BF16, device="meta") for rows in (m, 1024))
    a, b = (torch.empty(*shape, device="meta") for shape in ((16, 4096), (1024, 16)))
    with plans.force(plan):
        y, s = lora_linear_fwd(x, weight, None, a, b, 1.0, None, 0.0, None)
    assert y.shape == (m, 1024) and s.shape == (m, 16)
    problem = plans.Problem("fwd", BF16, torch.float32, m, 1024, 4096, 16, dropout=False)
    expected = on_paper.launches(name, problem, plan)
    assert len(recorded) + plan.startswith("library") == expected.total, recorded
    overlapping = expected.overlapping if cost.CHIPS[name].dependent else 0
    assert sum(second for _, second in recorded) == overlapping, recorded


def test_the_chips_whose_launches_overlap():
    assert {name for name, chip in cost.CHIPS.items() if chip.dependent} == set(chips.DEPENDENT)


def test_parts_serve_narrow_layers_of_few_rows():
    """1024 columns of one row: 32 programs of an H100's 132 cores, times 4."""
    rows = {(r.chip, r.m, r.n, r.k): r for r in modelled.rows()}
    assert rows["sm_90", 1, 1024, 4096].tile == "64x32x64 in 4"
    assert " in " not in rows["sm_80", 1, 4096, 4096].tile
