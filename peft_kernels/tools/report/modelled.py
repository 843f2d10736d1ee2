"""The modelled time of `lora_linear`'s forward over its roofline, for every chip and many shapes.

It is arithmetic on datasheets (``peft_kernels/triton/common/cost.py``): nothing of it was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.table import Table

from peft_kernels.triton.common import chips, cost
from peft_kernels.triton.lora_linear import modelled, plans, tilings

ROWS = (1, 16, 64, 128, 512, 2048, 16384)
LAYERS = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))  # (n, k) of Llama-3-8B
RANK = 16


LIMIT = 1.5  # times the roofline: above it a cell says what is in the way


@dataclass(frozen=True)
class ModelledRow:
    """The default plan of one shape on one chip; ``tile`` is "" where the library has the GEMM.

    And the parts of its sum over k, as "64x32x64 in 4". ``above``: what takes a plan above `LIMIT`
    times the roofline: "launches", where without those beyond the first it is within it, or else
    what its tiles wait for too, as "launches, L2".
    """

    chip: str
    m: int
    n: int
    k: int
    plan: str
    tile: str
    launches: int
    above: str
    microseconds: float
    roofline: float  # microseconds too, one launch included

    def ratio(self) -> float:
        return self.microseconds / self.roofline


def rows() -> list[ModelledRow]:
    """Of bfloat16 layers with float32 adapters, without dropout."""
    return [
        _row(name, m, n, k) for name in chips.ARCHS for n, k in LAYERS for m in ROWS
    ]  # fmt: skip


def _row(name: str, m: int, n: int, k: int) -> ModelledRow:
    problem = plans.Problem("fwd", torch.bfloat16, torch.float32, m, n, k, RANK, dropout=False)
    plan = plans.default_plan(name, problem)
    time, roofline = modelled.seconds(name, problem, plan), modelled.roofline(name, problem)
    launches, found = modelled.launches(name, problem, plan), _tiling(name, problem, plan)
    above = "launches" if time > LIMIT * roofline else ""
    if time - launches.beyond_the_first(cost.CHIPS[name]) > LIMIT * roofline:
        above = ", ".join(filter(None, (above, _longest_wait(name, found))))
    return ModelledRow(
        chip=name, m=m, n=n, k=k, plan=plan, tile=_tile(found),
        launches=launches.total, above=above,
        microseconds=1e6 * time, roofline=1e6 * roofline,
    )  # fmt: skip


Found = tuple[cost.Product, tilings.Tiling]


def _tiling(name: str, problem: plans.Problem, plan: str) -> Found | None:
    """The plan's product with the base, if the library doesn't have it, and how it is made."""
    if plan.startswith("library"):
        return None
    kernel, product = "tile", modelled.base(problem)
    if plan.startswith("ii"):
        in_terms = plan in plans.TERM_PLANS
        kernel, product = "in_loop", modelled.in_loop(name, problem, in_terms)
    return product, tilings.tiling(name, kernel, problem.dtype, product)


def _tile(found: Found | None) -> str:
    if found is None:
        return ""
    tile, splits = found[1].tile, found[1].splits
    return f"{tile.m}x{tile.n}x{tile.k}" + (f" in {splits}" if splits > 1 else "")


def _longest_wait(name: str, found: Found | None) -> str:
    if found is None:
        return ""
    product, tiling = found
    waits = cost.waits(cost.CHIPS[name], product, tiling.tile, tiling.splits)
    return max(waits, key=waits.__getitem__)


def view(rows: list[ModelledRow]) -> Table:
    """A line for each chip and layer, a column for each number of rows."""
    table = Table(
        title="lora_linear, forward: modelled time over roofline, bfloat16 with float32 adapters of"
        f" rank {RANK}, and the plan",
        caption="modelled from datasheets, measured on no chip. The roofline has one launch of"
        f" {1e6 * cost.LAUNCH:g} microseconds. L: the plan is the library's, whose GEMM is counted"
        f" at its roofline. Above {LIMIT:g}, what is in the way: the launches beyond the first (+2:"
        " two of them), and what its tiles wait for. Where launches overlap, another takes"
        f" {1e6 * (cost.LAUNCH - cost.OVERLAP):g}",
    )
    for name in ("chip", "n x k"):
        table.add_column(name, no_wrap=True)
    for m in ROWS:
        table.add_column(f"m={m}", justify="right", no_wrap=True)
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        plan = "L" if row.plan == "library" else row.plan
        cell = f"{row.ratio():.2f} {plan}"
        if row.above:
            cell += row.above.replace("launches", f" +{row.launches - 1}")
        lines.setdefault((row.chip, f"{row.n} x {row.k}"), []).append(cell)
    for names, cells in lines.items():
        table.add_row(*names, *cells)
    return table
