"""Launches that may begin before the one ahead of them has ended: which, and when they wait."""

import importlib
from functools import cache
from unittest.mock import patch

import dependent_ptx
import pytest
import torch
from overlapping import overlapping

from peft_kernels.triton.common import chips, dependent, launch
from peft_kernels.triton.lora_linear import calls, modelled, plans, tilings
from peft_kernels.triton.lora_linear import launch as launchers
from peft_kernels.triton.multi_lora_linear import launch as multi_launchers
from peft_kernels.triton.multi_lora_linear import layouts as multi_layouts

op = importlib.import_module("peft_kernels.ops.lora_linear")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
GPU, META = torch.device("cuda", 0), torch.device("meta")


# ---- where they are ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*chips.ARCHS, "other", chips.NO_TENSOR_CORES])
def test_chips_that_have_them(name):
    since_hopper = name.startswith("sm_") and int(name.removeprefix("sm_")) >= 90
    assert dependent.launches(name, META) == since_hopper


@pytest.mark.parametrize(("driver", "has"), [(12020, False), (12030, True), (13000, True)])
def test_the_driver_captures_them(driver, has):
    version = patch.object(torch._C, "_cuda_getDriverVersion", lambda: driver, create=True)
    with version:
        assert dependent.launches("sm_90", GPU) == has


def test_neither_without_a_version_nor_on_a_cpu():
    """This torch, for CPUs, has no driver to ask."""
    assert not dependent.launches("sm_90", GPU)
    assert not dependent.launches("sm_90", torch.device("cpu"))


def test_turned_off(monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_PDL", "1")
    assert dependent.launches("sm_90", META)
    monkeypatch.setenv("PEFT_KERNELS_PDL", "0")
    assert not dependent.launches("sm_90", META)


# ---- which launches ----------------------------------------------------------------------------

NONE, FIRST, SECOND = "none", "first", "second"  # a second one lets a third begin as well


def role(options):
    if options.get("launch_pdl"):
        assert options["PDL"]
        return SECOND
    return FIRST if options.get("PDL") else NONE


@pytest.fixture
def launched(monkeypatch):
    """(kernel, role) of what a call launches on a chip, on tensors without data."""

    def record(chip, plan, *, m=64, r=16, splits=1, parts_of_s=None, backward=False):
        found = []

        def note(kernel, grid, args, options):
            assert 0 not in grid
            found.append((kernel.__name__.removesuffix("_kernel"), role(options)))

        def empty(*shape, dtype=BF16):
            return torch.empty(shape, dtype=dtype, device=META)

        def tiling(name, kernel, dtype, product, chip):
            return tilings.Tiling(tilings.candidates(name, kernel, dtype, product.m)[0], splits)

        monkeypatch.setattr(launch, "run", note)
        monkeypatch.setattr(chips, "arch_name", lambda device: chip)
        monkeypatch.setattr(tilings, "tiling", tiling)
        if parts_of_s is not None:
            monkeypatch.setattr(modelled, "parts_of_s", lambda *asked: parts_of_s)
        calls._call.cache_clear()
        x, weight, dy = empty(m, 4096), empty(1024, 4096), empty(m, 1024)
        a, b = empty(r, 4096, dtype=F32), empty(1024, r, dtype=F32)
        with plans.force(plan):
            _, s = launchers.lora_linear_fwd(x, weight, None, a, b, 1.0, None, 0.0, None)
            if backward:
                found.clear()
                rest = 1.0, None, 0.0, None, True, True, True
                launchers.lora_linear_bwd(dy, x, weight, a, b, s, *rest)
        return found

    yield record
    calls._call.cache_clear()


SUMMED = [("shrink", FIRST), ("sum_partials", SECOND)]
ADDED = ("add_low_rank", SECOND)


@pytest.mark.parametrize("chip", chips.DEPENDENT)
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"plan": "i"}, [*SUMMED, ("tile", SECOND)]),
        ({"plan": "i", "m": 1 << 16}, [("shrink", FIRST), ("tile", SECOND)]),
        ({"plan": "i", "splits": 2}, [*SUMMED, ("tile", SECOND), ADDED]),
        ({"plan": "i_terms"}, [("terms", NONE), *SUMMED, ("tile", SECOND)]),
        ({"plan": "ii"}, [("in_loop", NONE)]),
        ({"plan": "ii", "splits": 2}, [("in_loop", FIRST), ADDED]),
        ({"plan": "library", "parts_of_s": 0}, [*SUMMED, ADDED]),
        ({"plan": "library", "parts_of_s": 4}, [("shrink", FIRST), ADDED]),
    ],
)
def test_a_forward_is_a_chain(launched, chip, options, expected):
    assert launched(chip, **options) == expected


def test_without_ranks_there_is_no_first(launched):
    """And what would be the second follows another call's launch."""
    assert launched("sm_90", "i", r=0) == [("tile", NONE)]
    assert launched("sm_90", "library", r=0) == [("add_low_rank", NONE)]


