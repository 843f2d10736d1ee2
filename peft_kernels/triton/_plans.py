"""Which kernels serve a shape, and with which tiles.

A *plan* is one way to compute the op:

``"i"``        S first, then y in one tile; backward: dS and dB, then dx in one tile, and dA
``"ii"``       S and y in one loop over k; forward only, and only up to `IN_LOOP_MAX_RANK`
``"library"``  the library's GEMM, then the low-rank part added in place

`choose` takes the plan that `peft-kernels tune` measured for the device and the shape's bucket, and
without a measurement the one that `default_plan` computes.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

PLANS = ("i", "ii", "library")
IN_LOOP_MAX_RANK = 64
# Ranks are handled in blocks of at most this many; a higher rank loops over blocks.
MAX_BLOCK_R = 64
# Beside a full tile of y or dx, P and Q of this many ranks are what the registers hold.
MAX_TILE_BLOCK_R = 32
MIN_BLOCK_R = 16  # the least depth of a tensor-core product


# ---- tiles -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A kernel's block sizes (0 where it has no such side), warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Arch:
    """A GPU architecture: its datasheet figures and the tiles shipped for it.

    ``cores``: SMs or CUs, which the split-K kernels fill. ``balance``: bf16 FLOP per byte of DRAM
    traffic at which a kernel turns from memory-bound to compute-bound. ``tiles``: by kernel, for
    at most `FEW_ROWS` rows and for more; 16-bit x.
    """

    cores: int
    balance: float
    tiles: dict[str, Tile]


FEW_ROWS = 64

ARCHS: dict[str, Arch] = {
    # A100: 312 TFLOP/s, 2.0 TB/s
    "sm_80": Arch(
        cores=108,
        balance=156,
        tiles={
            "tile_few": Tile(16, 64, 128, 4, 4),
            "tile_many": Tile(128, 128, 64, 8, 3),
            "tile_masked": Tile(128, 128, 32, 8, 3),
            "in_loop_few": Tile(16, 64, 64, 4, 3),
            "in_loop_many": Tile(128, 128, 32, 8, 3),
            "shrink": Tile(128, 0, 32, 8, 3),
            "from_dy": Tile(32, 128, 0, 8, 2),
            "grad_a": Tile(32, 0, 128, 8, 2),
            "add_low_rank": Tile(64, 128, 0, 4, 1),
        },
    ),
    # H100 SXM: 990 TFLOP/s, 3.35 TB/s. wgmma takes 64 rows a warp group.
    "sm_90": Arch(
        cores=132,
        balance=295,
        tiles={
            "tile_few": Tile(64, 64, 128, 4, 4),
            "tile_many": Tile(128, 256, 64, 8, 3),
            "tile_masked": Tile(128, 128, 64, 8, 3),
            "in_loop_few": Tile(64, 32, 64, 4, 4),
            "in_loop_many": Tile(128, 128, 64, 8, 3),
            "shrink": Tile(64, 0, 64, 4, 4),
            "from_dy": Tile(64, 64, 0, 8, 3),
            "grad_a": Tile(64, 0, 128, 8, 3),
            "add_low_rank": Tile(64, 128, 0, 4, 1),
        },
    ),
    # B200: 2250 TFLOP/s, 8 TB/s. tcgen05 takes 64 or 128 rows.
    "sm_100": Arch(
        cores=148,
        balance=281,
        tiles={
            "tile_few": Tile(64, 64, 128, 4, 4),
            "tile_many": Tile(128, 256, 64, 8, 3),
            "tile_masked": Tile(128, 128, 64, 8, 3),
            "in_loop_few": Tile(64, 32, 64, 4, 4),
            "in_loop_many": Tile(128, 128, 64, 8, 3),
            "shrink": Tile(128, 0, 64, 8, 3),
            "from_dy": Tile(64, 64, 0, 8, 2),
            "grad_a": Tile(64, 0, 128, 8, 3),
            "add_low_rank": Tile(128, 128, 0, 8, 1),
        },
    ),
    # MI300X: 1307 TFLOP/s, 5.3 TB/s; 64 KB of LDS.
    "gfx942": Arch(
        cores=304,
        balance=247,
        tiles={
            "tile_few": Tile(16, 64, 128, 4, 2),
            "tile_many": Tile(128, 128, 64, 8, 2),
            "tile_masked": Tile(128, 128, 32, 8, 2),
            "in_loop_few": Tile(16, 64, 32, 4, 2),
            "in_loop_many": Tile(128, 64, 64, 8, 2),
            "shrink": Tile(64, 0, 32, 4, 2),
            "from_dy": Tile(64, 64, 0, 8, 1),
            "grad_a": Tile(32, 0, 128, 8, 1),
            "add_low_rank": Tile(64, 128, 0, 4, 1),
        },
    ),
}
# Any other GPU: within 48 KB of shared memory, the least that a supported chip has.
SAFE = Arch(
    cores=64,
    balance=0,
    tiles={
        "tile_few": Tile(16, 64, 64, 4, 2),
        "tile_many": Tile(64, 64, 32, 4, 2),
        "tile_masked": Tile(64, 64, 32, 4, 2),
        "in_loop_few": Tile(16, 64, 32, 4, 2),
        "in_loop_many": Tile(64, 64, 32, 4, 2),
        "shrink": Tile(32, 0, 32, 4, 2),
        "from_dy": Tile(32, 64, 0, 4, 2),
        "grad_a": Tile(32, 0, 64, 4, 2),
        "add_low_rank": Tile(32, 64, 0, 4, 1),
    },
)
# float32 x, on any GPU: multiplied outside the tensor cores unless TF32 is allowed, so a thread
# holds a small tile.
FLOAT32 = {
    "tile_few": Tile(16, 64, 32, 4, 2),
    "tile_many": Tile(64, 64, 16, 4, 2),
    "tile_masked": Tile(64, 64, 16, 4, 2),
    "in_loop_few": Tile(16, 64, 32, 4, 2),
    "in_loop_many": Tile(64, 64, 16, 4, 2),
    "shrink": Tile(32, 0, 32, 4, 2),
    "from_dy": Tile(16, 64, 0, 4, 2),
    "grad_a": Tile(32, 0, 64, 4, 2),
    "add_low_rank": Tile(32, 64, 0, 4, 1),
}


@functools.cache
def arch_name(device: torch.device) -> str:
    """``"sm_80"``, ``"sm_90"``, ``"sm_100"``, ``"gfx942"``, or ``"other"``."""
    if device.type != "cuda":
        return "other"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "gfx942" if properties.gcnArchName.startswith("gfx942") else "other"
    # sm_86 and sm_89 have less shared memory than sm_80, and sm_120 less than sm_100: "other".
    capability = (properties.major, properties.minor)
    if properties.major == 10:
        return "sm_100"
    return {(8, 0): "sm_80", (9, 0): "sm_90"}.get(capability, "other")


def arch(name: str) -> Arch:
    return ARCHS.get(name, SAFE)


def tile(name: str, kernel: str, dtype: torch.dtype, m: int) -> Tile:
    """The shipped tile of ``kernel`` on the architecture ``name`` for m rows of x."""
    tiles = FLOAT32 if dtype is torch.float32 else arch(name).tiles
    return tiles.get(kernel) or tiles[f"{kernel}_few" if m <= FEW_ROWS else f"{kernel}_many"]


def rank_block(r: int) -> int:
    return min(max(triton.next_power_of_2(r), MIN_BLOCK_R), MAX_BLOCK_R)


# ---- plans -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What a plan is chosen for; ``direction`` is "fwd" or "bwd"."""

    direction: str
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    m: int
    n: int
    k: int
    r: int
    dropout: bool

    def terms(self) -> int:
        return terms(self.dtype, self.adapter_dtype)

    def bucket(self) -> str:
        """The tune cache's key: every size rounded up to a power of two."""
        sizes = " ".join(
            f"{name}{triton.next_power_of_2(max(size, 1))}"
            for name, size in (("m", self.m), ("n", self.n), ("k", self.k), ("r", self.r))
        )
        dtypes = f"{_short(self.dtype)}/{_short(self.adapter_dtype)}"
        return f"{self.direction} {dtypes} {sizes}" + (" dropout" if self.dropout else "")


