"""Where the native library's CUDA kernels can't run, Triton's or the reference serve."""

import pytest
import torch

import peft_kernels
from peft_kernels import _cuda_kernels, _library
from peft_kernels.ops.prompt_lookup import prompt_lookup_fwd_ref
from peft_kernels.tools import doctor
from peft_kernels.triton.common import chips

GPU = torch.device("cuda", 0)
# A call on a GPU, as far as the dispatcher knows; its tensors are on the CPU.
ON_A_GPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
REASONS = {
    "no kernel image": "no kernel image is available for execution on the device",
    "old driver": "CUDA driver version is insufficient for CUDA runtime version (the driver is for"
    " CUDA 12.4, they are linked to 13.0)",
}


def inputs():
    return (
        torch.randn(2, 3, 4),
        torch.randn(1, 2, 4),
        None,
        torch.tensor([[0, 1], [0, 1]], dtype=torch.int32),
        None,
        None,
    )


class Driver:
    """What the native library says of each GPU, and whether its kernels were called."""

    def __init__(self, monkeypatch):
        self.error, self.asked, self.calls = "", [], 0
        monkeypatch.setattr(_cuda_kernels, "are_built", lambda: True)
        monkeypatch.setattr(_cuda_kernels, "_error", self.answer)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        _cuda_kernels._why_not.cache_clear()

    def answer(self, index):
        self.asked.append(index)
        return self.error

    def prompt_lookup_fwd(self, *args):
        self.calls += 1
        return prompt_lookup_fwd_ref(*args)


@pytest.fixture
def driver(monkeypatch):
    found = Driver(monkeypatch)
    library = torch.library.Library("peft_kernels", "IMPL")
    library.impl("prompt_lookup_fwd_cuda", found.prompt_lookup_fwd, "CPU")
    yield found
    library._destroy()
    _cuda_kernels._why_not.cache_clear()


def call_on_a_gpu():
    """Who served the call: the CUDA kernels, or what takes their place."""
    args, passed_by = inputs(), []

    def otherwise(*given):
        passed_by.append(given)
        return prompt_lookup_fwd_ref(*given)

    found = _library._on_a_gpu("prompt_lookup_fwd", True, otherwise)(*args)
    for ours, right in zip(found, prompt_lookup_fwd_ref(*args), strict=True):
        assert torch.equal(ours, right)
    return "another" if passed_by else "cuda"


def test_they_serve_where_they_run(driver):
    assert call_on_a_gpu() == "cuda"
    assert peft_kernels.backend_of("prompt_lookup", GPU, torch.float32) == "cuda"
    torch.ops.peft_kernels.prompt_lookup_fwd.default.redispatch(ON_A_GPU, *inputs())
    assert driver.calls == 2


@pytest.mark.parametrize("error", REASONS.values(), ids=REASONS)
def test_they_are_passed_by_where_they_dont(driver, error):
    driver.error = error
    assert call_on_a_gpu() == "another"
    assert driver.calls == 0
    assert _cuda_kernels.why_not(GPU) == error
    assert peft_kernels.backend_of("prompt_lookup", GPU, torch.float32) != "cuda"


def test_they_arent_for_rocm(driver, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert call_on_a_gpu() == "another"
    assert (driver.calls, driver.asked) == (0, [])
    assert "ROCm" in _cuda_kernels.why_not(GPU)


def test_a_gpu_is_asked_once(driver):
    for _ in range(3):
        assert _cuda_kernels.why_not(GPU) is None
        assert _cuda_kernels.why_not(torch.device("cuda", 1)) is None
    assert driver.asked == [0, 1]


def test_without_a_gpu_nobody_is_asked(driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _cuda_kernels.why_not(torch.device("cuda")) is None
    assert driver.asked == []


def test_without_nvcc_that_is_the_reason(monkeypatch):
    monkeypatch.setattr(_cuda_kernels, "are_built", lambda: False)
    _cuda_kernels._why_not.cache_clear()
    assert call_on_a_gpu() == "another"
    assert _cuda_kernels.why_not(GPU) == _cuda_kernels.NOT_BUILT
    _cuda_kernels._why_not.cache_clear()


def test_doctor_says_what_a_gpu_lacks(driver, monkeypatch):
    driver.error = REASONS["old driver"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(chips, "arch_name", lambda device: "sm_80")
    said = doctor._cuda()
    assert said == f"cuda:0: {driver.error}; cuda:1: {driver.error}"
    (row,) = [row for row in doctor.backends("prompt_lookup") if row[1:3] == ("cuda", "float32")]
    assert row[3] != "cuda" and driver.error in row[4]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which they run")
def test_the_library_itself_finds_no_driver():
    if not _cuda_kernels.are_built():
        pytest.skip("the native library has no CUDA kernels")
    said = torch.ops.peft_kernels.cuda_kernels_error(0)
    assert "driver" in said and "NVIDIA" in said
