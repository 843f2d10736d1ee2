"""Plans: the arithmetic default, and the measurement with an injected timer."""

import errno
import io
import json
import os
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from rich.console import Console
from triton.runtime.errors import OutOfResources
from tune_caches import own_cache

from peft_kernels.tools import UserError
from peft_kernels.tools import tune as tuning
from peft_kernels.triton.common import chips, cost, launch
from peft_kernels.triton.lora_linear import modelled, plan_cache, plans, tilings

CPU = torch.device("cpu")
BF16, F32 = torch.bfloat16, torch.float32


def problem(direction="fwd", m=8192, n=4096, k=4096, r=16, dtype=BF16, adapter=BF16, dropout=False):
    return plans.Problem(direction, dtype, adapter, m, n, k, r, dropout)


@pytest.fixture(autouse=True)
def cache(tmp_path):
    """The file of an empty tune cache of the test's own."""
    yield from own_cache(tmp_path / "cache")


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(tuning, "ROUNDS", 2)


# ---- the default -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "plan"),
    [
        (problem(), "library"),  # products bind: the library's are expected to be faster
        (problem("bwd"), "library"),
        (problem(n=14336, k=512), "i"),  # what the library would add in place costs more than that
        (problem(n=128), "ii"),  # S in the loop costs one column of tiles more products
        (problem(n=128, dropout=True), "ii"),
        (problem(m=128), "ii"),  # the weight's bytes bind
        # the mask would be drawn 64 times; the tile's launch overlaps with S's
        (problem(m=128, dropout=True), "i"),
        (problem("bwd", m=128), "i"),
        (problem(m=8, n=14336), "ii"),
        (problem(m=8, r=65), "i"),  # more ranks than the loop holds
        (problem(dtype=F32, adapter=F32), "library"),
        (problem("bwd", dtype=F32, adapter=F32), "library"),
        (problem(k=4104), "library"),  # rows that can't be loaded 16 bytes at a time
        (problem("bwd", n=4104), "library"),
    ],
)
def test_default_plan(case, plan):
    assert plans.default_plan("sm_90", case) == plan


def forget_models():
    modelled.in_loop.cache_clear()
    modelled.parts_of_s.cache_clear()
    tilings.tiling.cache_clear()


def test_the_model_writes_a_in_terms_where_its_stops_bind():
    """16 rows of a Hopper's: three in each of 64 blocks of k, but for the joined operand.

    Sums in parts, whose programs stop beside each other, hide them.
    """
    case = problem(m=16, adapter=F32)
    assert plans.default_plan("sm_90", case) == "ii"
    with patch.dict(chips.JOINED, in_loop=0, shrink=0):
        forget_models()
        assert plans.default_plan("sm_90", case) == "ii"
    with patch.dict(chips.JOINED, in_loop=0, shrink=0), patch.object(tilings, "SPLITS", (1,)):
        forget_models()
        assert plans.default_plan("sm_90", case) == "ii_terms"
        assert plans.default_plan("sm_90", replace(case, adapter_dtype=BF16)) == "ii"
        assert plans.default_plan("sm_80", case) == "ii"
    forget_models()


def test_the_model_of_a_in_terms_without_stops():
    """A launch that reads A and writes 6 bytes of each of its numbers."""
    case, chip = problem(adapter=F32), cost.CHIPS["sm_80"]
    without, in_terms = (modelled.seconds("sm_80", case, plan) for plan in ("i", "i_terms"))
    written = cost.LAUNCH + (4 + 6) * 16 * 4096 / chip.bandwidth
    assert in_terms - without == pytest.approx(written)


def test_default_plan_depends_on_the_chip():
    case = problem(m=128)  # 124 FLOP a byte, of 156 and 295 that bind
    assert plans.default_plan("sm_90", case) == "ii"
    assert plans.default_plan("sm_80", case) == "library"
    assert plans.default_plan("other", case) == "library"


def test_a_plan_that_cannot_serve_is_replaced():
    with plans.force("ii"):
        assert plans.choose(CPU, problem()) == "ii"
        assert plans.choose(CPU, problem("bwd")) == "i"
        assert plans.choose(CPU, problem(r=plans.IN_LOOP_MAX_RANK + 1)) == "i"
        assert plans.choose(CPU, problem(n=0)) == "i"


