"""Which kernels of ``lora_linear`` serve a shape: forced, measured or computed.

A *plan* is one way to compute the op:

``"i"``        S first, then y in one tile; backward: dS and dB, then dx in one tile, and dA
``"ii"``       S and y in one loop over k; forward only, and only up to `IN_LOOP_MAX_RANK`
``"library"``  the library's GEMM, then the low-rank part added in place

Where x is bfloat16 and A float32, the forward of each may write A as three terms of bfloat16 first,
in a launch of its own, for all programs that multiply by it: ``"i_terms"``, ``"ii_terms"`` (up to
`IN_LOOP_MAX_TERMS_RANK`), ``"library_terms"``.

``"persistent"``  as "i", the tiles by programs that stay on their cores and read by descriptors
                  (`persistent.py`); for chips that have those, and only where it was measured

Over a weight in codes there are two others:

``"fused"``    as "i", the weight widened in the tile
``"scratch"``  the weight dequantised for the call, then one of the above

`choose` takes the plan that was measured on this kind of device for the shape's bucket or a near
one (`plan_cache.py`), measures it at the first call (`tuning.py`), and without a measurement takes
the one that `default_plan` computes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from peft_kernels.triton.common import chips, cost
from peft_kernels.triton.common.sizes import next_power_of_2
from peft_kernels.triton.lora_linear import modelled, persistent, plan_cache, tilings, tuning

PLANS = ("i", "ii", "library")
IN_TERMS = modelled.IN_TERMS
TERM_PLANS = tuple(plan + IN_TERMS for plan in PLANS)
PERSISTENT = "persistent"
CODES_PLANS = ("fused", "scratch")
DENSE_PLANS = (*PLANS, *TERM_PLANS, PERSISTENT)
ALL_PLANS = DENSE_PLANS + CODES_PLANS
IN_LOOP_MAX_RANK, IN_LOOP_MAX_TERMS_RANK = 64, 16
# Up to so many rows the weight is widened in the tile, where nothing was measured. Borders of other
# kernels: bitsandbytes 0.50 dispatches by 32 to 128 on an A100 for large weights, by at most 32 on
# a B200, and in float32 by fewer than 8 (backends/cuda/ops.py).
FUSED_ROWS, FUSED_ROWS_FLOAT32 = 64, 7
FUSED_ROWS_OF = {"sm_100": 32, chips.NO_TENSOR_CORES: FUSED_ROWS_FLOAT32}


@dataclass(frozen=True)
class Problem:
    """What a plan is chosen for; ``direction`` is "fwd" or "bwd"."""

    direction: str
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    m: int
    n: int
    k: int
    r: int
    dropout: bool
    codes: str = ""  # what the weight is in, "" where it is dense
    gain: bool = False  # y is multiplied by one: `dora_linear`'s forward

    def terms(self) -> int:
        return chips.terms(self.dtype, self.adapter_dtype)

    def bucket(self) -> str:
        """The tune cache's key: every size rounded up to a power of two."""
        sizes = " ".join(
            f"{name}{next_power_of_2(max(size, 1))}"
            for name, size in (("m", self.m), ("n", self.n), ("k", self.k), ("r", self.r))
        )
        dtypes = f"{_short(self.dtype)}/{_short(self.adapter_dtype)}"
        options = "dropout" * self.dropout, self.codes, "gain" * self.gain
        return " ".join((self.direction, dtypes, sizes, *filter(None, options)))

    def wide(self) -> bool:
        """Whether A is made of several numbers of x's dtype, as they are."""
        return self.dtype is torch.bfloat16 and self.adapter_dtype is torch.float32

    def plans(self) -> tuple[str, ...]:
        """Those that it has to choose from."""
        return CODES_PLANS if self.codes else DENSE_PLANS

    def able(self, name: str) -> tuple[str, ...]:
        """Those of them that can serve it on a chip.

        Over a dense weight the library's alone where we had no tensor cores, in any dtype: ours
        would make each product a fused multiply-add, and are too big for the registers then.
        """
        if name == chips.NO_TENSOR_CORES and not self.codes:
            return ("library",)
        return tuple(plan for plan in self.plans() if _can(name, self, plan))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def default_plan(name: str, problem: Problem, chip: cost.Chip | None = None) -> str:
    """The plan without a measurement: the one that `modelled` calls fastest.

    On ``chip``, or else on the architecture's of `cost.CHIPS`. "library" where our GEMM isn't
    competitive. Under dropout "ii" would draw the mask anew in each column of tiles (some 20
    integer instructions an element), so there must be one column.
    """
    if problem.codes:
        rows = FUSED_ROWS_OF.get(name, FUSED_ROWS)
        if problem.dtype is torch.float32:
            rows = FUSED_ROWS_FLOAT32
        return "fused" if problem.m <= rows else "scratch"
    if not chips.gemm_is_competitive(name, problem.dtype, problem.n, problem.k):
        return "library"
    able = [plan for plan in problem.able(name) if _is_modelled(name, problem, plan, chip)]
    return min(able, key=lambda plan: modelled.seconds(name, problem, plan, chip))