def test_no_other_launches(launched):
    backward = launched("sm_90", "i", backward=True)
    assert ("tile", NONE) in backward and {role for _, role in backward} == {NONE}
    in_parts = launched("sm_90", "i", splits=2, backward=True)
    found = [one for one in in_parts if one[1] != NONE]
    assert found == [("tile", FIRST), ADDED]
    for chip in set(chips.ARCHS) - set(chips.DEPENDENT):
        assert {role for _, role in launched(chip, "i", splits=2)} == {NONE}, chip


def test_programs_that_stay(launched):
    with patch.object(launchers.persistent, "serves", lambda *asked: True):
        found = launched("sm_90", "persistent")
    assert found == [*SUMMED, ("persistent", SECOND)]


# ---- of several adapters -----------------------------------------------------------------------


@pytest.fixture
def multi_launched(monkeypatch):
    """The same of `multi_lora_linear` on a Hopper, forward or backward."""

    def record(plan, *, m=64, dtypes=(BF16,), pages=2, has_base=True, backward=False):
        found = []

        def note(kernel, grid, args, options):
            assert 0 not in grid
            found.append((kernel.__name__.removesuffix("_kernel"), role(options)))

        def empty(*shape, dtype=BF16):
            return torch.empty(shape, dtype=dtype, device=META)

        def by_bank(*shape, dtype):
            return [empty(*shape, dtype=dtype) for _ in dtypes]

        i32 = torch.int32
        a, b = ([empty(64, n, dtype=one) for one in dtypes] for n in (4096, 1024))
        tables, ranks = by_bank(8, pages, dtype=i32), by_bank(8, dtype=i32)
        ids = empty(m, dtype=i32), empty(m, dtype=i32), empty(10, dtype=i32)
        banks = (a, b, tables, ranks, by_bank(8, dtype=F32), *ids)
        x, weight = empty(m, 4096), empty(1024 * len(dtypes), 4096)
        monkeypatch.setattr(launch, "run", note)
        monkeypatch.setattr(chips, "arch_name", lambda device: "sm_90")
        multi_layouts._layout.cache_clear()
        y = empty(m, weight.shape[0])
        if backward:
            s = empty(m, 16, dtype=F32)
            rest = by_bank(8, dtype=i32), [16], True, plan
            multi_launchers.multi_lora_linear_bwd(y, x, weight, *banks, s, [], [], *rest)
        elif has_base:
            multi_launchers.multi_lora_linear_fwd(x, weight, None, *banks, [], [], plan)
        else:
            multi_launchers.multi_lora_linear_add(y, x, *banks, [], [], plan)
        return found

    yield record
    multi_layouts._layout.cache_clear()


MULTI_SUMMED = [("multi_shrink", FIRST), ("sum_partials", SECOND)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"plan": "grouped"}, [*MULTI_SUMMED, ("multi_tile", SECOND)]),
        ({"plan": "grouped", "has_base": False}, [*MULTI_SUMMED, ("multi_delta", SECOND)]),
        ({"plan": "single", "m": 1 << 16}, [("multi_shrink", FIRST), ("multi_delta", SECOND)]),
        ({"plan": "grouped", "dtypes": (BF16, BF16)}, [*MULTI_SUMMED, ("multi_tile", SECOND)]),
        ({"plan": "decode", "m": 16}, [("decode_shrink", FIRST), ("decode_tile", SECOND)]),
    ],
)
def test_of_several_adapters(multi_launched, options, expected):
    assert multi_launched(**options) == expected


def test_of_several_adapters_no_other_launches(multi_launched):
    """Not where shrinks and tiles of more than one group alternate, nor without a page of ranks."""
    for options in (
        {"plan": "grouped", "dtypes": (BF16, F32)},
        {"plan": "grouped", "backward": True},
        {"plan": "grouped", "pages": 0},
        {"plan": "decode", "m": 16, "pages": 0},
    ):
        found = multi_launched(**options)
        assert found and {role for _, role in found} == {NONE}, options


# ---- what they compute, in the interpreter, which runs one after the other ---------------------


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(BF16, F32), (F16, F16), (F32, F32)])
@pytest.mark.parametrize(("plan", "splits"), [("i", 1), ("i", 2), ("library", 1), ("ii", 2)])
def test_against_float64(plan, splits, dtype, adapter_dtype, gain):
    """P Q is added last there."""
    inputs = op.example_inputs(70, 75, 150, 5, dtype=dtype, adapter_dtype=adapter_dtype)
    inputs = [inputs[name] for name in ("x", "weight", "bias", "lora_a", "lora_b")]
    options = 0.7, None, 0.3, torch.tensor(11)
    factor = torch.rand(75) + 0.5 if gain else None
    tiling = patch.object(
        tilings, "tiling", lambda *asked: tilings.Tiling(chips.Tile(32, 64, 32, 4, 2), splits)
    )
    with overlapping() as seconds, tiling, plans.force(plan):
        y, s = launchers.with_gain(*inputs[:3], factor, *inputs[3:], *options)
    assert seconds[-1] == ("tile" if (plan, splits) == ("i", 1) else "add_low_rank")

    def reference(x, weight, bias, a, b):
        out, s = op.lora_linear_fwd_ref(x, weight, None, a, b, *options)
        out = out if factor is None else factor.to(out.dtype) * out
        return out + bias, s

    def error(out, exact):
        return ((out.double() - exact).norm() / exact.norm()).item()

    exact, eager = reference(*[one.double() for one in inputs]), reference(*inputs)
    for out, wide, ours in zip((y, s), exact, eager, strict=True):
        limit = max(1.5 * error(ours, wide), 1e-6)
        assert error(out, wide) <= limit < error(torch.zeros_like(out), wide)