def test_force_takes_known_plans_only():
    expected = pytest.raises(ValueError, match=r"plan must be one of i, ii, .*; got 'iii'")
    with expected, plans.force("iii"):
        pass


# ---- measuring -------------------------------------------------------------------------------


class FakeTimer:
    """Gives every plan the time it is told, after running the call once.

    A plan in terms has that of the plan without, unless it is told.
    """

    def __init__(self, **milliseconds):
        self.milliseconds = milliseconds
        self.calls = []

    def __call__(self, call):
        plan = call.args[-1]
        self.calls.append(plan)
        call()
        told = plan if plan in self.milliseconds else plan.removesuffix(plans.IN_TERMS)
        if self.milliseconds[told] is None:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return self.milliseconds[told]


def run_tune(timer, shapes=((5, 12, 9, 3),), weights=("",), **options):
    console = Console(file=io.StringIO(), width=200)
    options = {"timer": timer, "console": console, "weights": weights, **options}
    found = tuning.tune(shapes, ((BF16, F32),), **options)
    return found, console.file.getvalue()


def test_tune_measures_every_plan_and_keeps_the_fastest(cache):
    forward = {"i": 3.0, "ii": 1.0, "library": 2.0}
    forward |= {"i_terms": 2.5, "ii_terms": 0.5, "library_terms": 1.5}
    timer = FakeTimer(**forward)
    found, printed = run_tune(timer)
    by_direction = {m.problem.direction: m for m in found}
    assert by_direction["fwd"].milliseconds == forward
    assert by_direction["fwd"].best == "ii_terms"
    assert by_direction["bwd"].milliseconds == {"i": 3.0, "library": 2.0}
    assert by_direction["bwd"].best == "library"
    # the plans take turns
    rounds = tuning.ROUNDS
    assert timer.calls == [*forward] * rounds + ["i", "library"] * rounds
    assert "3.0000" in printed and str(cache) in printed


def test_tuned_plan_is_chosen_for_its_bucket_and_near_ones():
    case = problem(m=5, n=12, k=9, r=3, adapter=F32)
    before = plans.choose(CPU, case)
    assert before == "library"
    run_tune(FakeTimer(i=1.0, ii=2.0, library=3.0))
    assert plans.choose(CPU, case) == "i"
    same_bucket = problem(m=8, n=16, k=16, r=4, adapter=F32)
    assert plans.choose(CPU, same_bucket) == "i"
    assert plans.choose(CPU, problem(m=9, n=33, k=9, r=3, adapter=F32)) == "i"
    for other in (
        problem(m=17, n=12, k=9, r=3, adapter=F32),
        problem(m=5, n=12, k=9, r=3, adapter=BF16),
        problem(m=5, n=12, k=9, r=3, adapter=F32, dropout=True),
    ):
        assert plans.choose(CPU, other) == "library"


def test_weights_in_codes_have_plans_of_their_own(cache):
    """Measured up to a number of rows, and chosen for a weight of that kind alone."""
    timer = FakeTimer(fused=3.0, scratch=1.0)
    shapes = (5, 12, 128, 3), (tuning.ROWS_OVER_CODES + 1, 12, 128, 3)
    found, printed = run_tune(timer, shapes, weights=("nf4", "int8"))
    assert [m.milliseconds for m in found] == [{"fused": 3.0, "scratch": 1.0}] * 4
    assert timer.calls == ["fused", "scratch"] * tuning.ROUNDS * 4 and "scratch" in printed
    buckets = json.loads(cache.read_text())[plan_cache.device_key(CPU)]
    assert buckets == dict.fromkeys(
        (
            "fwd bfloat16/float32 m8 n16 k128 r4 4-bit/64/nested",
            "bwd bfloat16/float32 m8 n16 k128 r4 4-bit/64/nested",
            "fwd bfloat16/float32 m8 n16 k128 r4 int8/row",
            "bwd bfloat16/float32 m8 n16 k128 r4 int8/row",
        ),
        "scratch",
    )
    case = problem(m=5, n=12, k=128, r=3, adapter=F32)
    assert plans.choose(CPU, case) == "library"
    assert plans.choose(CPU, replace(case, codes="int8/row")) == "scratch"
    assert plans.choose(CPU, replace(case, codes="q4_K")) == "fused"


