"""Dropout that stores no mask: Philox 4x32-10 counters, the same bits in every backend.

Element (i, j) of an [m, k] input is dropped when word ``j % 4`` of
``philox(key=seed, counter=(j // 4, i, 0, 0))`` is below ``p * 2**32``. The backward draws the same
words again from the seed. Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels.ops._dtypes import acc_dtype

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``a * b``, for b below 2**32: an int64 that wraps keeps its bits."""
    product = a * b
    return (product >> 32) & _LOW, product & _LOW


def philox(seed: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (as int64) for each counter (c0, c1, 0, 0) under a 64-bit int64 seed."""
    c0, c1 = torch.broadcast_tensors(c0, c1)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        hi0, lo0 = _mulhilo(_MULTIPLIERS[0], c0)
        hi1, lo1 = _mulhilo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """Words below this are dropped."""
    return min(round(p * 2**32), 2**32 - 1)


def dropout_factor(seed: Tensor, p: float, m: int, k: int, dtype: torch.dtype) -> Tensor:
    """The [m, k] factor that dropout multiplies by: 0 where dropped, 1 / (1 - p) elsewhere."""
    groups = torch.arange((k + 3) // 4, device=seed.device)
    rows = torch.arange(m, device=seed.device)[:, None]
    words = torch.stack(philox(seed, groups, rows), dim=-1).flatten(1)[:, :k]
    return (words >= threshold(p)).to(dtype) / (1.0 - p)


def factor_of(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """The same for x ``[m, k]``, in the dtype of its sums."""
    m, k = x.shape
    return dropout_factor(seed, p, m, k, acc_dtype(x)).to(x.device)


def dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """dropout(x), in the dtype of sums."""
    wide = x.to(acc_dtype(x))
    return wide if seed is None else wide * factor_of(x, p, seed)


def draw_seed(device: torch.device) -> Tensor:
    """A 0-d int64 seed from torch's generator of ``device``, so that a checkpoint redraws it."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """So many of them, ``[count]``."""
    return torch.randint(0, 2**63 - 1, (count,), dtype=torch.int64, device=device)


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as a tensor, drawn from torch's generator if None."""
    if seed is None:
        return draw_seed(device)
    if isinstance(seed, int):
        return torch.full((), seed, dtype=torch.int64)
    if not isinstance(seed, Tensor):
        raise TypeError(f"seed must be an int or a 0-d int64 tensor; got {seed!r}")
    if seed.dim() != 0 or seed.dtype is not torch.int64:
        shape, dtype = tuple(seed.shape), seed.dtype
        raise ValueError(f"seed must be an int or a 0-d int64 tensor; got {dtype} of shape {shape}")
    return seed
