"""A frozen embedding whose rows are in codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_kernels.modules.checks import check_kind
from peft_kernels.nn._in_codes import InCodes
from peft_kernels.ops import QuantizedWeight, dequantize
from peft_kernels.ops._gguf_blocks import BLOCKS


class QuantizedEmbedding(InCodes, nn.Embedding):  # type: ignore[override]
    """A frozen embedding in the blocks of a GGUF file: ``y[...] = weight[ids[...]]``.

    Only the rows that are looked up are dequantised. Buffers, casts, state dicts and ``weight`` are
    as of :class:`peft_kernels.nn.QuantizedLinear`.

    Args:
        weight: ``[n, k]`` in one of GGUF's layouts, over whose memory the layer is built.
        padding_idx: kept, as ``nn.Embedding`` has it.
        dtype: of y; by default torch's.

    Raises:
        TypeError: ``weight`` is no QuantizedWeight.
        ValueError: a weight in another layout, whose blocks may lie across rows.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        weight: QuantizedWeight,
        padding_idx: int | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_kind("weight", weight, QuantizedWeight)
        if weight.layout not in BLOCKS:
            raise ValueError(
                f"weight must be in one of {', '.join(BLOCKS)}, by rows; got {weight.layout}"
            )
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._keep(weight, dtype or torch.get_default_dtype())

    def forward(self, input: Tensor) -> Tensor:
        """Ids of any shape to ``[..., k]``."""
        weight = self.quantized
        n, k = weight.shape
        rows = weight.codes.view(n, -1)[input.flatten()]
        found = weight._replace(codes=rows, shape=(len(rows), k))
        return dequantize(found, self._like.dtype).view(*input.shape, k)

    def reset_parameters(self) -> None:
        """There are none to draw: codes come from a weight."""

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._format()}"
