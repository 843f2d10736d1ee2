"""LoRALinear: merging, and switching to other adapters."""

import math

import pytest
import torch
import torch.nn.functional as F
from lora_layers import make_layer
from torch import nn

from peft_kernels.nn import LoRALinear

# ---- merging ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_merge_and_unmerge(dtype):
    layer = make_layer(dtype=dtype).eval()
    x = torch.randn(5, 12, dtype=dtype)
    parameter, bits, logits = layer.weight, layer.weight.clone(), layer(x)
    layer.merge()
    merged = layer(x)
    tolerance = 1e-5 if dtype.itemsize > 2 else 3e-2
    torch.testing.assert_close(merged, logits, rtol=tolerance, atol=tolerance)
    assert torch.equal(merged, F.linear(x, layer.weight, layer.bias))
    assert not torch.equal(layer.weight, bits)
    layer.unmerge()
    assert layer.weight is parameter
    assert torch.equal(layer.weight, bits) and torch.equal(layer(x), logits)


def test_merge_rounds_once():
    layer = make_layer(dtype=torch.bfloat16)
    w, a, b = (t.detach().float() for t in (layer.weight, layer.lora_a, layer.lora_b))
    layer.merge()
    torch.testing.assert_close(layer.weight, (w + 2.0 * (b @ a)).bfloat16(), rtol=0, atol=0)


def test_merge_is_wide_under_autocast():
    layer, other = make_layer(), make_layer()
    layer.merge()
    with torch.autocast("cpu", torch.bfloat16):
        other.merge()
    assert torch.equal(layer.weight, other.weight)


def test_merging_leaves_a_tied_module_alone():
    embedding = nn.Embedding(7, 12)
    head = nn.Linear(12, 7, bias=False)
    head.weight = embedding.weight
    layer = LoRALinear.from_linear(head, 2, alpha=4)
    nn.init.normal_(layer.lora_b)
    bits = embedding.weight.clone()
    layer.merge()
    assert torch.equal(embedding.weight, bits)
    layer.unmerge()
    assert layer.weight is embedding.weight


def test_merging_twice_changes_nothing():
    layer = make_layer()
    layer.merge()
    bits = layer.weight.clone()
    with pytest.raises(RuntimeError, match="is merged"):
        layer.merge()
    with pytest.raises(RuntimeError, match="is merged"):
        layer.reset_parameters()
    assert torch.equal(layer.weight, bits)


def test_unmerging_an_unmerged_layer_changes_nothing():
    layer = make_layer()
    weight = layer.weight
    with pytest.raises(RuntimeError, match="is unmerged"):
        layer.unmerge()
    assert layer.weight is weight


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
def test_safe_merge_refuses_what_is_not_finite(value):
    layer = make_layer(dtype=torch.float16)
    nn.init.constant_(layer.lora_b, value)
    bits = layer.weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        layer.merge()
    assert not layer.merged and torch.equal(layer.weight, bits)
    layer.merge(safe=False)
    assert layer.merged and not layer.weight.isfinite().all()


# ---- switching -------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("r", [3, 5])
def test_switching_tasks(merged, r):
    layer, other = make_layer().eval(), make_layer(r=r, alpha=7).eval()
    nn.init.normal_(other.lora_a)
    nn.init.normal_(other.lora_b)
    x = torch.randn(5, 12)
    bits = layer.weight.clone()
    if merged:
        layer.merge()
    weight, lora_a = layer.weight, layer.lora_a
    layer.switch(other.lora_a, other.lora_b, scale=other.scale)
    assert layer.weight is weight and (layer.lora_a is lora_a) == (r == 3)
    torch.testing.assert_close(layer(x), other(x), rtol=1e-5, atol=1e-5)
    assert layer.r == r and layer.alpha == 7
    if merged:
        layer.unmerge()
    assert torch.equal(layer.weight, bits)
    assert torch.equal(layer(x), other(x))
    assert layer.lora_a is not other.lora_a and layer.lora_a.requires_grad


def test_switching_back_and_forth_does_not_drift():
    layer = make_layer(dtype=torch.bfloat16)
    first = (layer.lora_a.clone(), layer.lora_b.clone())
    second = (torch.randn(4, 12), torch.randn(7, 4))
    layer.merge()
    bits = layer.weight.clone()
    for _ in range(20):
        layer.switch(*second)
        assert not torch.equal(layer.weight, bits)
        layer.switch(*first)
        assert torch.equal(layer.weight, bits)


@pytest.mark.parametrize(
    ("shape_a", "shape_b", "scale", "value", "named"),
    [
        ((3, 11), (7, 3), 1.0, 1.0, "lora_a must be"),
        ((0, 12), (7, 0), 1.0, 1.0, "lora_a must be"),
        ((12,), (7, 3), 1.0, 1.0, "lora_a must be"),
        ((3, 12), (7, 4), 1.0, 1.0, "lora_b must be"),
        ((3, 12), (6, 3), 1.0, 1.0, "lora_b must be"),
        ((3, 12), (7, 3), torch.ones(2), 1.0, "scale must be"),
        ((3, 12), (7, 3), 1.0, math.nan, "not finite"),
    ],
)
def test_a_bad_switch_changes_nothing(shape_a, shape_b, scale, value, named):
    layer = make_layer()
    layer.merge()
    before = [p.clone() for p in layer.parameters()]
    with pytest.raises(ValueError, match=named):
        layer.switch(torch.full(shape_a, value), torch.ones(shape_b), scale=scale)
    assert all(map(torch.equal, before, layer.parameters()))
    assert layer.scale == 2.0 and layer.r == 3
