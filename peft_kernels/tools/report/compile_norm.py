"""The calls of DoRA's kept norms whose launches ``compile.py`` compiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peft_kernels.triton.dora_linear.norm_launch import dora_norm_kept

N = K = 4096


@dataclass(frozen=True)
class NormCase:
    """The norms of a layer of r ranks."""

    r: int
    dtype: str
    adapter_dtype: str

    def label(self) -> str:
        dtypes = f"{self.dtype}/{self.adapter_dtype}".replace("bfloat", "bf").replace("float", "f")
        return f"norm r={self.r} {dtypes}"

    def run(self) -> None:
        def empty(*shape: int, dtype: str = "float32") -> torch.Tensor:
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        weight = empty(N, K, dtype=self.dtype)
        a, b = (
            empty(self.r, K, dtype=self.adapter_dtype),
            empty(N, self.r, dtype=self.adapter_dtype),
        )
        kept = empty(self.r, K), empty(N, self.r), empty(min(N, K))
        dora_norm_kept(weight, a, b, 1.0, empty(N), *kept)


NORM_CASES = (
    NormCase(128, "bfloat16", "float32"),
    NormCase(128, "float32", "float32"),
    NormCase(16, "bfloat16", "bfloat16"),
    NormCase(16, "float16", "float32"),
)
