"""The calls of `prefix_attention` whose launches ``compile.py`` compiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peft_kernels.triton.prefix_attention import launch as launchers

HEADS, KV_HEADS, PREFIXES = 32, 8, 4


@dataclass(frozen=True)
class PrefixCase:
    """A forward and backward of `prefix_attention`; without a backward the queries are few.

    ``mask``: its dtype, if there is one. ``bank``: with an index for each row, and left padding.
    """

    queries: int
    keys: int
    length: int
    size: int  # of a head
    dtype: str
    prefix_dtype: str
    mask: str = ""
    bank: bool = False
    backward: bool = True

    def label(self) -> str:
        dtypes = f"{self.dtype}/{self.prefix_dtype}".replace("bfloat", "bf").replace("float", "f")
        extra = (f" {self.mask} mask" if self.mask else "") + (" bank" if self.bank else "")
        sizes = f"S={self.queries} T={self.keys} L={self.length} D={self.size}"
        return f"prefix {sizes} {dtypes}{extra}"

    def run(self) -> None:
        batch = 4

        def empty(*shape: int, dtype: str = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        q = empty(batch, self.queries, HEADS, self.size).transpose(1, 2)
        k, v = (empty(batch, KV_HEADS, self.keys, self.size) for _ in "kv")
        bank = (PREFIXES if self.bank else 1, KV_HEADS, self.length, self.size)
        prefix_k, prefix_v = (empty(*bank, dtype=self.prefix_dtype) for _ in "kv")
        by_row = empty(batch, dtype="int32") if self.bank else None
        mask = None
        if self.mask:
            mask = empty(batch, 1, self.queries, self.keys, dtype=self.mask)
            mask = mask.expand(batch, HEADS, self.queries, self.keys)
        inputs = (q, k, v, prefix_k, prefix_v, by_row, mask, by_row, None)
        out, lse = launchers.prefix_attention_fwd(*inputs, True, self.size**-0.5)
        if self.backward:
            launchers.prefix_attention_bwd(
                out, *inputs, out, lse, True, self.size**-0.5, True, True, True
            )


def _decoding(size: int, dtype: str, mask: str = "") -> PrefixCase:
    """In parts of the keys."""
    return PrefixCase(1, 16384, 32, size, dtype, dtype, mask, backward=False)


def _training(size: int, dtype: str, mask: str = "") -> PrefixCase:
    return PrefixCase(2048, 2048, 32, size, dtype, dtype, mask)


SIZES = (64, 128, 256)
# The shapes of current models: heads of 64 to 256, of which four share their keys, without a mask
# and with one of each kind. Those of 80 are padded to 128.
PREFIX_CASES = (
    *(_decoding(size, "bfloat16") for size in SIZES),
    *(_decoding(size, "bfloat16", "bfloat16") for size in SIZES),
    *(_decoding(size, "float32") for size in SIZES[:2]),
    *(_training(size, "bfloat16") for size in SIZES),
    *(_training(size, "bfloat16", "bool") for size in SIZES),
    *(_training(size, "bfloat16", "bfloat16") for size in SIZES),
    *(_training(size, "bfloat16", "float32") for size in SIZES),
    _training(80, "bfloat16"),
    PrefixCase(2048, 2048, 32, 64, "float16", "float32", "float16", bank=True),
    PrefixCase(2048, 2048, 32, 128, "float16", "float32", "float16", bank=True),
    # dq of wider ones spills on some chips
    _training(64, "float32"),
    _training(64, "float32", "float32"),
)