def _is_modelled(name: str, problem: Problem, plan: str, chip: cost.Chip | None) -> bool:
    if not problem.dropout or not plan.startswith("ii"):
        return plan != PERSISTENT
    product = modelled.in_loop(name, problem, plan in TERM_PLANS)
    return problem.n <= tilings.tiling(name, "in_loop", problem.dtype, product, chip).tile.n


def _can(name: str, problem: Problem, plan: str) -> bool:
    if plan == PERSISTENT:
        return persistent.is_for(name, problem.dtype)
    forward, in_terms = problem.direction == "fwd", plan in TERM_PLANS
    if in_terms and not (forward and problem.wide()):
        return False
    if plan.removesuffix(IN_TERMS) != "ii":
        return True
    # Without columns of y no program of "ii" would store S.
    most = IN_LOOP_MAX_TERMS_RANK if in_terms else IN_LOOP_MAX_RANK
    return forward and problem.r <= most and problem.n > 0


_forced: str | None = None


@contextmanager
def force(plan: str) -> Iterator[None]:
    """Uses ``plan`` wherever it can serve inside a ``with`` block: for `tune` and the tests."""
    global _forced
    if plan not in ALL_PLANS:
        raise ValueError(f"plan must be one of {', '.join(ALL_PLANS)}; got {plan!r}")
    previous, _forced = _forced, plan
    try:
        yield
    finally:
        _forced = previous


# What was decided in this process and until when, which is mostly its end: a call that is made
# again, as checkpointing does, has the same bits.
_decided: dict[tuple[torch.device, Problem], tuple[str, float]] = {}
_MOST_DECIDED = 4096


def choose(device: torch.device, problem: Problem, run: tuning.Run | None = None) -> str:
    """The plan that serves ``problem`` on ``device``.

    Args:
        run: computes this call by the plan of a name; given, an unseen bucket may be measured.

    Raises:
        ValueError: ``PEFT_KERNELS_TUNE`` is none of its values.
    """
    if _forced is not None and _forced in problem.plans():
        nearest = (_forced, _forced.removesuffix(IN_TERMS), "i", "library")
        able = problem.able(chips.arch_name(device))
        return next(plan for plan in nearest if plan in able)
    plan, until = _decided.get((device, problem), ("", 0.0))
    return plan if time.monotonic() < until else _decide(device, problem, run)


def _decide(device: torch.device, problem: Problem, run: tuning.Run | None) -> str:
    # Nothing is to be measured of a call without numbers.
    run = run if problem.m and problem.n and problem.k else None
    name = chips.arch_name(device)
    found = tuning.find(device, problem.bucket(), problem.able(name), run)
    plan = found.plan or default_plan(name, problem, cost.of_device(name, device))
    if run is not None:
        if len(_decided) >= _MOST_DECIDED:
            _decided.clear()
        _decided[device, problem] = plan, time.monotonic() + found.seconds
    return plan


def forget_cache() -> None:
    """Makes the next `choose` read the tune cache again."""
    plan_cache.forget()
    _decided.clear()
