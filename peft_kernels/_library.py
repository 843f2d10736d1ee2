"""The one ``torch.library.Library`` of the package, and the choice of backend.

Every op is defined here under up to four names with one schema:

``peft_kernels::<op>``
    dispatched by key: the reference is its default (CompositeExplicitAutograd) kernel, the native
    library registers the CPU key, and what serves a GPU the CUDA key (ROCm builds of torch use it
    as well): the native library's CUDA kernels where they run, else Triton's, else the reference.
``peft_kernels::<op>_ref`` and ``peft_kernels::<op>_triton``
    the reference, and Triton, whatever the device: what a forced backend calls.
``peft_kernels::<op>_cuda``
    the native library's CUDA kernels.

An op without Triton or CUDA kernels lacks that name.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from peft_kernels import _cuda_kernels

NAMESPACE = "peft_kernels"
BACKENDS = ("auto", "reference", "triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None
NATIVE_LIBRARY = Path(__file__).with_name("_native.so")
_NO_NATIVE = Path(__file__).with_name("_no_native.txt")  # why it was not built, left by setup.py

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
OPS: list[str] = []  # the public names of the ops defined so far
_WITHOUT_TRITON: set[str] = set()


def define(
    op: str,
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    triton: str | None,
    cuda: bool = False,
) -> None:
    """Defines ``op`` with its reference, its shape function and its Triton launcher, if it has one.

    ``triton`` names the launcher as ``module:function``; that module is imported at the first call,
    so importing the package never imports Triton. ``cuda`` says that the native library has CUDA
    kernels of it.
    """
    reference = outside_autocast(reference)
    defaults = {op: reference, op + "_ref": reference}
    launcher = None
    if triton is None:
        _WITHOUT_TRITON.add(op)
    elif HAS_TRITON:
        launcher = outside_autocast(_imported_at_first_call(triton))
        defaults[op + "_triton"] = _on_a_gpu_or_interpreted(launcher)
    for name, kernel in defaults.items():
        LIBRARY.define(name + schema)
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        LIBRARY.impl(name, fake, "Meta")
    if cuda:
        LIBRARY.define(f"{op}_cuda{schema}")
    if launcher is not None or cuda:
        LIBRARY.impl(op, _on_a_gpu(op, cuda, launcher or reference), "CUDA")
    if op.endswith("_fwd"):
        OPS.append(op.removesuffix("_fwd"))


def launcher_of(target: str) -> Callable:
    """A Triton launcher that is no op's, by its name as in :func:`define`.

    Its first argument is a tensor where it runs; it does nothing that autocast would change.
    """
    return _on_a_gpu_or_interpreted(_imported_at_first_call(target))


def _imported_at_first_call(target: str) -> Callable:
    module, function = target.split(":")

    @functools.cache
    def resolve() -> Callable:
        return getattr(importlib.import_module(module), function)

    return lambda *args: resolve()(*args)


def _on_a_gpu(op: str, has_cuda: bool, otherwise: Callable) -> Callable:
    if not has_cuda:
        return otherwise

    def run(*args):
        if _cuda_kernels.why_not(args[0].device) is None:
            return get_op(op, "_cuda")(*args)
        return otherwise(*args)

    return run


def _on_a_gpu_or_interpreted(launcher: Callable) -> Callable:
    """Refuses tensors on a CPU where Triton compiles, of which its message wouldn't say a word."""

    def run(*args):
        if args[0].device.type == "cpu" and not _interprets():
            raise RuntimeError(
                "backend 'triton' runs tensors on a CPU only under Triton's interpreter, and"
                " these are on a CPU. Move them to a GPU, start Python with TRITON_INTERPRET=1,"
                " or use backend 'auto'"
            )
        return launcher(*args)

    return run


@functools.cache
def _interprets() -> bool:
    """Whether Triton's kernels were imported under its interpreter, and so can't be compiled."""
    return importlib.import_module("peft_kernels.triton.common.blocks").INTERPRET.value


def outside_autocast(kernel: Callable) -> Callable:
    """Runs ``kernel`` with autocast off: an op's dtypes are settled before it is dispatched."""

    @functools.wraps(kernel)
    def run(*args):
        if not torch._C._is_any_autocast_enabled():  # of no device: the cheapest to ask
            return kernel(*args)
        device = args[0].device.type
        if args[0].is_meta or not torch.is_autocast_enabled(device):
            return kernel(*args)
        with torch.autocast(device, enabled=False):
            return kernel(*args)

    return run


def _setting(variable: str, default: str) -> str:
    """What an environment variable says; an empty one says as little as none."""
    return os.environ.get(variable) or default


