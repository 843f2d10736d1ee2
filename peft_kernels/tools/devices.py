"""The device that a command is given."""

from __future__ import annotations

import torch

from peft_kernels.tools import UserError


def check_device(device: str) -> torch.device:
    """The device of that name.

    Raises:
        UserError: no tensor can be made there.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device!r} can't be used: {reason}") from error
    return torch.device(device)
