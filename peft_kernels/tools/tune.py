"""``peft-kernels tune``: measures `lora_linear`'s plans on the present GPU and caches the best.

The plans are in ``peft_kernels/triton/lora_linear/plans.py``. Every measured bucket of
(direction, dtypes, m, n, k, r, dropout, the weight's codes, DoRA's gain) goes into the tune cache,
which later processes on this kind of GPU read.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from peft_kernels.ops._quantize import KINDS, quantize
from peft_kernels.ops._quantized import QuantizedWeight, arguments_of
from peft_kernels.tools import UserError
from peft_kernels.tools.outputs import check_file, unwritable
from peft_kernels.tools.printing import show
from peft_kernels.triton.common import chips, cost
from peft_kernels.triton.dora_linear import launch as dora_launchers
from peft_kernels.triton.lora_linear import launch as launchers
from peft_kernels.triton.lora_linear import plan_cache, plans, tuning
from peft_kernels.triton.lora_linear_codes import launch as codes_launchers
from peft_kernels.triton.lora_linear_codes.launch import kind_of

# Decoding, a short and a long batch: up to 16384 rows any number is within a factor of two of one.
ROWS = (1, 4, 16, 64, 512, 2048, 8192)
RANK = 16
# (n, k) of the layers of 1B to 70B models, or of buckets near them
LAYERS = ((2048, 2048), (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
# (n, k) of a model's layers: query and output, key and value, and those of the FFN
MODELS = {
    "llama-3-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "llama-3-70b": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
    "qwen2.5-7b": ((3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)),
    "bert": ((768, 768), (3072, 768), (768, 3072)),
}
SHAPES = tuple((m, n, k, RANK) for m in ROWS for n, k in LAYERS)
DTYPES: tuple[tuple[torch.dtype, torch.dtype], ...] = (
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
)
# What weights are in: "" is dense. Over codes the border between the plans lies below so many rows.
WEIGHTS: tuple[str, ...] = ("", "nf4", "int8")
ROWS_OVER_CODES = 1024
ROUNDS = 25
CACHE = "the tune cache (PEFT_KERNELS_CACHE)"


class NoGPUError(UserError, RuntimeError):
    """There is no GPU to measure on."""


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of every plan that can serve a problem; ``best`` is the least.

    ``left_out`` says why a plan didn't run, such as that the GPU has no room for its tile.
    """

    problem: plans.Problem
    milliseconds: dict[str, float]
    best: str
    left_out: dict[str, str] = field(default_factory=dict)


def shapes_of(
    shapes: Sequence[tuple[int, int, int]],
    models: Sequence[str],
    ranks: Sequence[int],
) -> list[tuple[int, int, int, int]]:
    """(m, n, k, r) of ``shapes`` (m, n, k), and of the layers of ``models`` by `ROWS` rows.

    Without either, `LAYERS` by `ROWS`.

    Raises:
        UserError: no such model, or a rank below 1.
    """
    if unknown := sorted(set(models) - set(MODELS)):
        raise UserError(f"model must be among {', '.join(MODELS)}; got {', '.join(unknown)}")
    if min(ranks) < 1:
        raise UserError(f"rank must be at least 1; got {min(ranks)}")
    layers = [layer for model in models for layer in MODELS[model]]
    if not shapes and not models:
        layers = list(LAYERS)
    found = [*shapes, *((m, n, k) for m in ROWS for n, k in layers)]
    return [(*shape, r) for shape in dict.fromkeys(found) for r in dict.fromkeys(ranks)]