def load_native() -> None:
    """Loads the C++ library, if it was built; its kernels register themselves.

    It lies beside this file. ``PEFT_KERNELS_NATIVE`` is ``0`` for none, or another one's path.
    Where there is none, and neither this variable nor the one who installed the package says that
    this is meant, a RuntimeWarning says so.

    Raises:
        OSError: the library, or the file that ``PEFT_KERNELS_NATIVE`` names, can't be loaded.
        ValueError: ``PEFT_KERNELS_NATIVE`` is none of those.
    """
    setting = _setting("PEFT_KERNELS_NATIVE", "1")
    if setting == "0":
        return
    if setting != "1" and not Path(setting).is_file():
        raise ValueError(
            "PEFT_KERNELS_NATIVE must be 0 for no native library, 1 for the package's own, or"
            f" another one's path; got {setting!r}, which is no file"
        )
    library = str(NATIVE_LIBRARY) if setting == "1" else setting
    if setting == "1" and not NATIVE_LIBRARY.exists():
        _warn_of_no_native()
        return
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise OSError(
            f"peft_kernels' native library can't be loaded: {error}. Build it again (it needs"
            " torch >= 2.13), or set PEFT_KERNELS_NATIVE=0 to run on PyTorch alone"
        ) from error


def why_no_native() -> str:
    """Why the native library isn't there, where it isn't."""
    if _setting("PEFT_KERNELS_NATIVE", "1") == "0":
        return "PEFT_KERNELS_NATIVE=0 is set"
    if _NO_NATIVE.exists():
        return f"it was not built, because {_NO_NATIVE.read_text().strip()}"
    return "it was not built"


def _warn_of_no_native() -> None:
    reason = why_no_native()
    if "PEFT_KERNELS_NATIVE=0" in reason or _forced == "reference":
        return
    warnings.warn(
        f"peft_kernels has no native library: {reason}. On a CPU every op runs on the reference,"
        " which is plain PyTorch and slower. Install the package again where there are a C++"
        " compiler, CMake and ninja, or set PEFT_KERNELS_NATIVE=0 to be without it and this"
        " warning.",
        RuntimeWarning,
        stacklevel=3,
    )


def _checked_backend(name: str, what: str = "backend") -> str:
    if name not in BACKENDS:
        raise ValueError(f"{what} must be one of {', '.join(BACKENDS)}; got {name!r}")
    if name == "triton" and not HAS_TRITON:
        raise ValueError(f"{what} 'triton' needs the triton package, which is not installed")
    return name


_forced = _checked_backend(_setting("PEFT_KERNELS_BACKEND", "auto"), "PEFT_KERNELS_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Forces a backend inside a ``with`` block, for the whole process.

    ``"auto"`` dispatches by device, ``"reference"`` is pure PyTorch on any device, ``"triton"``
    runs the Triton kernels on any device (on a CPU only under ``TRITON_INTERPRET=1``); an op that
    has none is dispatched by device then, and a call that no kernel has room for is the
    reference's. A backward uses the backend of its forward.
    ``PEFT_KERNELS_BACKEND`` sets the same for a whole process.

    Raises:
        ValueError: the name is unknown, or Triton is not installed.
    """
    global _forced
    previous, _forced = _forced, _checked_backend(name)
    try:
        yield
    finally:
        _forced = previous


def variant(dtype: torch.dtype) -> str:
    """The suffix of the op's name that serves tensors of ``dtype`` under the backend in force."""
    if _forced == "reference" or dtype is torch.float64:
        return "_ref"
    return "_triton" if _forced == "triton" else ""


def get_op(name: str, suffix: str) -> Callable:
    """``torch.ops.peft_kernels.<name><suffix>.default``, or what serves in its place."""
    if suffix == "_triton" and name in _WITHOUT_TRITON:
        suffix = ""
    return getattr(torch.ops.peft_kernels, name + suffix).default


def backend_of(op: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend that would run ``op``: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``.

    Args:
        op: the op's public name, e.g. ``"lora_linear"``.
        device: where its tensors would be.
        dtype: the dtype of its input. float64 is always served by the reference.

    Raises:
        ValueError: there is no such op.
    """
    if not _is_defined(f"{op}_fwd"):
        raise ValueError(f"op must be one that peft_kernels defines; got {op!r}")
    suffix = variant(dtype)
    if suffix == "_ref":
        return "reference"
    if suffix == "_triton" and f"{op}_fwd" not in _WITHOUT_TRITON:
        return "triton"
    device = torch.device(device)
    return _on_cpu(op) if device.type == "cpu" else _on_gpu(op, device)


def _on_cpu(op: str) -> str:
    qualified = f"{NAMESPACE}::{op}_fwd"
    present = torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CPU")
    return "cpu" if present else "reference"


def _on_gpu(op: str, device: torch.device) -> str:
    if _is_defined(f"{op}_fwd_cuda") and _cuda_kernels.why_not(device) is None:
        return "cuda"
    return "triton" if _is_defined(f"{op}_fwd_triton") else "reference"


def _is_defined(name: str) -> bool:
    return hasattr(getattr(torch.ops, NAMESPACE), name)
