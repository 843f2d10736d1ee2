"""What the launchers ask of the device, with devices that aren't here."""

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
    with_tf32 = [launched_precisions(has_tf32=True), launched_precisions(has_tf32=False)]
    assert all("tf32" in precisions for precisions in with_tf32[0].values())
    assert not any("tf32" in precisions for precisions in with_tf32[1].values())


def launched_precisions(*, has_tf32: bool) -> dict[str, set[str]]:
    """By the kind of case, those of float32 x."""
    found: dict[str, set[str]] = {}
    for case in compile_report.CASES:
        if case.dtype != "float32":
            continue
        precisions = found.setdefault(type(case).__name__, set())

        def record(kernel, grid, args, options, precisions=precisions):
            precisions.add(options.get("PRECISION", ""))

        with (
            patch.object(launch, "run", record),
            patch.object(chips, "_has_tf32", lambda device: has_tf32),
        ):
            case.run()
    return found
