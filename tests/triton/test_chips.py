"""What the launchers ask of the device, with devices that aren't here."""

import math
import re
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from peft_kernels.tools.report import compile as compile_report
from peft_kernels.triton.common import chips, launch

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
    for cached in vars(chips).values():
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
    assert set(chips.ARCHS) - nvidia == {"gfx90a", "gfx942", "gfx950"} and len(nvidia) == 6


def test_an_amd_gpu_without_tiles_of_its_own(gpu):
    gpu(hip=True, gcnArchName="gfx1100", shared_memory_per_block=64 * 1024)
    assert chips.arch_name(GPU) == "other"


@pytest.mark.parametrize(("major", "minor"), [(7, 0), (7, 5), (8, 7), (11, 0), (13, 0)])
def test_tiles_of_an_unknown_gpu(gpu, major, minor):
    gpu(major=major, minor=minor, shared_memory_per_block_optin=227 * 1024)
    assert chips.arch_name(GPU) == "other"


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
