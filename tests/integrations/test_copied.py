"""A whole model with a method in it is copied, pickled, or cast to another dtype."""

import copy
import pickle

import pytest
import torch
from torch import nn

import peft_kernels
from peft_kernels.nn import PromptTuning

transformers = pytest.importorskip("transformers")
from peft_kernels.integrations.transformers import (  # noqa: E402  it needs transformers
    add_prefix,
    add_prompt,
    insert_adapters,
    prefix_for,
    remove_adapters,
    remove_prefix,
    remove_prompt,
)

IDS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
METHODS = {
    "lora": (
        lambda model: peft_kernels.swap_linear(model, ["q_proj", "down_proj"], r=4, alpha=8),
        lambda model: peft_kernels.unload(model, merge=False),
    ),
    "adapters": (lambda model: insert_adapters(model, "houlsby"), remove_adapters),
    "prefix": (lambda model: add_prefix(model, prefix_for(model, 3)), remove_prefix),
    "prompt": (lambda model: add_prompt(model, PromptTuning(3, 32)), remove_prompt),
}
each_method = pytest.mark.parametrize("method", METHODS)


def base() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def with_method(method: str) -> nn.Module:
    model = base()
    METHODS[method][0](model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits[:, -4:]


@each_method
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_model_computes_and_trains_on_its_own(method, duplicate):
    model, plain = with_method(method), logits(base())
    expected = logits(model)
    assert not torch.allclose(expected, plain, atol=1e-2)
    other = duplicate(model)
    assert torch.equal(logits(other), expected)
    other(input_ids=IDS, labels=IDS).loss.backward()
    trained = [p for p in other.parameters() if p.requires_grad]
    assert all(p.grad.any() for p in trained)
    torch.optim.SGD(trained, lr=1.0).step()
    assert not torch.allclose(logits(other), expected)
    METHODS[method][1](other)
    torch.testing.assert_close(logits(other), plain)
    assert torch.equal(logits(model), expected)
    assert all(p.grad is None for p in model.parameters())


@each_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cast_of_a_model_computes_the_same_but_for_rounding(method, dtype):
    model = with_method(method)
    expected, plain = logits(model), logits(base())
    found = logits(model.to(dtype))
    assert found.dtype is dtype
    assert all(p.dtype is dtype for p in model.parameters())
    assert (found - expected).norm() < 0.1 * (expected - plain).norm()
