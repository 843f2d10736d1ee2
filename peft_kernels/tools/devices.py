"""The device that a command is given, and what a GPU's driver says of it."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import torch

from peft_kernels.tools import UserError


def check_device(device: str) -> torch.device:
    """The device of that name.

    Raises:
        UserError: no tensor can be made there.
    """
    try:
        torch.empty(0, device=device)
    # The latter two of a torch without CUDA, and without the module of another maker's devices.
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device!r} can't be used: {reason}") from error
    return torch.device(device)


# What nvidia-smi is asked for, by the name in what `card` returns.
_ASKED = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "sm_mhz_max": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "memory_mhz_max": "clocks.max.mem",
    "watts_max": "power.limit",
    "celsius": "temperature.gpu",
}


def card(device: torch.device) -> dict[str, Any]:
    """A GPU: its name, architecture, cores and bytes; its driver and clocks where they are told.

    What nvidia-smi doesn't tell, or there is none, is None.
    """
    found = torch.cuda.get_device_properties(device)
    architecture = getattr(found, "gcnArchName", "") if torch.version.hip else ""
    return {
        "name": found.name,
        "architecture": architecture or f"sm_{found.major}{found.minor}",
        "cores": found.multi_processor_count,
        "bytes": found.total_memory,
        **_told_by_the_driver(f"GPU-{getattr(found, 'uuid', '')}"),
    }


def _told_by_the_driver(uuid: str) -> dict[str, str | None]:
    nothing: dict[str, str | None] = dict.fromkeys(_ASKED)
    program = shutil.which("nvidia-smi")
    if program is None:
        return nothing
    asked = f"--query-gpu={','.join(_ASKED.values())}"
    command = [program, "-i", uuid, asked, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return nothing
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if len(values) != len(_ASKED):
        return nothing
    told = (value if value and value[0] != "[" else None for value in values)  # [N/A]
    return dict(zip(_ASKED, told, strict=True))
