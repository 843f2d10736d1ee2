"""vLLM's LoRA layers without a model under them, as its manager makes and fills them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from errors import assert_as_good_as
from torch import Tensor, nn
from vllm.lora.layers import (
    LogitsProcessorWithLoRA,
    LoRAMapping,
    MergedColumnParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)

from peft_kernels.integrations.vllm.punica import PunicaWrapperPEFTKernels
from peft_kernels.integrations.vllm.wrapper import PunicaWrapperOfLayers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = 64  # the most of a step
RANKS = [8, 64, 16, 3]
K = 40


def linear(slots: int, rank: int, k: int, widths: Sequence[int], dtype: torch.dtype) -> nn.Module:
    packed = len(widths) > 1
    layer = _bare(MergedColumnParallelLinearWithLoRA if packed else RowParallelLinearWithLoRA)
    layer.n_slices, layer.output_slices, layer.tp_size = len(widths), tuple(widths), 1
    layer.lora_a_stacked = tuple(torch.zeros(slots, 1, rank, k, dtype=dtype) for _ in widths)
    layer.lora_b_stacked = tuple(torch.zeros(slots, 1, n, rank, dtype=dtype) for n in widths)
    return layer


def logits(slots: int, rank: int, k: int, n: int, dtype: torch.dtype) -> nn.Module:
    layer = _bare(LogitsProcessorWithLoRA)
    layer.lora_a_stacked = torch.zeros(slots, 1, rank, k, dtype=dtype)
    layer.lora_b_stacked = torch.zeros(slots, 1, n, rank, dtype=dtype)
    return layer


def embedding(slots: int, rank: int, vocab: int, n: int, dtype: torch.dtype) -> nn.Module:
    layer = _bare(VocabParallelEmbeddingWithLoRA)
    layer.lora_a_stacked = torch.zeros(slots, vocab, rank, dtype=dtype)
    layer.lora_a_stacked_2d = layer.lora_a_stacked.view(-1, rank)
    layer.lora_b_stacked = torch.zeros(slots, 1, n, rank, dtype=dtype)
    return layer


def _bare(kind: type) -> nn.Module:
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    return layer


def wrapper(
    *layers: nn.Module,
    most: int = ROWS,
    kind: type[PunicaWrapperOfLayers] = PunicaWrapperPEFTKernels,
) -> PunicaWrapperOfLayers:
    """One that the layers were given."""
    stacked = layers[0].lora_b_stacked if layers else [[None]]
    slots = len(stacked if isinstance(stacked, Tensor) else stacked[0])
    config = SimpleNamespace(max_loras=slots)
    made = kind(most, max_batches=most, device="cpu", lora_config=config)
    for layer in layers:
        layer.set_mapping(made)
    return made


def step(made: PunicaWrapperOfLayers, tokens: Sequence[int], prompts: Sequence[int]) -> None:
    """A step whose tokens and rows of logits have the adapters of these slots, -1 for none."""
    mapping = LoRAMapping(tuple(i + 1 for i in tokens), tuple(i + 1 for i in prompts))
    slots = max(*tokens, *prompts) + 1 if tokens else 0
    made.update_metadata(mapping, list(range(1, slots + 1)), slots + 1, 100)


Adapter = tuple[list[Tensor], list[Tensor]]


def random_adapter(rank: int, k: int, widths: Sequence[int], dtype: torch.dtype) -> Adapter:
    """A [r, k] and B [n, r] of each slice, B with its scale in it, as vLLM loads them."""
    a = [(torch.randn(rank, k) * k**-0.5).to(dtype) for _ in widths]
    b = [(torch.randn(n, rank) * rank**-0.5).to(dtype) for n in widths]
    return a, b


def fill(layer: nn.Module, adapters: Sequence[Adapter]) -> None:
    for slot, (a, b) in enumerate(adapters):
        layer.set_lora(slot, *((a, b) if len(a) > 1 else (a[0], b[0])))


def expected(
    y: Tensor, x: Tensor, adapters: Sequence[Adapter], ids: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """y with each row's update, computed in ``dtype``, and returned in it."""
    y, x = y.to(dtype).clone(), x.to(dtype)
    for i, slot in enumerate(ids):
        column = 0
        for a, b in zip(*adapters[slot], strict=True) if slot >= 0 else ():
            y[i, column : column + len(b)] += b.to(dtype) @ (a.to(dtype) @ x[i])
            column += len(b)
    return y


def filled(
    layer: nn.Module,
    widths: Sequence[int],
    dtype: torch.dtype,
    ranks: Sequence[int] = RANKS,
    k: int = K,
    kind: type[PunicaWrapperOfLayers] = PunicaWrapperPEFTKernels,
) -> tuple[PunicaWrapperOfLayers, list[Adapter]]:
    """A wrapper that the layer was given, and the adapters in the layer's slots."""
    adapters = [random_adapter(r, k, widths, dtype) for r in ranks]
    made = wrapper(layer, kind=kind)
    fill(layer, adapters)
    return made, adapters


def check(
    y: Tensor, before: Tensor, x: Tensor, adapters: Sequence[Adapter], ids: Sequence[int], name: str
) -> None:
    """That y, which was ``before``, is as near float64's as torch's own products are."""
    rest = before, x, adapters, ids
    assert_as_good_as(y, expected(*rest, y.dtype), expected(*rest, torch.float64), name)
