"""``peft-kernels doctor``: what is installed here, and which backend serves each op and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table

import peft_kernels
from peft_kernels import _cuda_kernels
from peft_kernels._library import HAS_TRITON, NATIVE_LIBRARY, OPS, backend_of, why_no_native
from peft_kernels.tools.printing import show

PACKAGES = ("triton", "peft", "transformers", "loralib")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def doctor(console: Console) -> None:
    """Prints both tables."""
    table = Table("what", "found", title="This machine", title_justify="left", show_header=False)
    for name, value in machine():
        table.add_row(name, value)
    show(console, table)
    show(console, backend_table())


def facts() -> dict[str, object]:
    """What :func:`doctor` prints, as JSON can hold it."""
    columns = ("op", "device", "dtype", "backend", "why")
    rows = [dict(zip(columns, row, strict=True)) for op in OPS for row in backends(op)]
    return {"machine": dict(machine()), "backends": rows}


def machine() -> Iterator[tuple[str, str]]:
    """Versions and hardware, as (name, value)."""
    yield "peft_kernels", peft_kernels.__version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", torch.__version__  # with the build, which the installed metadata may lack
    for package in PACKAGES:
        yield package, _version(package)
    yield "CPU", torch.backends.cpu.get_cpu_capability()
    yield "threads", f"{torch.get_num_threads()} (torch.set_num_threads changes it)"
    yield "GPU", _gpu()
    yield "native library", _native()
    yield "its CUDA kernels", _cuda()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "none found" if built else "none: this torch is built for the CPU alone"
    return ", ".join(map(_chip, range(torch.cuda.device_count())))


def _chip(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return f"{properties.name} ({properties.gcnArchName.split(':')[0]})"
    return f"{properties.name} (sm_{properties.major}{properties.minor})"


def native_info() -> str | None:
    """What the native library says of itself: its instruction set. None if it isn't loaded."""
    if not hasattr(torch.ops.peft_kernels, "native_info"):
        return None
    return torch.ops.peft_kernels.native_info()


def _native() -> str:
    return native_info() or f"not loaded: {_why_no_native()}"


def _cuda() -> str:
    """What the CUDA kernels' probe of each GPU found."""
    if native_info() is None or not _cuda_kernels.are_built():
        return "not built"
    if not torch.cuda.is_available():
        return "built; there is no GPU to run them"
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return "; ".join(f"{d}: {_cuda_kernels.why_not(d) or 'they run'}" for d in devices)


def _why_no_native() -> str:
    if NATIVE_LIBRARY.exists() and os.environ.get("PEFT_KERNELS_NATIVE", "1") != "0":
        return "it has no native_info; build it again"
    reason = why_no_native()
    if "PEFT_KERNELS_NATIVE=0" in reason:
        return reason
    return f"{reason}; that needs CMake, ninja and a C++ compiler"


# ---- backends --------------------------------------------------------------------------------


def backend_table() -> Table:
    """A row for every op, device and dtype."""
    table = Table(title="Which backend runs", title_justify="left")
    for column in ("op", "device", "dtype", "backend", "why"):
        table.add_column(column)
    for op in OPS:
        for row in backends(op):
            table.add_row(*row)
        table.add_section()
    return table


def backends(op: str) -> Iterator[tuple[str, str, str, str, str]]:
    """What runs on each device and dtype, as (op, device, dtype, backend, why)."""
    for device in ("cpu", "cuda"):
        for dtype in DTYPES:
            backend = backend_of(op, device, dtype)
            why = _why(op, backend, device, dtype)
            yield op, device, str(dtype).removeprefix("torch."), backend, why


_KERNELS = {"cpu": "native library", "cuda": "its CUDA kernels", "triton": "Triton kernels"}


def _why(op: str, backend: str, device: str, dtype: torch.dtype) -> str:
    reason = _why_backend(op, backend, device, dtype)
    return reason + (", once there is a GPU" if _is_absent(device) else "")


def _is_absent(device: str) -> bool:
    return device == "cuda" and not torch.cuda.is_available()


def _why_backend(op: str, backend: str, device: str, dtype: torch.dtype) -> str:
    forced = os.environ.get("PEFT_KERNELS_BACKEND", "auto")
    if dtype is torch.float64:
        return "float64 is served by the reference"
    if forced == backend:
        return f"PEFT_KERNELS_BACKEND={forced} is set"
    if backend == "reference":
        return _why_reference(device)
    if device == "cuda" and backend == "triton":
        return _why_triton(op, dtype)
    return _KERNELS[backend]


def _why_triton(op: str, dtype: torch.dtype) -> str:
    reason = _KERNELS["triton"]
    if dtype is not torch.float32 and _multiplies_in_float32():
        reason += " (in float32: it has no instructions of this GPU's tensor cores)"
    if has_cuda_kernels(op):
        reason += f": {_cuda_kernels.why_not(torch.device('cuda'))}"
    return reason


def _multiplies_in_float32() -> bool:
    """Whether the Triton kernels do so with any x on the current GPU."""
    if not torch.cuda.is_available():
        return False
    from peft_kernels.triton.common import chips

    device = torch.device("cuda", torch.cuda.current_device())
    return chips.arch_name(device) == chips.NO_TENSOR_CORES


def _why_reference(device: str) -> str:
    if device == "cuda" and not HAS_TRITON:
        return "triton is not installed"
    if native_info() is None:
        return f"the native library is not loaded: {_why_no_native()}"
    return f"{_cuda_kernels.why_not(torch.device(device))}"


def has_cuda_kernels(op: str) -> bool:
    """Whether the native library's CUDA kernels serve it, where they run."""
    return hasattr(torch.ops.peft_kernels, f"{op}_fwd_cuda")
