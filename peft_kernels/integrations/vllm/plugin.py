"""The entry point that vLLM calls in each of its processes, before it makes a model."""

from __future__ import annotations

import os
from functools import wraps
from typing import Any

import torch

from peft_kernels._library import backend_of, why_no_native

VERSIONS = ("0.32.0",)  # of vLLM, whose insides the wrapper goes by and is tested with
WRAPPER = "peft_kernels.integrations.vllm.punica.PunicaWrapperPEFTKernels"
GPU_WRAPPER = "peft_kernels.integrations.vllm.punica_gpu.PunicaWrapperPEFTKernelsGPU"
LOGGER = "vllm.peft_kernels"  # vLLM shows what is logged below its own name


def register() -> None:
    """Has vLLM serve its LoRA requests on the kernels of many adapters.

    On a CPU; and on a GPU of CUDA or ROCm if ``PEFT_KERNELS_VLLM=1`` asks for it, for nobody has
    measured it there.

    An entry point of the group ``vllm.general_plugins``: vLLM calls it where this package is
    installed, and can call it again. The wrapper says in a line of the log that it serves, once a
    model is made. Where it can't serve, vLLM's own code goes on and a line says why; with
    ``PEFT_KERNELS_VLLM=0`` nothing is done or said.

    Raises:
        ValueError: ``PEFT_KERNELS_VLLM`` is neither 0 nor 1.
    """
    setting = os.environ.get("PEFT_KERNELS_VLLM") or None
    if setting not in (None, "0", "1"):
        raise ValueError(
            "PEFT_KERNELS_VLLM must be 1 to serve vLLM's LoRA requests on peft_kernels, or 0 for "
            f"vLLM's own code; got {setting!r}"
        )
    if setting == "0":
        return
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    log = init_logger(LOGGER)
    is_cpu, is_gpu = current_platform.is_cpu(), current_platform.is_cuda_alike()
    if not is_cpu and not (is_gpu and setting):
        on_gpus = ", and on GPUs with PEFT_KERNELS_VLLM=1" if is_gpu else ""
        log.info_once("peft_kernels serves LoRA on CPUs%s; here vLLM's own code does.", on_gpus)
        return
    reason = _why_not("cpu" if is_cpu else "cuda")
    if reason:
        log.warning_once("peft_kernels leaves LoRA to vLLM's own code: %s.", reason)
        return
    wrapper = WRAPPER if is_cpu else GPU_WRAPPER
    type(current_platform).get_punica_wrapper = classmethod(lambda cls: wrapper)
    if is_gpu:
        _tell_compiled_graphs_apart()


def _why_not(device: str) -> str | None:
    import vllm

    version = vllm.__version__.split("+")[0]
    if version not in VERSIONS:
        return f"it knows vLLM {', '.join(VERSIONS)}, and this is {vllm.__version__}"
    backend = backend_of("multi_lora_linear", device, torch.float32)
    if backend == ("cpu" if device == "cpu" else "triton"):
        return None
    if os.environ.get("PEFT_KERNELS_BACKEND") == "reference":
        return "PEFT_KERNELS_BACKEND=reference is set"
    if device == "cpu":
        return f"it has no native library ({why_no_native()})"
    return "its kernels there are Triton's, and Triton isn't installed"


def _tell_compiled_graphs_apart() -> None:
    """vLLM takes a compiled graph from its cache by a hash, which knows nothing of a wrapper."""
    from vllm.config.lora import LoRAConfig

    compute_hash = LoRAConfig.compute_hash
    if hasattr(compute_hash, "__wrapped__"):
        return

    @wraps(compute_hash)
    def of_ours(config: Any) -> str:
        return f"{compute_hash(config)} {GPU_WRAPPER}"

    LoRAConfig.compute_hash = of_ours
