"""One small module of each kind that trains."""

import torch

from peft_kernels.nn import (
    AdapterFusion,
    BottleneckAdapter,
    InvertibleAdapter,
    LoRALinear,
    PrefixTuning,
    PromptTuning,
    PTuning,
)
from peft_kernels.nn._template import Input, Slots, Template

# A tensor of each that drawing anew writes to.
DRAWN = {
    "LoRALinear": "lora_a",
    "BottleneckAdapter": "down.weight",
    "AdapterFusion": "query.weight",
    "InvertibleAdapter": "F.0.weight",
    "PromptTuning": "task_cols",
    "PromptTuning of a tensor": "prompt",
    "PTuning": "slots",
    "PrefixTuning of an MLP": "sites.self.outer.1.weight",
}
SHAPES = [(2, 4)] * 2


def make_template() -> Template:
    return Template([Slots(3), Input("x")], model="causal")


def make_fusion(**place: str) -> AdapterFusion:
    return AdapterFusion([BottleneckAdapter(8, 2, **place) for _ in range(2)])


MODULES = {
    "LoRALinear": lambda **k: LoRALinear(8, 8, 2, alpha=4, **k),
    "BottleneckAdapter": lambda **k: BottleneckAdapter(
        8, 2, scale="channel", norm_before=True, norm_after=True, gating=True, **k
    ),
    "AdapterFusion": make_fusion,
    "InvertibleAdapter": lambda **k: InvertibleAdapter(8, **k),
    "PromptTuning": lambda **k: PromptTuning(3, 8, tasks=2, rank=2, **k),
    "PromptTuning of a tensor": lambda **k: PromptTuning(3, 8, init=torch.ones(3, 8), **k),
    "PTuning": lambda **k: PTuning(make_template(), 8, **k),
    "PTuning with an MLP": lambda **k: PTuning(make_template(), 8, encoder="mlp", **k),
    "PrefixTuning": lambda **k: PrefixTuning(3, SHAPES, **k),
    "PrefixTuning of an MLP": lambda **k: PrefixTuning(3, SHAPES, reparametrization="mlp", **k),
    "PrefixTuning of zeros": lambda **k: PrefixTuning(3, SHAPES, init="zero", **k),
}
