"""GPU architectures: their figures, the tiles shipped for them, and what products they have.

A GPU that isn't among them gets tiles that any supported chip has room for.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from peft_kernels.triton.common.sizes import next_power_of_2

# Ranks are handled in blocks of at most this many; a higher rank loops over blocks.
MAX_BLOCK_R = 64
# Beside a full tile of y or dx, P and Q of this many ranks are what the registers hold.
MAX_TILE_BLOCK_R = 32
# In terms they are four times as many columns.
MAX_TERMS_BLOCK_R = 32
# Tensor cores that take operands from shared memory alone: where a program makes one, it waits for
# each product. The ranks up to which a kernel has registers for a float32 operand's terms in one.
STAGED = ("sm_90", "sm_100")
JOINED = {"shrink": 32, "in_loop": 16, "from_dy": 16, "grad_a": 32}
# Chips with programmatic dependent launch, which compute capability 9.0 began.
DEPENDENT = ("sm_90", "sm_100", "sm_120")
MIN_BLOCK_R = 16  # the least depth of a tensor-core product


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

    ``cores``: SMs or CUs, where no device is asked. ``shared``: bytes of shared memory that a
    program may use, within which all tiles of the architecture are. ``balance``: bf16 FLOP per byte
    of DRAM traffic at which a kernel turns from memory-bound to compute-bound. ``tiles``: by
    kernel, for at most `FEW_ROWS` rows and for more; 16-bit x.
    """

    cores: int
    shared: int
    balance: float
    tiles: dict[str, Tile]


FEW_ROWS = 64
# GPUs before Ampere, whose tensor cores Triton has no instructions of: a product is fused
# multiply-adds in float32, whatever x's dtype.
NO_TENSOR_CORES = "sm_75"
WIDENED = "widened"  # the PRECISION of their products

