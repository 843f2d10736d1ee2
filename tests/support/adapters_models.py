"""Tiny models of `adapters`, and what an accelerated one must do beside the library's own."""

import pytest
import torch
from tiny_models import make_bert, make_gpt2, make_llama
from torch import nn

pytest.importorskip("adapters")

import adapters
import transformers
from adapters.composition import Average, BatchSplit, Parallel, Split, Stack

import peft_kernels

KERNEL, FUSION, LORA, ROWS = "adapter", "adapter_fusion", "lora_linear", "multi_lora_linear"
IDS = torch.randint(0, 32, (4, 6), generator=torch.Generator().manual_seed(0))


def make_t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return transformers.T5Model(config)


def make_gemma() -> nn.Module:
    """One that `adapters` knows by hooks alone."""
    config = transformers.Gemma2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return transformers.Gemma2Model(config)


MAKERS = [make_bert, make_gpt2, make_llama, make_t5, make_gemma]
models = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def with_adapters(make, dtype=torch.float64, **configs) -> nn.Module:
    """A model with these adapters, all weights large enough to make a difference."""
    torch.manual_seed(0)
    model = make()
    adapters.init(model)
    for name, config in configs.items():
        model.add_adapter(name, config=config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.to(dtype)
    if configs:
        model.set_active_adapters(next(iter(configs)))
    for parameter in model.parameters():
        parameter.requires_grad_()
    return model.eval()


def bottleneck(preset="seq_bn", **options):
    return adapters.AdapterConfig.load(preset, reduction_factor=4, **options)


def lora(**options):
    settings = {"r": 4, "alpha": 8, "attn_matrices": ["q", "v"], "output_lora": True}
    return adapters.LoRAConfig(**{**settings, **options})


def run(model, **inputs):
    """The output, and the gradients of all that is trained."""
    model.zero_grad()
    torch.manual_seed(5)
    if isinstance(model, transformers.T5Model):
        inputs["decoder_input_ids"] = IDS.flip(1)
    output = model(input_ids=IDS, **inputs)[0]
    if output.requires_grad:
        weights = torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)
        (output.sin() * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.detach(), gradients


def assert_as_theirs(model, ways, inputs=None, **tolerances):
    """The accelerated model gives what theirs gives, by these ways, and goes back to that."""
    peft_kernels.restore(model)
    classes = [type(module) for module in model.modules()]
    inputs = inputs or {}
    expected, gradients = run(model, **inputs)
    report = peft_kernels.accelerate(model)
    output, ours = run(model, **inputs)
    torch.testing.assert_close(output, expected, **tolerances)
    torch.testing.assert_close(ours, gradients, **tolerances)
    assert set(report.counts()) == set(ways), report.counts()
    peft_kernels.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any("peft_kernels" in key for module in model.modules() for key in vars(module))
    assert torch.equal(run(model, **inputs)[0], expected)
    return report


COMPOSITIONS = {
    "stack": lambda: Stack("a", "b"),
    "split": lambda: Split("a", "b", splits=[2, 4]),
    "batch_split": lambda: BatchSplit("a", "b", batch_sizes=[1, 3]),
    "parallel": lambda: Parallel("a", "b"),
    "average": lambda: Average("a", "b", weights=[0.3, 0.7]),
    "stack_of_parallel": lambda: Stack("a", Parallel("b", "c")),
    "split_of_stack": lambda: Split(Stack("a", "b"), "c", splits=[2, 4]),
}
