"""Whether the native library's CUDA kernels run on a GPU.

They are compiled for some chips, and the CUDA runtime that is linked beside them needs a driver of
its own age, whatever torch needs. Each GPU is asked once.
"""

from __future__ import annotations

import functools

import torch

NOT_BUILT = "the native library is built without CUDA kernels (no nvcc, or PEFT_KERNELS_CUDA=OFF)"


def are_built() -> bool:
    """Whether the native library is loaded and holds them."""
    return hasattr(torch.ops.peft_kernels, "cuda_kernels_error")


def why_not(device: torch.device) -> str | None:
    """Why they don't run on ``device``; None where they do, or where there is no GPU to ask."""
    return _why_not(-1 if device.index is None else device.index)


@functools.cache
def _why_not(index: int) -> str | None:
    if not are_built():
        return NOT_BUILT
    if torch.version.hip is not None:
        return "they are compiled for NVIDIA's chips, and this torch is built for ROCm"
    if index < 0:
        if not torch.cuda.is_available():
            return None
        index = torch.cuda.current_device()
    return _error(index) or None


def _error(index: int) -> str:
    return torch.ops.peft_kernels.cuda_kernels_error(index)