ARCHS: dict[str, Arch] = {
    # A100: 312 TFLOP/s, 2.0 TB/s
    "sm_80": Arch(
        cores=108,
        shared=163 * 1024,
        balance=156,
        tiles={
            "tile_few": Tile(16, 64, 128, 4, 4),
            "tile_many": Tile(128, 128, 64, 8, 3),
            "tile_masked": Tile(128, 128, 32, 8, 3),
            "in_loop_few": Tile(16, 64, 64, 4, 3),
            "in_loop_many": Tile(128, 128, 32, 8, 3),
            "codes_few": Tile(16, 64, 64, 4, 3),
            "codes_many": Tile(64, 64, 64, 4, 3),
            "shrink": Tile(128, 0, 32, 8, 3),
            "from_dy": Tile(32, 128, 0, 8, 2),
            "grad_a": Tile(32, 0, 128, 8, 3),
            "add_low_rank": Tile(64, 128, 0, 4, 1),
        },
    ),
    # RTX 3090: 71 TFLOP/s, 0.94 TB/s; 99 KB of shared memory, as sm_89 and sm_120.
    "sm_86": Arch(
        cores=82,
        shared=99 * 1024,
        balance=76,
        tiles={
            "tile_few": Tile(16, 64, 128, 4, 4),
            "tile_many": Tile(128, 128, 64, 8, 3),
            "tile_masked": Tile(128, 128, 32, 8, 3),
            "in_loop_few": Tile(16, 64, 64, 4, 3),
            "in_loop_many": Tile(128, 64, 32, 8, 3),
            "codes_few": Tile(16, 64, 64, 4, 3),
            "codes_many": Tile(64, 64, 64, 4, 3),
            "shrink": Tile(128, 0, 32, 8, 3),
            "from_dy": Tile(32, 128, 0, 8, 2),
            "grad_a": Tile(32, 0, 128, 8, 2),
            "add_low_rank": Tile(64, 128, 0, 4, 1),
        },
    ),
    # H100 SXM: 990 TFLOP/s, 3.35 TB/s. wgmma takes 64 rows a warp group.
    "sm_90": Arch(
        cores=132,
        shared=227 * 1024,
        balance=295,
        tiles={
            "tile_few": Tile(64, 64, 128, 4, 4),
            "tile_many": Tile(128, 256, 64, 8, 3),
            "tile_masked": Tile(128, 128, 64, 8, 3),
            "in_loop_few": Tile(64, 32, 64, 4, 4),
            "in_loop_many": Tile(128, 128, 64, 8, 3),
            "codes_few": Tile(64, 64, 64, 4, 3),
            "codes_many": Tile(128, 128, 64, 8, 3),
            "shrink": Tile(64, 0, 64, 4, 4),
            "from_dy": Tile(64, 64, 0, 8, 3),
            "grad_a": Tile(64, 0, 128, 8, 3),
            "add_low_rank": Tile(64, 128, 0, 4, 1),
        },
    ),
    # B200: 2250 TFLOP/s, 8 TB/s. tcgen05 takes 64 or 128 rows.
    "sm_100": Arch(
        cores=148,
        shared=227 * 1024,
        balance=281,
        tiles={
            "tile_few": Tile(64, 64, 128, 4, 4),
            "tile_many": Tile(128, 256, 64, 8, 3),
            "tile_masked": Tile(128, 128, 64, 8, 3),
            "in_loop_few": Tile(64, 32, 64, 4, 4),
            "in_loop_many": Tile(128, 128, 64, 8, 3),
            "codes_few": Tile(64, 64, 64, 4, 3),
            "codes_many": Tile(128, 128, 64, 8, 3),
            "shrink": Tile(128, 0, 64, 8, 3),
            "from_dy": Tile(64, 64, 0, 8, 2),
            "grad_a": Tile(64, 0, 128, 8, 3),
            "add_low_rank": Tile(128, 128, 0, 8, 1),
        },
    ),
    # A die of an MI250X: 192 TFLOP/s, 1.64 TB/s; 64 KB of LDS.
    "gfx90a": Arch(
        cores=110,
        shared=64 * 1024,
        balance=117,
        tiles={
            "tile_few": Tile(16, 64, 128, 4, 2),
            "tile_many": Tile(128, 128, 64, 8, 2),
            "tile_masked": Tile(128, 128, 32, 8, 2),
            "in_loop_few": Tile(16, 64, 32, 4, 2),
            "in_loop_many": Tile(128, 64, 32, 8, 2),
            "codes_few": Tile(16, 64, 64, 4, 2),
            "codes_many": Tile(64, 64, 64, 4, 2),
            "shrink": Tile(64, 0, 32, 4, 2),
            "from_dy": Tile(32, 64, 0, 4, 1),
            "grad_a": Tile(32, 0, 128, 8, 1),
            "add_low_rank": Tile(64, 128, 0, 4, 1),
        },
    ),
    # MI300X: 1307 TFLOP/s, 5.3 TB/s; 64 KB of LDS.
    "gfx942": Arch(
        cores=304,
        shared=64 * 1024,
        balance=247,
        tiles={
            "tile_few": Tile(16, 64, 128, 4, 2),
            "tile_many": Tile(128, 128, 64, 8, 2),
            "tile_masked": Tile(128, 128, 32, 8, 2),
            "in_loop_few": Tile(16, 64, 32, 4, 2),
            "in_loop_many": Tile(128, 64, 64, 8, 2),
            "codes_few": Tile(16, 64, 64, 4, 2),
            "codes_many": Tile(64, 64, 64, 4, 2),
            "shrink": Tile(64, 0, 32, 4, 2),
            "from_dy": Tile(64, 64, 0, 8, 1),
            "grad_a": Tile(32, 0, 128, 8, 1),
            "add_low_rank": Tile(64, 128, 0, 4, 1),
        },
    ),
}
# RTX 4090: 165 TFLOP/s, 1.01 TB/s.
ARCHS["sm_89"] = replace(ARCHS["sm_86"], cores=128, balance=164)
# RTX 5090: 210 TFLOP/s, 1.79 TB/s. In other tiles its compiler spills an A in terms.
ARCHS["sm_120"] = replace(
    ARCHS["sm_86"],
    cores=170,
    balance=117,
    tiles=ARCHS["sm_86"].tiles | {"shrink": Tile(64, 0, 32, 8, 3)},
)
# MI355X: 2517 TFLOP/s, 8 TB/s; 160 KB of LDS.
ARCHS["gfx950"] = replace(ARCHS["gfx942"], cores=256, shared=160 * 1024, balance=314)
# Any other GPU: within 48 KB of shared memory, the least that a supported chip has.
SAFE = Arch(
    cores=64,
    shared=48 * 1024,
    balance=0,
    tiles={
        "tile_few": Tile(16, 64, 64, 4, 2),
        "tile_many": Tile(64, 64, 32, 4, 2),
        "tile_masked": Tile(64, 64, 32, 4, 2),
        "in_loop_few": Tile(16, 64, 32, 4, 2),
        "in_loop_many": Tile(64, 64, 32, 4, 2),
        "codes_few": Tile(16, 64, 64, 4, 2),
        "codes_many": Tile(64, 64, 32, 4, 2),
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
    "codes_few": Tile(16, 64, 32, 4, 2),
    "codes_many": Tile(32, 64, 32, 8, 2),
    "shrink": Tile(32, 0, 32, 4, 2),
    "from_dy": Tile(16, 64, 0, 4, 2),
    "grad_a": Tile(32, 0, 64, 8, 2),
    "add_low_rank": Tile(32, 64, 0, 4, 1),
}
# T4: 65 TFLOP/s in float16, 0.32 TB/s. Any x is multiplied as float32 x is, and widening it takes
# registers. Of its 64 KB of shared memory as much as those before it have.
ARCHS[NO_TENSOR_CORES] = Arch(
    cores=40,
    shared=48 * 1024,
    balance=203,
    tiles=FLOAT32 | {"shrink": Tile(32, 0, 32, 8, 2), "from_dy": Tile(16, 64, 0, 8, 2)},
)


@functools.cache
def arch_name(device: torch.device) -> str:
    """The name in `ARCHS` of the device's tiles, or ``"other"``.

    That of its architecture, or of the one whose code its family runs. ``"other"`` as well where a
    program has less shared memory than the architecture's tiles were compiled for.
    """
    if device.type != "cuda":
        return "other"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.partition(":")[0]
    elif properties.major < 8:
        name = NO_TENSOR_CORES
    else:
        minor = 0 if properties.major >= 10 else properties.minor
        name = f"sm_{properties.major}{minor}"
    has_room = name in ARCHS and _shared_memory(properties) >= ARCHS[name].shared
    return name if has_room else "other"


def _shared_memory(properties: Any) -> float:
    """Bytes that a program may use; ROCm builds of torch know one of the two figures, or none."""
    names = ("shared_memory_per_block_optin", "shared_memory_per_block")
    return max((getattr(properties, name, 0) for name in names), default=0) or math.inf


def cores(device: torch.device) -> int:
    """Its SMs or CUs, which the split-K kernels fill; the datasheet's where there is no GPU.

    A chip is sold with more of them and fewer, and MIG gives a part of them.
    """
    return _cores(device) if device.type == "cuda" else arch(arch_name(device)).cores


@functools.cache
def _cores(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def arch(name: str) -> Arch:
    return ARCHS.get(name, SAFE)


def tile(name: str, kernel: str, dtype: torch.dtype, m: int) -> Tile:
    """The shipped tile of ``kernel`` on the architecture ``name`` for m rows of x."""
    tiles = FLOAT32 if dtype is torch.float32 else arch(name).tiles
    return tiles.get(kernel) or tiles[f"{kernel}_few" if m <= FEW_ROWS else f"{kernel}_many"]


def rank_block(r: int) -> int:
    return min(max(next_power_of_2(r), MIN_BLOCK_R), MAX_BLOCK_R)


def gemm_is_competitive(name: str, dtype: torch.dtype, n: int, k: int) -> bool:
    """Whether our GEMM can be expected to match the library's.

    It can't on an architecture without tiles of its own or without tensor cores, with float32 x,
    and with rows that aren't a multiple of 16 elements, which Triton loads one by one.
    """
    if name not in ARCHS or name == NO_TENSOR_CORES or dtype is torch.float32:
        return False
    return n % 16 == 0 and k % 16 == 0


def terms(dtype: torch.dtype, adapter_dtype: torch.dtype) -> int:
    """Numbers of ``dtype`` that together hold A, B, S or dS to the adapters' precision."""
    return 3 if dtype is torch.bfloat16 and adapter_dtype is torch.float32 else 2


def slots(terms: int) -> int:
    """How many terms an operand has room for beside each other: a power of two."""
    return next_power_of_2(terms)


def joined_slots(name: str, kernel: str, dtype: torch.dtype, terms: int, block_r: int) -> int:
    """In how many slots ``kernel`` joins the ``terms`` of a float32 operand; 1: it doesn't.

    float16's terms are scaled by tile, one after the other.
    """
    joins = name in STAGED and dtype is torch.bfloat16 and block_r <= JOINED[kernel]
    return slots(terms) if joins else 1


def float32_precision(device: torch.device) -> str:
    """``input_precision`` of the products of float32 x: TF32 if torch allows it, as `F.linear`.

    And if Triton has it on ``device``; else it refuses the kernel, whatever x's dtype. `WIDENED`
    where there are no tensor cores.
    """
    if arch_name(device) == NO_TENSOR_CORES:
        return WIDENED
    # What torch.backends.cuda.matmul.fp32_precision reads, which is slow to say so.
    allowed = torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32"
    return "tf32" if allowed and _has_tf32(device) else "ieee"


def precision(device: torch.device, dtype: torch.dtype, beside: str = "ieee") -> str:
    """``PRECISION`` of an op's products; ``beside``: of float32 tiles beside a 16-bit x."""
    found = float32_precision(device)
    return found if dtype is torch.float32 or found == WIDENED else beside


@functools.cache
def _has_tf32(device: torch.device) -> bool:
    """Of AMD's GPUs only some have it: Triton's own list says which."""
    if device.type != "cuda" or not torch.version.hip:
        return True
    name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    backend = make_backend(GPUTarget("hip", name, 64))
    return "tf32" in backend.parse_options({}).allowed_dot_input_precisions
