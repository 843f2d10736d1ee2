"""The entry point that vLLM calls in each of its processes, before it makes a model."""

from __future__ import annotations

import os

import torch

from peft_kernels._library import backend_of, why_no_native

VERSIONS = ("0.32.0",)  # of vLLM, whose insides the wrapper goes by and is tested with
WRAPPER = "peft_kernels.integrations.vllm.punica.PunicaWrapperPEFTKernels"
LOGGER = "vllm.peft_kernels"  # vLLM shows what is logged below its own name


def register() -> None:
    """Has vLLM serve its LoRA requests on the kernels of many adapters, on a CPU.

    An entry point of the group ``vllm.general_plugins``: vLLM calls it where this package is
    installed, and can call it again. The wrapper says in a line of the log that it serves, once a
    model is made. Where it can't serve, vLLM's own code goes on and a line says why; with
    ``PEFT_KERNELS_VLLM=0`` nothing is done or said.

    Raises:
        ValueError: ``PEFT_KERNELS_VLLM`` is neither 0 nor 1.
    """
    setting = os.environ.get("PEFT_KERNELS_VLLM") or "1"
    if setting not in ("0", "1"):
        raise ValueError(
            "PEFT_KERNELS_VLLM must be 1 to serve vLLM's LoRA requests on peft_kernels, or 0 for "
            f"vLLM's own code; got {setting!r}"
        )
    if setting == "0":
        return
    from vllm.logger import init_logger
    from vllm.platforms import current_platform
    from vllm.platforms.cpu import CpuPlatform

    log = init_logger(LOGGER)
    if not current_platform.is_cpu():
        log.info_once("peft_kernels serves LoRA on CPUs; this platform has vLLM's own code.")
        return
    reason = _why_not()
    if reason:
        log.warning_once("peft_kernels leaves LoRA to vLLM's own code: %s.", reason)
        return
    CpuPlatform.get_punica_wrapper = classmethod(lambda cls: WRAPPER)


def _why_not() -> str | None:
    import vllm

    version = vllm.__version__.split("+")[0]
    if version not in VERSIONS:
        return f"it knows vLLM {', '.join(VERSIONS)}, and this is {vllm.__version__}"
    if backend_of("multi_lora_linear", "cpu", torch.float32) == "cpu":
        return None
    if os.environ.get("PEFT_KERNELS_BACKEND") == "reference":
        return "PEFT_KERNELS_BACKEND=reference is set"
    return f"it has no native library ({why_no_native()})"
