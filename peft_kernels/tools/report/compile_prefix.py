"""The calls of `prefix_attention` whose launches ``compile.py`` compiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peft_kernels.triton.prefix_attention import launch as launchers

HEADS, KV_HEADS, PREFIXES = 32, 8, 4


@dataclass(frozen=True)
class PrefixCase:
    """A forward and backward of `prefix_attention`; without a backward the queries are few.

    ``full``: a bank with an index for each row, left padding and a float mask.
    """

    queries: int
    keys: int
    length: int
    size: int  # of a head
    dtype: str
    prefix_dtype: str
    full: bool
    backward: bool = True

    def label(self) -> str:
        full = " full" if self.full else ""
        dtypes = f"{self.dtype}/{self.prefix_dtype}".replace("bfloat", "bf").replace("float", "f")
        return f"prefix S={self.queries} T={self.keys} L={self.length} D={self.size} {dtypes}{full}"

    def run(self) -> None:
        batch = 4

        def empty(*shape: int, dtype: str = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        q = empty(batch, self.queries, HEADS, self.size).transpose(1, 2)
        k, v = (empty(batch, KV_HEADS, self.keys, self.size) for _ in "kv")
        bank = (PREFIXES if self.full else 1, KV_HEADS, self.length, self.size)
        prefix_k, prefix_v = (empty(*bank, dtype=self.prefix_dtype) for _ in "kv")
        by_row = empty(batch, dtype="int32") if self.full else None
        mask = None
        if self.full:
            mask = empty(batch, 1, self.queries, self.keys)
            mask = mask.expand(batch, HEADS, self.queries, self.keys)
        inputs = (q, k, v, prefix_k, prefix_v, by_row, mask, by_row, None)
        out, lse = launchers.prefix_attention_fwd(*inputs, True, self.size**-0.5)
        if self.backward:
            launchers.prefix_attention_bwd(
                out, *inputs, out, lse, True, self.size**-0.5, True, True, True
            )


# The shapes of current models: heads of 64 to 256, of which four share their keys. Those of 80 are
# padded to 128.
PREFIX_CASES = (
    # decoding, in parts of the keys
    PrefixCase(1, 16384, 32, 128, "bfloat16", "bfloat16", False, backward=False),
    PrefixCase(1, 16384, 32, 256, "bfloat16", "bfloat16", False, backward=False),
    # training
    PrefixCase(2048, 2048, 32, 128, "bfloat16", "bfloat16", False),
    PrefixCase(2048, 2048, 32, 64, "float16", "float32", True),
    PrefixCase(2048, 2048, 32, 80, "bfloat16", "bfloat16", False),
    PrefixCase(2048, 2048, 32, 256, "bfloat16", "bfloat16", False),
    PrefixCase(512, 512, 32, 64, "float32", "float32", False),
)