def test_doras_forward_is_measured_where_asked(cache):
    """Over a dense weight, in a bucket of its own, by launches that multiply by a gain."""
    launched = []

    def timer(call):
        launched.clear()
        call()
        gained = any(options.get("HAS_GAIN") for options in launched)
        return {"library": 3.0, "i": 2.0 - gained, "ii": 1.0 + gained}.get(call.args[-1], 9.0)

    def note(kernel, grid, args, options):
        launched.append(options)

    with patch.object(launch, "run", note):
        without, _ = run_tune(timer, ((5, 12, 128, 3),))
        buckets = json.loads(cache.read_text())[plan_cache.device_key(CPU)]
        assert not any("gain" in bucket for bucket in buckets) and len(without) == 2
        found, _ = run_tune(timer, ((5, 12, 128, 3),), weights=("", "int8"), dora=True)
    assert [m.problem.gain for m in found] == [False, False, True, False, False]
    buckets = json.loads(cache.read_text())[plan_cache.device_key(CPU)]
    assert buckets["fwd bfloat16/float32 m8 n16 k128 r4"] == "ii"
    assert buckets["fwd bfloat16/float32 m8 n16 k128 r4 gain"] == "i"
    case = problem(m=5, n=12, k=128, r=3, adapter=F32)
    assert plans.choose(CPU, case) == "ii"
    assert plans.choose(CPU, replace(case, gain=True)) == "i"


def test_the_default_over_codes_goes_by_rows():
    for chip, dtype, rows in (
        ("sm_90", BF16, 64),
        ("sm_100", BF16, 32),
        ("other", BF16, 64),
        ("sm_100", F32, 7),
    ):
        for m, plan in ((rows, "fused"), (rows + 1, "scratch")):
            case = problem(m=m, dtype=dtype)
            assert plans.default_plan(chip, replace(case, codes="4-bit/64")) == plan


def test_a_plan_that_does_not_fit_the_gpu_is_left_out():
    found, printed = run_tune(FakeTimer(i=None, ii=None, library=1.0))
    assert [set(m.milliseconds) for m in found] == [{"library", "library_terms"}, {"library"}]
    assert [set(m.left_out) for m in found] == [{"i", "ii", "i_terms", "ii_terms"}, {"i"}]
    assert "ii left out at fwd bfloat16/float32 m8" in printed and "OutOfResources: out" in printed


def test_where_no_plan_runs_it_says_why(cache):
    with pytest.raises(UserError, match=r"no plan runs at fwd .*library.*OutOfResources"):
        run_tune(FakeTimer(i=None, ii=None, library=None))
    assert not cache.exists()


def test_what_was_measured_before_an_interruption_stays(cache):
    timer = FakeTimer(i=3.0, ii=1.0, library=2.0)
    shapes = (5, 12, 9, 3), (70, 12, 9, 3)

    def interrupted(call):
        if len(timer.calls) > 8 * tuning.ROUNDS:
            raise KeyboardInterrupt
        return timer(call)

    with pytest.raises(KeyboardInterrupt):
        run_tune(interrupted, shapes)
    assert set(json.loads(cache.read_text())[plan_cache.device_key(CPU)]) == {
        "fwd bfloat16/float32 m8 n16 k16 r4",
        "bwd bfloat16/float32 m8 n16 k16 r4",
    }


def test_a_cache_that_cant_be_written_any_more_is_a_mistake_of_the_users(monkeypatch):
    def full(measured):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(plan_cache, "save", full)
    with pytest.raises(UserError, match=r"CACHE.*json can't be written: No space left"):
        run_tune(FakeTimer(i=1.0, ii=2.0, library=3.0))


def test_tuning_again_adds_to_the_cache(cache):
    run_tune(FakeTimer(i=1.0, ii=2.0, library=3.0))
    run_tune(FakeTimer(i=3.0, ii=2.0, library=1.0), shapes=((70, 12, 9, 3),))
    buckets = json.loads(cache.read_text())[plan_cache.device_key(CPU)]
    assert buckets == {
        "fwd bfloat16/float32 m8 n16 k16 r4": "i",
        "bwd bfloat16/float32 m8 n16 k16 r4": "i",
        "fwd bfloat16/float32 m128 n16 k16 r4": "library",
        "bwd bfloat16/float32 m128 n16 k16 r4": "library",
    }
    # no draft is left
    assert {path.name for path in cache.parent.iterdir()} == {"plans.json", "plans.json.lock"}


def test_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(RuntimeError, match=r"there is none: torch .* (built without|finds no)"):
        tuning.tune()