def tune(
    shapes: Iterable[tuple[int, int, int, int]] = SHAPES,
    dtypes: Iterable[tuple[torch.dtype, torch.dtype]] = DTYPES,
    *,
    weights: Iterable[str] = WEIGHTS,
    dropout_p: float = 0.0,
    dora: bool = False,
    device: torch.device | str | None = None,
    timer: tuning.Timer | None = None,
    console: Console | None = None,
) -> list[Measurement]:
    """Measures every plan at every shape, forward and backward, and writes the tune cache.

    Args:
        shapes: (m, n, k, r) of the layers; each stands for its bucket (`Problem.bucket`).
        dtypes: (dtype of x, dtype of the adapters).
        weights: what the weight is in, ``""`` or a kind of ``ops.quantize``; codes are measured up
            to `ROWS_OVER_CODES` rows.
        dropout_p: dropout has a bucket of its own; give its p to measure that.
        dora: whether `dora_linear`'s forward over a dense weight, which has buckets of its own, is
            measured too; its backward and what it does over codes are `lora_linear`'s.
        device: the GPU, by default the current one.
        timer: milliseconds of a call; by default `tuning.gpu_timer`.
        console: where the table is printed.

    Raises:
        NoGPUError: a RuntimeError; there is no GPU, and no ``timer`` was given.
        UserError: ``dropout_p`` or ``weights`` can't be, or the cache can't be written, which is
            found before anything is measured; or no plan runs at a shape.
    """
    weights = list(weights)
    if not 0 <= dropout_p < 1:
        raise UserError(f"dropout must be at least 0 and below 1; got {dropout_p}")
    if unknown := sorted(set(weights) - {"", *KINDS}):
        known = ", ".join(("dense", *KINDS))
        raise UserError(f"weights must be among {known}; got {', '.join(unknown)}")
    if timer is None:
        timer, device = tuning.gpu_timer, device or _require_gpu()
    device = torch.device(device or "cpu")
    check_file(CACHE, plan_cache.cache_file())
    measurements = []
    for codes, (dtype, adapter_dtype), shape in itertools.product(weights, dtypes, shapes):
        if codes and shape[0] > ROWS_OVER_CODES:
            continue
        found = _measure(shape, dtype, adapter_dtype, codes, dropout_p, dora, device, timer)
        # At once: what was measured stays if this is interrupted, and "scratch" over codes takes
        # the best plan over the dense weight.
        best = {m.problem.bucket(): m.best for m in found}
        try:
            plan_cache.save({plan_cache.device_key(device): best})
        except OSError as error:
            raise unwritable(CACHE, plan_cache.cache_file(), error) from error
        measurements += found
    plans.forget_cache()
    console = console or Console()
    show(console, _table(measurements, device))
    for bucket, plan, why in _left_out(measurements):
        console.print(f"{plan} left out at {bucket}: {why}", soft_wrap=True)
    buckets = {m.problem.bucket() for m in measurements}
    console.print(f"{len(buckets)} buckets written to {plan_cache.cache_file()}", soft_wrap=True)
    return measurements


def _require_gpu() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    build = torch.version.cuda or torch.version.hip
    why = "finds no device" if build else "is built without CUDA and ROCm"
    raise NoGPUError(
        f"tune measures on a GPU, and there is none: torch {torch.__version__} {why}. Without"
        " measurements the plans are chosen by arithmetic."
    )


# ---- measuring -------------------------------------------------------------------------------


def _measure(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    codes: str,
    dropout_p: float,
    dora: bool,
    device: torch.device,
    timer: tuning.Timer,
) -> list[Measurement]:
    """The forward's measurement and the backward's, and that of DoRA's forward."""
    inputs = _inputs(shape, dtype, adapter_dtype, codes, device)
    kind = kind_of(inputs["weight"]) if codes else ""
    found = []
    for measured in _calls(inputs, dropout_p, dora):
        problem = plans.Problem(
            measured.direction, dtype, adapter_dtype, *shape, dropout_p > 0, kind, measured.gain
        )
        with torch.cuda.device_of(inputs["x"]):
            run = functools.partial(_run_by, measured.call)
            able = problem.able(chips.arch_name(device))
            times = tuning.time_plans(able, run, timer, ROUNDS)
        if not times.milliseconds:
            raise UserError(f"no plan runs at {problem.bucket()}: {times.left_out}")
        found.append(Measurement(problem, times.milliseconds, times.best(), times.left_out))
    return found


def _run_by(call: Callable[[], object], plan: str) -> object:
    with plans.force(plan):
        return call()


