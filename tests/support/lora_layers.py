"""LoRALinear layers as if trained, and what they compute."""

from __future__ import annotations

import torch
from torch import nn

from peft_kernels.nn import LoRALinear


def make_layer(k=12, n=7, r=3, *, trained=True, **options) -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(k, n, r, **{"alpha": 6, **options})
    if trained:
        nn.init.normal_(layer.lora_b, std=0.3)
    return layer


def expected(layer: LoRALinear, x: torch.Tensor) -> torch.Tensor:
    """The equation of the class, in float64, without dropout."""
    a, b, w = (t.detach().double() for t in (layer.lora_a, layer.lora_b, layer.weight))
    y = x.double() @ w.T + float(layer.scale) * (x.double() @ a.T @ b.T)
    return y if layer.bias is None else y + layer.bias.detach().double()
