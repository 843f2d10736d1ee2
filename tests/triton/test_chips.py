"""What the launchers ask of the device, with devices that aren't here."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from peft_kernels.tools.report import compile as compile_report
from peft_kernels.triton.common import chips, cost, launch
from peft_kernels.triton.lora_linear import modelled, plans, tilings, tuning

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Makes the device one with the given properties; ``hip``: torch's build is for ROCm."""

    def be(hip=False, **properties):
        monkeypatch.setattr(torch.version, "hip", "7.0" if hip else None)
        known = SimpleNamespace(**properties)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)
        forget()

    forget()
    yield be
    forget()


def forget():
    for cached in (*vars(chips).values(), *vars(cost).values()):
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


@pytest.fixture
def tf32_is_allowed():
    previous = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = previous


# ---- TF32 ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "precision"),
    [
        ("gfx90a:sramecc+:xnack-", "ieee"),
        ("gfx942:sramecc+:xnack-", "tf32"),
        ("gfx950:sramecc+:xnack-", "ieee"),
        ("gfx1100", "ieee"),
    ],
)
@pytest.mark.usefixtures("tf32_is_allowed")
def test_tf32_of_amd(gpu, arch, precision):
    """Triton's backend raises for "tf32" where it isn't among those that it allows."""
    gpu(hip=True, gcnArchName=arch)
    assert chips.float32_precision(GPU) == precision


@pytest.mark.usefixtures("tf32_is_allowed")
def test_tf32_of_nvidia(gpu):
    gpu(major=8, minor=0)
    assert chips.float32_precision(GPU) == "tf32"


def test_tf32_is_torchs_choice(gpu):
    gpu(major=8, minor=0)
    assert chips.float32_precision(GPU) == "ieee"


@pytest.mark.usefixtures("tf32_is_allowed")
def test_every_launch_asks_for_tf32():
    """Of every op: what a GPU without it is given has no "tf32" in it, with another there is."""
    with_tf32, without = (launched_precisions(has_tf32=has) for has in (True, False))
    assert len(with_tf32) > 5 and with_tf32.keys() == without.keys()
    assert all("tf32" in precisions for precisions in with_tf32.values())
    assert not any("tf32" in precisions for precisions in without.values())


def launched_precisions(*, has_tf32: bool) -> dict[str, set[str]]:
    """Of products of float32 x, by the kind of case."""
    found: dict[str, set[str]] = {}
    for case in compile_report.CASES:
        if case.dtype != "float32":
            continue
        kind = type(case).__name__

        def record(kernel, grid, args, options, kind=kind):
            if "PRECISION" in options:
                found.setdefault(kind, set()).add(options["PRECISION"])

        with (
            patch.object(launch, "run", record),
            patch.object(chips, "_has_tf32", lambda device: has_tf32),
        ):
            case.run()
    return found


# ---- which tiles, and for how many cores -----------------------------------------------------


H100 = {"major": 9, "minor": 0, "shared_memory_per_block_optin": 227 * 1024}


@pytest.mark.parametrize(
    ("major", "minor", "room", "name"),
    [
        (6, 1, 48, "sm_75"),
        (7, 0, 96, "sm_75"),
        (7, 5, 64, "sm_75"),
        (8, 0, 163, "sm_80"),
        (8, 6, 99, "sm_86"),
        (8, 9, 99, "sm_89"),
        (9, 0, 227, "sm_90"),
        (10, 0, 227, "sm_100"),
        (10, 3, 227, "sm_100"),
        (12, 0, 99, "sm_120"),
        (12, 1, 99, "sm_120"),
    ],
)
def test_tiles_of_nvidia(gpu, major, minor, room, name):
    gpu(major=major, minor=minor, shared_memory_per_block_optin=room * 1024)
    assert chips.arch_name(GPU) == name


@pytest.mark.parametrize(("name", "room"), [("gfx90a", 64), ("gfx942", 64), ("gfx950", 160)])
def test_tiles_of_amd(gpu, name, room):
    gpu(hip=True, gcnArchName=f"{name}:sramecc+:xnack-", shared_memory_per_block=room * 1024)
    assert chips.arch_name(GPU) == name


def test_torch_may_not_say_how_much_shared_memory_there_is(gpu):
    gpu(hip=True, gcnArchName="gfx942:sramecc+:xnack-")
    assert chips.arch_name(GPU) == "gfx942"


def test_every_name_is_a_gpu_s():
    nvidia = {name for name in chips.ARCHS if re.fullmatch(r"sm_\d+", name)}
    assert set(chips.ARCHS) - nvidia == {"gfx90a", "gfx942", "gfx950"} and len(nvidia) == 7