def terms(dtype: torch.dtype, adapter_dtype: torch.dtype) -> int:
    """Numbers of ``dtype`` that together hold A, B, S or dS to the adapters' precision."""
    return 3 if dtype is torch.bfloat16 and adapter_dtype is torch.float32 else 2


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def gemm_is_competitive(name: str, dtype: torch.dtype, n: int, k: int) -> bool:
    """Whether our GEMM can be expected to match the library's.

    It can't on an architecture without tiles of its own, with float32 x, and with rows that aren't
    a multiple of 16 elements, which Triton loads one by one.
    """
    return name in ARCHS and dtype is not torch.float32 and n % 16 == 0 and k % 16 == 0


def default_plan(name: str, problem: Problem) -> str:
    """The plan without a measurement.

    "library" where our GEMM isn't competitive. Otherwise "i" or, in the forward, "ii" where it is
    cheaper:

    "i" reads x once more: m k b bytes. "ii" multiplies x and A once in each of the T column tiles
    instead: T 2 m k R FLOP, R the rank's block, times the terms of a float32 A beside 16-bit x. So
    "ii" wins while T R 2 / b < balance. With few rows the base waits for the weight and those FLOP
    are free, so "ii" also saves a launch. Under dropout the mask would be drawn T times (some 20
    integer instructions an element), so T must be 1 there.
    """
    if not gemm_is_competitive(name, problem.dtype, problem.n, problem.k):
        return "library"
    if problem.direction == "bwd" or problem.r > IN_LOOP_MAX_RANK:
        return "i"
    columns = triton.cdiv(problem.n, tile(name, "in_loop", problem.dtype, problem.m).n)
    if problem.dropout:
        return "ii" if columns == 1 else "i"
    if problem.m <= FEW_ROWS:
        return "ii"
    terms = 1 if problem.adapter_dtype is problem.dtype else problem.terms()
    flops_per_byte = columns * 2 * rank_block(problem.r) * terms / problem.dtype.itemsize
    return "ii" if flops_per_byte < ARCHS[name].balance else "i"


