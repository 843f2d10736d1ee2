"""A product's time on paper: whether a tile, and a sum over k in parts, fill a chip's cores.

    out = a w,  a [m, k], w [k, n],  programs = ceil(m / BLOCK_M) ceil(n / BLOCK_N) splits

A program's time is the longest of three: its products on the core's tensor cores, its operands
through the core's port to L2, and its even share of DRAM's traffic at the most that one core draws.
Waves of programs follow each other, and all of them together wait for DRAM at the least. Where the
sum over k is split, the parts [splits, m, n] are written in float32, and a launch adds them up. It
reads them from L2 where they take no more than half of that.

Where tensor cores take operands from shared memory alone, a product of a tile that was made in
registers, as a float32 one is cut into bfloat16's, stops its program: the tile is stored, the
threads meet, and wait for the product. Other programs of the core go on meanwhile.

Everything here is modelled, from seven assumptions and the figures of the device, or of a datasheet
where there is none. None of it was measured.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from peft_kernels.triton.common import chips
from peft_kernels.triton.common.chips import Tile
from peft_kernels.triton.common.sizes import cdiv

# Seconds that a launch takes besides its work: the gap to the one before, the first loads, the last
# stores. Assumed.
LAUNCH = 2e-6
# Of that, what passes while the launch before still runs, where the two overlap (``dependent.py``):
# the gap and the first loads. Assumed. Their work is counted as if it didn't overlap, for both
# draw on the same cores and memory.
OVERLAP = 1e-6
# Of the datasheet's FLOP/s, what our loop is expected to reach where nothing else binds. Assumed.
REACHED = 0.8
# Even shares of DRAM's bandwidth that one core draws alone: half of the cores draw all. Assumed.
SHARES = 2
# Bytes a clock from L2 into one core. An A100's 108 SMs share 5,120 (its whitepaper), the 38 CUs of
# an MI300X's die 2,048 (CDNA 3's): 47 and 54. Other chips are taken for the same.
PORT = 48
# Clocks of such a stop, and the warps that a core has registers for. Assumed.
STOP = 200
WARPS = 16


@dataclass(frozen=True)
class Chip:
    """A chip's figures: SMs or CUs, dense bfloat16 FLOP/s with float32 sums, DRAM bytes/s, Hz.

    The clock is the one that the FLOP/s are for. ``shared``: bytes of shared memory a core, where
    tensor cores take their operands from nowhere else. ``l2``: bytes of the cache that all share.
    ``dependent``: launches of a call may overlap. ``ours``: FLOP/s of our products where Triton has
    no instructions of the tensor cores.
    """

    cores: int
    flops: float
    bandwidth: float
    clock: float
    shared: int = 0
    l2: int = 0
    dependent: bool = False
    ours: float = 0.0

    def second_launch(self) -> float:
        """Seconds that a launch takes besides its work, if it may overlap with the one before."""
        return LAUNCH - OVERLAP if self.dependent else LAUNCH


# The chip of its architecture that most figures are known of: what is taken where no device is
# asked. Of an MI300X and an MI355X the cache that all share is the last before DRAM.
CHIPS = {
    "sm_75": Chip(40, 65e12, 0.32e12, 1.59e9, l2=4 << 20, ours=8.1e12),  # T4, float16
    "sm_80": Chip(108, 312e12, 2.04e12, 1.41e9, l2=40 << 20),  # A100 SXM 80 GB
    "sm_86": Chip(82, 71e12, 0.936e12, 1.70e9, l2=6 << 20),  # RTX 3090
    "sm_89": Chip(128, 165e12, 1.01e12, 2.52e9, l2=72 << 20),  # RTX 4090
    "sm_90": Chip(132, 989e12, 3.35e12, 1.83e9, 228 << 10, 50 << 20, True),  # H100 SXM
    "sm_100": Chip(148, 2250e12, 8.0e12, 1.85e9, 228 << 10, 126 << 20, True),  # B200
    "sm_120": Chip(170, 210e12, 1.79e12, 2.41e9, l2=96 << 20, dependent=True),  # RTX 5090
    "gfx90a": Chip(110, 192e12, 1.64e12, 1.7e9, l2=8 << 20),  # one die of an MI250X
    "gfx942": Chip(304, 1307e12, 5.3e12, 2.1e9, l2=256 << 20),  # MI300X
    "gfx950": Chip(256, 2517e12, 8.0e12, 2.4e9, l2=256 << 20),  # MI355X
}


def of_device(name: str, device: torch.device) -> Chip | None:
    """The figures of ``device``, whose architecture is ``name``; None where none are known.

    Those of `CHIPS` where it isn't a GPU, and each that the driver doesn't tell.
    """
    return _of_device(name, device) if device.type == "cuda" else CHIPS.get(name)


@functools.cache
def _of_device(name: str, device: torch.device) -> Chip | None:
    """Cores of the architecture multiply as many numbers a clock in every chip.

    A device's clock is the highest that it has, which a chip full of products doesn't hold: the
    datasheet's is the most that is counted on. GDDR and HBM move two numbers a clock; what AMD's
    driver calls a clock differs from chip to chip, and the caches that it knows aren't the last, so
    that their datasheets are taken.
    """
    known = CHIPS.get(name)
    if known is None:
        return None
    told = torch.cuda.get_device_properties(device)

    def figure(name: str) -> int:
        return getattr(told, name, 0)

    cores = chips.cores(device)
    clock = min(1e3 * figure("clock_rate") or known.clock, known.clock)
    bandwidth, l2 = known.bandwidth, known.l2
    if not torch.version.hip:
        bits = 2 * 1e3 * figure("memory_clock_rate") * figure("memory_bus_width")
        bandwidth, l2 = bits / 8 or bandwidth, figure("L2_cache_size") or l2
    share = (cores / known.cores) * (clock / known.clock)
    flops, ours = known.flops * share, known.ours * share
    return Chip(cores, flops, bandwidth, clock, known.shared, l2, known.dependent, ours)


@dataclass(frozen=True)
class Product:
    """out [m, n] = a [m, k] w [k, n] in numbers of 16 bits.

    ``ranks``: columns of a second product that every tile makes of its rows and the same k, from
    numbers of ``rank_bytes`` multiplied ``terms`` times, with ``stops`` of a block of k each.
    """

    m: int
    n: int
    k: int
    ranks: int = 0
    rank_bytes: int = 2
    terms: int = 1
    stops: int = 0

    def flops(self) -> int:
        """With the second product once."""
        return 2 * self.m * (self.n + self.ranks) * self.k

    def bytes_read(self) -> int:
        return 2 * (self.m + self.n) * self.k + self.rank_bytes * self.ranks * self.k

    def bytes_written(self) -> int:
        return 2 * self.m * self.n

    def roofline(self, chip: Chip) -> float:
        """Seconds that no way to compute it goes below, besides its launch."""
        moved = self.bytes_read() + self.bytes_written()
        return max(self.flops() / chip.flops, moved / chip.bandwidth)


def seconds(chip: Chip, product: Product, tile: Tile, splits: int = 1) -> float:
    """The modelled time of ``product`` in tiles of ``tile``, its launches included."""
    time = LAUNCH + max(waits(chip, product, tile, splits).values())
    if splits > 1:
        parts = _parts(product, splits)
        time += reread_seconds(chip, parts) + product.bytes_written() / chip.bandwidth
        time += chip.second_launch()
    return time


def waits(chip: Chip, product: Product, tile: Tile, splits: int = 1) -> dict[str, float]:
    """The seconds of its first launch if there were nothing to wait for but each of these.

    "products" on the tensor cores, operands from "L2" and from "memory", and "stops".
    """
    m, n = product.m, product.n
    programs = max(cdiv(m, tile.m) * cdiv(n, tile.n) * splits, 1)
    depth = cdiv(product.k, splits)
    moved = product.bytes_read() + (_parts(product, splits) or product.bytes_written())

    columns = tile.n + product.terms * product.ranks
    operands = 2 * (min(tile.m, m) + min(tile.n, n)) + product.rank_bytes * product.ranks
    products, ports = busy_seconds(chip, tile.m * columns, operands, depth)
    share = moved / programs / (SHARES * chip.bandwidth / chip.cores)
    waves = cdiv(programs, chip.cores)
    stops = cdiv(depth, tile.k) * product.stops
    held = 2 * (tile.m + tile.n) + product.rank_bytes * product.ranks
    return {
        "products": waves * products,
        "L2": waves * ports,
        "memory": max(waves * share, moved / chip.bandwidth),
        "stops": stopped_seconds(chip, tile, held, programs, stops),
    }


def _parts(product: Product, splits: int) -> int:
    """Bytes of a sum's parts, where it is made in more than one."""
    return 4 * splits * product.m * product.n if splits > 1 else 0


