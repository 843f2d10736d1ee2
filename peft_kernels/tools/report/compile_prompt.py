"""The calls of `prompt_lookup` whose launches ``compile.py`` compiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peft_kernels.triton.prompt_lookup import launch as launchers

BATCH, SEQ, LENGTH, PROMPTS = 8, 512, 20, 16


@dataclass(frozen=True)
class PromptCase:
    """A forward and backward of `prompt_lookup`.

    ``full``: a bank with an id for each row, places by row, a mask and labels.
    """

    size: int  # of an embedding
    dtype: str
    prompt_dtype: str
    full: bool

    def label(self) -> str:
        full = " full" if self.full else ""
        dtypes = f"{self.dtype}/{self.prompt_dtype}".replace("bfloat", "bf").replace("float", "f")
        return f"prompt d={self.size} {dtypes}{full}"

    def run(self) -> None:
        def empty(*shape: int, dtype: str = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        prompts = PROMPTS if self.full else 1
        ids = empty(BATCH, dtype="int32") if self.full else None
        by_row = (BATCH,) if self.full else ()
        positions = empty(*by_row, LENGTH, dtype="int32").expand(BATCH, LENGTH)
        mask, labels = (empty(BATCH, SEQ, dtype="int64") if self.full else None for _ in range(2))
        soft = empty(prompts, LENGTH, self.size, dtype=self.prompt_dtype)
        text = empty(BATCH, SEQ, self.size)
        out, *_ = launchers.prompt_lookup_fwd(text, soft, ids, positions, mask, labels)
        launchers.prompt_lookup_bwd(out, ids, positions, prompts, True, True)


# Widths of current models, one that vectors of 16 bytes don't divide, and one narrower than a tile.
PROMPT_CASES = (
    PromptCase(4096, "bfloat16", "float32", True),
    PromptCase(4096, "bfloat16", "bfloat16", False),
    PromptCase(768, "float16", "float32", True),
    PromptCase(4096, "float32", "float32", True),
    PromptCase(1023, "bfloat16", "float32", True),
    PromptCase(48, "float32", "float32", False),
)