_forced: str | None = None


@contextmanager
def force(plan: str) -> Iterator[None]:
    """Uses ``plan`` wherever it can serve inside a ``with`` block: for `tune` and the tests."""
    global _forced
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}; got {plan!r}")
    previous, _forced = _forced, plan
    try:
        yield
    finally:
        _forced = previous


def choose(device: torch.device, problem: Problem) -> str:
    """The plan that serves ``problem`` on ``device``."""
    plan = _forced or _chosen(device, problem)
    # Without columns of y no program of "ii" would store S.
    cannot = problem.direction == "bwd" or problem.r > IN_LOOP_MAX_RANK or problem.n == 0
    return "i" if plan == "ii" and cannot else plan


@functools.lru_cache(maxsize=4096)
def _chosen(device: torch.device, problem: Problem) -> str:
    measured = load_cache().get(device_key(device), {}).get(problem.bucket())
    return measured or default_plan(arch_name(device), problem)


# ---- the tune cache --------------------------------------------------------------------------


def cache_file() -> Path:
    """``$PEFT_KERNELS_CACHE/plans.json``, by default in ``~/.cache/peft_kernels``."""
    folder = os.environ.get("PEFT_KERNELS_CACHE") or Path.home() / ".cache" / "peft_kernels"
    return Path(folder) / "plans.json"


@functools.cache
def device_key(device: torch.device) -> str:
    """A measurement holds for one kind of device and one version of torch and Triton."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name} | torch {torch.__version__} | triton {triton.__version__}"


@functools.cache
def load_cache() -> dict[str, dict[str, str]]:
    """The measured plans, ``{device key: {bucket: plan}}``, read once a process."""
    path = cache_file()
    try:
        return _checked(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{path} is not a tune cache ({error}); the default plans are used. Delete it, or"
            " write it anew with `peft-kernels tune`.",
            stacklevel=2,
        )
        return {}


def _checked(content: object) -> dict[str, dict[str, str]]:
    if not isinstance(content, dict):
        raise ValueError("it must hold an object")
    for buckets in content.values():
        if not isinstance(buckets, dict) or not set(map(str, buckets.values())) <= set(PLANS):
            raise ValueError(f"every bucket's plan must be one of {', '.join(PLANS)}")
    return content


def save_cache(measured: dict[str, dict[str, str]]) -> Path:
    """Adds ``measured`` to the cache file in one atomic step, and uses it from now on."""
    path = cache_file()
    merged = {key: dict(buckets) for key, buckets in load_cache().items()}
    for key, buckets in measured.items():
        merged.setdefault(key, {}).update(buckets)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(merged, indent=1, sort_keys=True))
    draft.replace(path)
    forget_cache()
    return path


def forget_cache() -> None:
    """Makes the next `choose` read the cache file again."""
    load_cache.cache_clear()
    _chosen.cache_clear()


# ---- precision -------------------------------------------------------------------------------


def float32_precision() -> str:
    """``input_precision`` of the products of float32 x: TF32 if torch allows it, as `F.linear`."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