def test_an_amd_gpu_without_tiles_of_its_own(gpu):
    gpu(hip=True, gcnArchName="gfx1100", shared_memory_per_block=64 * 1024)
    assert chips.arch_name(GPU) == "other"


@pytest.mark.parametrize(("major", "minor"), [(8, 7), (11, 0), (13, 0)])
def test_tiles_of_an_unknown_gpu(gpu, major, minor):
    gpu(major=major, minor=minor, shared_memory_per_block_optin=227 * 1024)
    assert chips.arch_name(GPU) == "other"


T4 = {
    "major": 7, "minor": 5, "multi_processor_count": 40, "clock_rate": 1590000,
    "memory_clock_rate": 5001000, "memory_bus_width": 256, "shared_memory_per_block_optin": 1 << 16,
    "L2_cache_size": 4 << 20,
}  # fmt: skip


@pytest.mark.parametrize(("m", "codes_plan"), [(7, "fused"), (8, "scratch")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_rule_of_a_t4(gpu, dtype, m, codes_plan):
    """Triton has no instructions of its tensor cores: products with W are the library's, which has.

    Ours are float32 products in each dtype, even where torch allows TF32.
    """
    gpu(**T4)
    name = chips.arch_name(GPU)
    assert name == chips.NO_TENSOR_CORES
    with patch.object(torch._C, "_get_fp32_precision_getter", lambda *asked: "tf32"):
        assert chips.precision(GPU, dtype, "bf16x3") == chips.WIDENED
    figures = cost.of_device(name, GPU)
    assert figures == replace(cost.CHIPS[name], bandwidth=figures.bandwidth)
    assert figures.bandwidth == pytest.approx(cost.CHIPS[name].bandwidth, rel=0.01)
    for direction in ("fwd", "bwd"):
        problem = plans.Problem(direction, dtype, torch.float32, m, 4096, 4096, 16, dropout=False)
        assert problem.able(name) == ("library",)
        assert plans.default_plan(name, problem, figures) == "library"
        assert modelled.parts_of_s(name, problem, chip=figures) == 0
        with plans.force("ii"):
            assert plans.choose(GPU, problem) == "library"
        assert plans.default_plan(name, replace(problem, codes="4-bit/64"), figures) == codes_plan


def test_every_product_on_a_t4_is_widened():
    """Of every op, and so no launch writes an operand in terms."""
    found: dict[str, set[str]] = {}

    def record(kernel, grid, args, options):
        if "PRECISION" in options:
            found.setdefault(kernel.fn.__module__.split(".")[2], set()).add(options["PRECISION"])
        assert kernel.fn.__name__ != "terms_kernel"

    with (
        patch.object(launch, "run", record),
        patch.object(chips, "arch_name", lambda device: chips.NO_TENSOR_CORES),
    ):
        for case in compile_report.CASES:
            case.run()
    assert set(found) == {
        "lora_linear", "lora_linear_codes", "dora_linear", "multi_lora_linear", "adapter",
        "adapter_fusion", "prefix_attention",
    }  # fmt: skip
    assert set().union(*found.values()) == {chips.WIDENED}


def test_tiles_with_less_shared_memory_than_they_take(gpu):
    gpu(**H100)
    assert chips.arch_name(GPU) == "sm_90"
    gpu(**H100 | {"shared_memory_per_block_optin": 99 * 1024})
    assert chips.arch_name(GPU) == "other"


@pytest.mark.parametrize("count", [14, 78, 114, 132])
def test_cores_are_those_of_the_device(gpu, count):
    """Of an H100 in MIG, an H20, an H100 PCIe and an H100 SXM."""
    gpu(**H100, multi_processor_count=count)
    assert chips.cores(GPU) == count


def test_cores_without_a_device():
    with patch.object(chips, "arch_name", lambda device: "sm_90"):
        assert chips.cores(torch.device("meta")) == chips.ARCHS["sm_90"].cores


# What drivers say of cards that are sold: kHz, bits. Clocks of the cores are those of a boost.
SOLD = {
    "H100 SXM": (H100, 132, 1980000, 2619000, 5120, 3.35e12),
    "H100 PCIe": (H100, 114, 1755000, 1593000, 5120, 2.04e12),
    "H20": (H100, 78, 1980000, 3201000, 5120, 4.10e12),
    "A100 80 GB": ({"major": 8, "minor": 0}, 108, 1410000, 1593000, 5120, 2.04e12),
    "RTX 4090": ({"major": 8, "minor": 9}, 128, 2520000, 10501000, 384, 1.008e12),
    "RTX 5090": ({"major": 12, "minor": 0}, 170, 2407000, 14001000, 512, 1.79e12),
}


@pytest.mark.parametrize("card", SOLD)
def test_figures_are_those_of_the_device(gpu, card):
    """Memory moves two numbers a clock. Products don't run at a boost above the datasheet's."""
    known, count, clock, memory_clock, bits, bandwidth = SOLD[card]
    gpu(
        **known, multi_processor_count=count, clock_rate=clock, memory_clock_rate=memory_clock,
        memory_bus_width=bits, L2_cache_size=9 << 20,
    )  # fmt: skip
    name = chips.arch_name(GPU)
    found, listed = cost.of_device(name, GPU), cost.CHIPS[name]
    assert found.cores == count and found.l2 == 9 << 20 and found.shared == listed.shared
    assert found.bandwidth == pytest.approx(bandwidth, rel=0.01)
    assert found.clock == min(1e3 * clock, listed.clock)
    a_core = found.flops / found.cores / found.clock
    assert a_core == pytest.approx(listed.flops / listed.cores / listed.clock)


def test_a_part_of_an_h100(gpu):
    """MIG's 1g.10gb: an eighth of the memory's width. It gets other tiles than the whole."""
    part = {"multi_processor_count": 16, "memory_clock_rate": 2619000, "memory_bus_width": 640}
    gpu(**H100, **part, clock_rate=1980000, L2_cache_size=6 << 20)
    found, whole = cost.of_device("sm_90", GPU), cost.CHIPS["sm_90"]
    assert found.bandwidth == pytest.approx(whole.bandwidth / 8, rel=0.01)
    assert found.flops == pytest.approx(whole.flops * 16 / 132)
    product = cost.Product(256, 4096, 4096)
    tiles = [tilings.tiling("sm_90", "tile", torch.bfloat16, product, c) for c in (found, whole)]
    assert tiles[0] != tiles[1]


def test_another_plan_where_the_figures_are_others(gpu):
    """An H20 has an H100's memory and a part of its cores: its products bind earlier."""
    known, count, clock, memory_clock, bits, _ = SOLD["H20"]
    gpu(
        **known, multi_processor_count=count, clock_rate=clock, memory_clock_rate=memory_clock,
        memory_bus_width=bits, L2_cache_size=60 << 20,
    )  # fmt: skip
    problem = plans.Problem(
        "fwd", torch.bfloat16, torch.float32, 64, 4096, 4096, 16, dropout=False
    )  # fmt: skip
    with patch.object(tuning, "find", lambda *asked: tuning.Found(None, 0.0)):
        found = plans.choose(GPU, problem)
    assert found == plans.default_plan("sm_90", problem, cost.of_device("sm_90", GPU))
    assert found != plans.default_plan("sm_90", problem)


@pytest.mark.parametrize("hip", [False, True])
def test_figures_that_the_driver_does_not_tell(gpu, hip):
    """ROCm's clock of the memory isn't what a pin moves, on some chips it is half of it, or 0."""
    name = "gfx942" if hip else "sm_90"
    told = {"gcnArchName": name} if hip else H100 | {"memory_clock_rate": 0, "memory_bus_width": 0}
    memory = {"memory_clock_rate": 1300000, "memory_bus_width": 8192, "L2_cache_size": 4 << 20}
    gpu(hip=hip, multi_processor_count=cost.CHIPS[name].cores, **(told | memory if hip else told))
    assert cost.of_device(name, GPU) == cost.CHIPS[name]


def test_figures_without_a_device_or_a_datasheet(gpu):
    assert cost.of_device("sm_90", torch.device("meta")) == cost.CHIPS["sm_90"]
    gpu(major=13, minor=0, multi_processor_count=100)
    assert cost.of_device(chips.arch_name(GPU), GPU) is None


def test_every_op_asks_for_the_device_s_cores():
    """With more of them some sum of each op is split further."""
    few, many = (programs_launched(cores) for cores in (8, 132))
    assert few.keys() == many.keys()
    # prompt_lookup and DoRA's norms sum nothing that could be split by the cores at hand.
    assert {kind for kind in few if few[kind] >= many[kind]} == {"PromptCase", "NormCase"}


def programs_launched(cores: int) -> dict[str, int]:
    """By the kind of case: how many programs its launches have."""
    found: dict[str, int] = {}
    for case in compile_report.CASES:
        if case.dtype != "bfloat16":
            continue

        kind = type(case).__name__

        def record(kernel, grid, args, options, kind=kind):
            found[kind] = found.get(kind, 0) + math.prod(grid)

        with (
            patch.object(launch, "run", record),
            patch.object(chips, "cores", lambda device: cores),
        ):
            case.run()
    return found