def _inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    codes: str,
    device: torch.device,
) -> dict[str, Any]:
    op = importlib.import_module("peft_kernels.ops.lora_linear")
    inputs = op.example_inputs(*shape, dtype=dtype, adapter_dtype=adapter_dtype, device=device)
    if codes:
        inputs["weight"] = quantize(inputs["weight"], codes)
    return inputs


class _Measured(NamedTuple):
    """A call whose plans are timed, and what its bucket says of it."""

    direction: str
    gain: bool
    call: Callable[[], object]


def _calls(inputs: dict[str, Any], dropout_p: float, dora: bool) -> list[_Measured]:
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    a, b = inputs["lora_a"], inputs["lora_b"]
    dy = x.new_empty(x.shape[0], b.shape[0]).normal_()
    s = torch.randn(x.shape[0], a.shape[0], device=x.device)
    seed: Tensor | None = torch.tensor(0, device=x.device) if dropout_p else None
    options = 1.0, None, dropout_p, seed
    if isinstance(weight, QuantizedWeight):
        fwd, bwd = codes_launchers.lora_linear_codes, codes_launchers.lora_linear_codes_bwd
        parts = arguments_of(weight)
    else:
        fwd, bwd = launchers.lora_linear_fwd, launchers.lora_linear_bwd
        parts = (weight,)

    def forward() -> object:
        return fwd(x, *parts, bias, a, b, *options)

    def backward() -> object:
        return bwd(dy, x, *parts, a, b, s, *options, True, True, True)

    found = [_Measured("fwd", False, forward), _Measured("bwd", False, backward)]
    if dora and not isinstance(weight, QuantizedWeight):
        gain = torch.ones(b.shape[0], device=x.device)
        with_gain = functools.partial(
            dora_launchers.dora_linear_fwd, x, weight, bias, a, b, gain, *options
        )
        found.append(_Measured("fwd", True, with_gain))
    return found


# ---- what is cached, and the tables ------------------------------------------------------------


def to_document(measurements: Iterable[Measurement]) -> dict[str, Any]:
    """The measurements as JSON can hold them."""
    rows = [
        {
            "bucket": m.problem.bucket(),
            "milliseconds": m.milliseconds,
            "best": m.best,
            "left_out": m.left_out,
        }
        for m in measurements
    ]
    return {"cache": str(plan_cache.cache_file()), "measurements": rows}


def cached() -> dict[str, Any]:
    """The tune cache: its file, and the plan of each bucket by device and versions."""
    return {"cache": str(plan_cache.cache_file()), "plans": plan_cache.load()}


def print_cached(console: Console, found: dict[str, Any]) -> None:
    """Prints what :func:`cached` found."""
    for device, buckets in found["plans"].items():
        table = Table("bucket", "plan", title=device, title_justify="left")
        for bucket, plan in sorted(buckets.items()):
            table.add_row(bucket, plan)
        show(console, table)
    count = sum(map(len, found["plans"].values()))
    rest = "other plans are chosen by arithmetic"
    console.print(f"{count} buckets in {found['cache']}; {rest}", soft_wrap=True)


def _left_out(measurements: list[Measurement]) -> Iterator[tuple[str, str, str]]:
    for measurement in measurements:
        for plan, why in measurement.left_out.items():
            yield measurement.problem.bucket(), plan, why


def _table(measurements: list[Measurement], device: torch.device) -> Table:
    table = Table(title=f"milliseconds on {plan_cache.device_key(device)}")
    table.add_column("bucket")
    shown = plans.ALL_PLANS
    for plan in shown:
        table.add_column(plan, justify="right")
    table.add_column("best")
    table.add_column("default")
    name = chips.arch_name(device)
    for measurement in measurements:
        times = measurement.milliseconds
        table.add_row(
            measurement.problem.bucket(),
            *(f"{times[plan]:.4f}" if plan in times else "" for plan in shown),
            measurement.best,
            plans.default_plan(name, measurement.problem, cost.of_device(name, device)),
        )
    return table
