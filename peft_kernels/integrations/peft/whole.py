"""Which parameters of PEFT's layers a kernel can take."""

from __future__ import annotations

import sys
from typing import Any, TypeGuard

from torch import Tensor

from peft_kernels.integrations.served import WHOLE

_DTENSOR = "torch.distributed.tensor"


def is_whole(tensor: Any, dimensions: int) -> TypeGuard[Tensor]:
    """Whether this is all of a parameter, or a DTensor: no flat shard, no other library's."""
    if type(tensor) not in WHOLE:
        library: Any = sys.modules.get(_DTENSOR)
        if library is None or type(tensor) is not library.DTensor:
            return False
    return tensor.dim() == dimensions
