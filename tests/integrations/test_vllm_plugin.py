"""The entry point: when the wrapper takes vLLM's place, and what is said when it doesn't."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import vllm
from installed import install_metadata
from vllm.config.lora import LoRAConfig
from vllm.platforms.cpu import CpuPlatform

import peft_kernels
from peft_kernels.integrations.vllm.plugin import GPU_WRAPPER, VERSIONS, WRAPPER, register

ROOT = Path(__file__).parents[2]
OWN_GPU = "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU"
OWN = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"

pytestmark = pytest.mark.filterwarnings("ignore")


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append((record.levelname, record.getMessage()))


@pytest.fixture
def log(monkeypatch):
    """What is logged, with vLLM's own class in place before and after."""
    for once in (vllm.logger._print_info_once, vllm.logger._print_warning_once):
        once.cache_clear()
    monkeypatch.setattr(CpuPlatform, "get_punica_wrapper", classmethod(lambda cls: OWN))
    monkeypatch.delenv("PEFT_KERNELS_VLLM", raising=False)
    handler, logger = Lines(), logging.getLogger("vllm")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_the_wrapper_serves_and_one_line_says_so(log):
    from vllm.lora.punica_wrapper import get_punica_wrapper

    register()
    register()
    assert CpuPlatform.get_punica_wrapper() == WRAPPER and not log
    made = [get_punica_wrapper(8, max_batches=8, device="cpu") for _ in range(2)]
    assert {type(one).__name__ for one in made} == {"PunicaWrapperPEFTKernels"}
    ours = [line for line in log if "peft_kernels" in line[1]]
    assert ours == [("INFO", "peft_kernels serves LoRA requests on its CPU kernels.")]


def test_the_variable_turns_it_off(log, monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_VLLM", "0")
    register()
    assert CpuPlatform.get_punica_wrapper() == OWN and not log


def test_another_value_of_the_variable_is_refused(log, monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_VLLM", "no")
    with pytest.raises(ValueError, match=r"PEFT_KERNELS_VLLM must be 1 .* or 0 .*; got 'no'"):
        register()
    assert CpuPlatform.get_punica_wrapper() == OWN


def test_another_version_keeps_its_own_path_and_a_warning_says_so(log, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    register()
    register()
    assert CpuPlatform.get_punica_wrapper() == OWN
    ((level, line),) = log
    assert level == "WARNING"
    assert "it knows vLLM 0.32.0, and this is 0.99.1" in line


def test_the_installed_version_is_a_known_one():
    assert vllm.__version__.split("+")[0] in VERSIONS


@pytest.fixture(params=["CUDA", "ROCM"])
def gpu(monkeypatch, request):
    """A platform of GPUs, as vLLM's are; there is none here."""
    from vllm.platforms.interface import Platform, PlatformEnum

    class GPU(Platform):
        _enum = PlatformEnum[request.param]

        @classmethod
        def get_punica_wrapper(cls):
            return OWN_GPU

    monkeypatch.setattr(vllm.platforms, "_current_platform", GPU())
    monkeypatch.setattr(LoRAConfig, "compute_hash", LoRAConfig.compute_hash)
    return GPU


def test_a_gpu_keeps_its_own_path_until_it_is_asked_for(log, gpu):
    register()
    assert gpu.get_punica_wrapper() == OWN_GPU
    ((level, line),) = log
    assert level == "INFO" and "on GPUs with PEFT_KERNELS_VLLM=1; here vLLM's own" in line


def test_a_gpu_that_is_asked_for_has_the_wrapper_of_gpus(log, gpu, monkeypatch):
    from vllm.lora.punica_wrapper import get_punica_wrapper, punica_selector

    monkeypatch.setattr(punica_selector, "current_platform", vllm.platforms.current_platform)
    monkeypatch.setenv("PEFT_KERNELS_VLLM", "1")
    before = LoRAConfig().compute_hash()
    register()
    once = LoRAConfig().compute_hash()
    register()
    assert gpu.get_punica_wrapper() == GPU_WRAPPER and not log
    assert before != once == LoRAConfig().compute_hash()
    made = get_punica_wrapper(8, max_batches=8, device="cpu", lora_config=LoRAConfig())
    assert type(made).__name__ == "PunicaWrapperPEFTKernelsGPU"
    ours = [line for line in log if "peft_kernels" in line[1]]
    assert ours == [("INFO", "peft_kernels serves LoRA requests on its Triton kernels.")]


def test_a_gpu_without_kernels_keeps_its_own_path(log, gpu, monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_VLLM", "1")
    before = LoRAConfig().compute_hash()
    with peft_kernels.backend("reference"):
        register()
    assert gpu.get_punica_wrapper() == OWN_GPU and LoRAConfig().compute_hash() == before
    ((level, _),) = log
    assert level == "WARNING"


def test_another_platform_keeps_its_own_path(log, gpu, monkeypatch):
    from vllm.platforms.interface import PlatformEnum

    monkeypatch.setattr(gpu, "_enum", PlatformEnum.XPU)
    monkeypatch.setenv("PEFT_KERNELS_VLLM", "1")
    register()
    assert gpu.get_punica_wrapper() == OWN_GPU
    ((level, line),) = log
    assert level == "INFO" and "peft_kernels serves LoRA on CPUs; here vLLM's own" in line


def test_without_kernels_vllm_keeps_its_own_path(log):
    with peft_kernels.backend("reference"):
        register()
    assert CpuPlatform.get_punica_wrapper() == OWN
    ((level, _),) = log
    assert level == "WARNING"


PRINTS = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.platforms import current_platform
print("served by", current_platform.get_punica_wrapper())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return install_metadata(tmp_path_factory.mktemp("installed"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("environment", "wrapper", "says"),
    [
        ({}, WRAPPER, None),
        ({"PEFT_KERNELS_VLLM": "0"}, OWN, None),
        ({"PEFT_KERNELS_NATIVE": "0"}, OWN, "no native library (PEFT_KERNELS_NATIVE=0 is set)"),
        ({"PEFT_KERNELS_BACKEND": "reference"}, OWN, "PEFT_KERNELS_BACKEND=reference is set"),
    ],
    ids=str,
)
def test_vllm_calls_it_in_a_process_of_its_own(installed, environment, wrapper, says):
    path = os.pathsep.join([str(ROOT), str(installed)])
    done = subprocess.run(
        [sys.executable, "-c", PRINTS],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"served by {wrapper}" in done.stdout, done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "peft_kernels" in line]
    lines = [line for line in lines if "served by" not in line]
    assert len(lines) == (1 if says else 0), lines
    assert says is None or says in lines[0]