# ---- what is compiled --------------------------------------------------------------------------


FIRSTS = {"shrink", "sum_partials", "tile", "in_loop", "multi_shrink", "decode_shrink"}
FIRSTS |= {"prefix_attention_fwd"}
SECONDS = {"tile", "add_low_rank", "sum_partials", "multi_tile", "multi_delta", "decode_tile"}
SECONDS |= {"codes_tile", "prefix_attention_combine"}
STAYS = {"sm_90", "sm_100"}  # chips with programs that stay


@pytest.fixture(scope="module")
def compiled():
    """The launches of a target, compiled when it is first asked for."""
    return cache(dependent_ptx.found)


@pytest.mark.parametrize(
    "target",
    ["sm_90", *(pytest.param(name, marks=pytest.mark.long) for name in ("sm_100", "sm_120"))],
)
def test_every_second_waits_first(compiled, target):
    """Before it reads what the launch before has made, and before any store."""
    seconds = [ptx for ptx in compiled(target) if ptx.is_second()]
    stays = {"persistent"} if target in STAYS else set()
    assert {ptx.kernel for ptx in seconds} == SECONDS | stays
    assert {ptx.constants["SPLIT"] for ptx in seconds if ptx.kernel == "tile"} == {False, True}
    for ptx in seconds:
        assert len(ptx.waits) == 1, ptx
        assert ptx.stores and not {*ptx.stores} & {*ptx.early}, ptx
        made = {"parts", "lse_parts", "p", "s"}
        if ptx.constants.get("PARTS", 1) > 1:
            made.add("base")
        read = {line for name in made & set(ptx.loads) for line in ptx.loads[name]}
        assert read or ptx.constants.get("SPLIT"), ptx
        assert not read & {*ptx.early}, ptx
        # The compiler doesn't know that each program that stays has a tile. Its warps that copy for
        # others write nothing, and end by themselves.
        if ptx.kernel != "persistent":
            assert ptx.ends and not {*ptx.ends} & {*ptx.early}, ptx


@pytest.mark.parametrize(
    "target",
    [
        "sm_90",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("sm_100", "sm_80", "gfx942")),
    ],
)
def test_no_other_waits_or_lets_go(compiled, target):
    """A first launch lets the next begin before it reads; a third's second does both.

    A tile in parts, of dx, is compiled as y's, whose wait is over at once where it follows nothing.
    """
    for ptx in compiled(target):
        tile_in_parts = ptx.kernel == "tile" and ptx.constants["PDL"]
        assert bool(ptx.waits) == (ptx.is_second() or tile_in_parts), ptx
        lets_go = ptx.constants["PDL"] and (
            ptx.kernel == "sum_partials"
            or ptx.kernel.endswith(("shrink", "_fwd"))
            or ptx.constants.get("SPLIT", False)
        )
        assert len(ptx.begins) == lets_go, ptx
        loads = [line for lines in ptx.loads.values() for line in lines]
        if ptx.begins:
            assert ptx.begins[0] < min(loads), ptx
    has = {ptx.kernel for ptx in compiled(target) if ptx.begins}
    dependent_there = target in chips.DEPENDENT
    assert has == (FIRSTS if dependent_there else set())


def test_the_base_is_multiplied_before_the_wait(compiled):
    """Or read, where a library has made it and float16's powers of two don't take its place."""
    seconds = [ptx for ptx in compiled("sm_90") if ptx.is_second()]
    products = {
        "tile": ("a", "w"), "multi_tile": ("x", "w"), "decode_tile": ("x", "w"),
        "codes_tile": ("a", "codes"),
    }  # fmt: skip
    multiplied = set()
    for ptx in (ptx for ptx in seconds if ptx.kernel in products):
        read = [line for name in products[ptx.kernel] for line in ptx.loads[name]]
        if read:  # a delta alone has no base
            assert set(read) <= set(ptx.early), ptx
            multiplied.add(ptx.kernel)
    assert multiplied == set(products)
    adds = [ptx for ptx in seconds if ptx.constants.get("PARTS") == 1]
    early = {ptx.dtype: set(ptx.loads["base"]) <= set(ptx.early) for ptx in adds}
    assert early == {"bfloat16": True, "float16": False}