def reread_seconds(chip: Chip, size: int) -> float:
    """Seconds of reading ``size`` bytes that the launch before has written."""
    if size > chip.l2 / 2:
        return size / chip.bandwidth
    return size / ports(chip)


def ports(chip: Chip) -> float:
    """Bytes a second from L2 into all cores."""
    return chip.cores * PORT * chip.clock


def busy_seconds(chip: Chip, numbers: int, operands: int, depth: int) -> tuple[float, float]:
    """Seconds of one program: of ``numbers`` that it sums over ``depth``, of each step's operands.

    Args:
        operands: bytes.
    """
    products = 2 * numbers * depth / (REACHED * (chip.ours or chip.flops) / chip.cores)
    return products, operands * depth / (PORT * chip.clock)


def stopped_seconds(chip: Chip, tile: Tile, held: int, programs: int, stops: int) -> float:
    """Seconds of ``stops`` a program, those beside each other on a core once.

    Args:
        held: bytes of operands that a program holds of each of a block's k, in one stage.
    """
    if not (chip.shared and stops):
        return 0.0
    beside = min(WARPS // tile.warps, chip.shared // (held * tile.k * tile.stages))
    rounds = cdiv(cdiv(programs, chip.cores), max(beside, 1))
    return rounds * stops * STOP / chip.clock
