"""gptqmodel's layers in the layouts of GPTQ, of 8, 4 or 2 bits, and of AWQ, of 4.

Those that its PyTorch code computes with, which keep the checkpoint's tensors; its other layers
have tensors that were packed again for a kernel.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from peft_kernels.codes.reading import Reader
from peft_kernels.ops import QuantizedWeight

ROTATED = "x rotated"
BITS = "codes of other bits than 2, 4 or 8 in an int32"
_ROOM = "gptqmodel.nn_modules.qlinear"


def readers() -> dict[type, Reader]:
    """What reads which layer of the library's."""
    found: dict[type, Reader] = {}
    for name, kind, reader in (
        ("torch", "TorchLinear", _gptq_of),
        ("torch_awq", "AwqTorchLinear", _awq_of),
    ):
        if library := sys.modules.get(f"{_ROOM}.{name}"):
            found[getattr(library, kind)] = reader
    return found


def _gptq_of(module: Any) -> QuantizedWeight | str:
    fault = _why_not(module, (2, 4, 8))
    if fault is not None:
        return fault
    # Zeros are as they are: of checkpoints that have them less 1 the library adds it as it loads.
    return _weight_of(module, f"gptq_{module.bits}", module.g_idx)


def _awq_of(module: Any) -> QuantizedWeight | str:
    return _why_not(module, (4,)) or _weight_of(module, "awq_4", None)


def _why_not(module: Any, bits: tuple[int, ...]) -> str | None:
    if getattr(module, "online_full_had", False) or getattr(module, "online_partial_had", False):
        return ROTATED
    planar = getattr(module, "planar", False)
    if module.bits not in bits or planar or module.qweight.dtype is not torch.int32:
        return BITS
    return None


def _weight_of(module: Any, layout: str, groups: torch.Tensor | None) -> QuantizedWeight:
    n, k = module.out_features, module.in_features
    block = module.group_size if module.group_size > 0 else k
    return QuantizedWeight(
        module.qweight, module.scales, (n, k), block, groups, shifts=module.qzeros, layout=layout
    )
