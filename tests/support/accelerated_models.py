"""PEFT's models, and that accelerate() leaves them what they compute."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_bert, make_gpt2, make_llama
from torch import nn

import peft_kernels

peft = pytest.importorskip("peft")

TARGETS = {
    make_bert: ["query", "value", "intermediate.dense"],
    make_gpt2: ["c_attn", "mlp.c_proj", "lm_head"],
    make_llama: ["q_proj", "v_proj", "down_proj", "lm_head"],
}
OTHER = {
    make_bert: ["query", "key"],
    make_gpt2: ["c_attn", "c_fc"],
    make_llama: ["q_proj", "up_proj"],
}
IDS = torch.randint(0, 32, (4, 6), generator=torch.Generator().manual_seed(0))
KERNEL, ROWS, DORA = "lora_linear", "multi_lora_linear", "dora_linear"

models = pytest.mark.parametrize("make", TARGETS, ids=lambda make: make.__name__)


def make_base(make, dtype=torch.float64) -> nn.Module:
    """With weights large enough that adapters make a difference."""
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def config(targets, **options):
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
    return peft.LoraConfig(target_modules=targets, **{**settings, **options})


def make_model(make, dtype=torch.float64, **options):
    model = peft.get_peft_model(make_base(make, dtype), config(TARGETS[make], **options))
    return model.train(False)


def second(model, make, name="other", **options) -> None:
    torch.manual_seed(2)
    model.add_adapter(name, config(OTHER[make], **{"r": 3, "lora_alpha": 6, **options}))


def run(model, **inputs):
    """The output, and the gradients of all that is trained."""
    model.zero_grad()
    torch.manual_seed(5)
    output = model(input_ids=IDS, **inputs)[0]
    if output.requires_grad:
        (
            output.sin() * torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)
        ).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.detach(), gradients


def error(found, truth) -> float:
    """The root mean square of what is off."""
    return (found.double() - truth).square().mean().sqrt().item()


def assert_as_peft(model, ways, inputs=None, **tolerances):
    """The accelerated model gives what PEFT's gives, by these ways, and PEFT's own after."""
    inputs = inputs or {}
    peft_kernels.restore(model)
    expected, gradients = run(model, **inputs)
    report = peft_kernels.accelerate(model)
    output, found = run(model, **inputs)
    counts = report.counts()
    torch.testing.assert_close(output, expected, **tolerances)
    torch.testing.assert_close(found, gradients, **tolerances)
    assert set(counts) == set(ways), counts
    peft_kernels.restore(model)
    assert torch.equal(run(model, **inputs)[0], expected)


def llama(**options):
    return make_model(make_llama, **options)
