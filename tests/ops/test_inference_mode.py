"""What is made or changed under inference_mode trains outside of it."""

import pytest
import torch
from torch import nn
from trained_modules import MODULES, SHAPES

from peft_kernels import AdapterPool, load_adapter, save_adapter, swap_linear
from peft_kernels.nn import LoRALinear, PrefixTuning

X = torch.arange(24.0).view(3, 8) / 24


def make_layer() -> LoRALinear:
    layer = LoRALinear(8, 8, 2, alpha=4)
    nn.init.ones_(layer.lora_b)
    return layer


def assert_trains(layer: nn.Module) -> None:
    x = X.clone().requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None and x.grad.any()


@pytest.mark.parametrize("kind", MODULES)
def test_parameters(kind):
    with torch.inference_mode():
        module = MODULES[kind]()
    assert not any(p.is_inference() for p in module.parameters())


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("r", [2, 3])
def test_a_layer(merged, r):
    a, b = torch.randn(r, 8), torch.randn(8, r)
    with torch.inference_mode():
        layer = make_layer()
        if merged:
            layer.merge()
        layer.switch(a, b)
    assert_trains(layer)
    assert layer.merged == merged
    with torch.inference_mode():
        layer.load_state_dict(layer.state_dict())
        if merged:
            layer.unmerge()
    assert_trains(layer)
    assert layer.lora_a.grad is not None


def test_a_state_dict_that_is_merged_anew():
    layer = make_layer()
    layer.merge()
    with torch.inference_mode():
        layer.load_state_dict(make_layer().state_dict())
    assert_trains(layer)


def test_models(tmp_path):
    base = nn.Sequential(nn.Linear(8, 8))
    with torch.inference_mode():
        save_adapter(swap_linear(nn.Sequential(nn.Linear(8, 8)), ["0"], 2, alpha=4), tmp_path)
        load_adapter(base, tmp_path)
    assert_trains(base)
    assert base[0].lora_b.grad.any()


def test_a_pool(tmp_path):
    save_adapter(swap_linear(nn.Sequential(nn.Linear(8, 8)), ["0"], 2, alpha=4), tmp_path)
    model = nn.Sequential(nn.Linear(8, 8))
    with torch.inference_mode():
        pool = AdapterPool.attach(model, ["0"], capacity=32)
        pool.create("a", 2, alpha=4)
        pool.load("b", tmp_path, trainable=True)
        pool.replace("b", tmp_path)
    with pool.route(["a", "b", None]):
        assert_trains(model)
    assert all(p.grad is not None for name in "ab" for p in pool.parameters(name))
    with torch.inference_mode():
        pool.unload("a")
        pool.detach()
    assert_trains(model)


def test_a_prefix_that_is_ejected_and_fitted():
    prefix = PrefixTuning(3, SHAPES, reparametrization="mlp")
    with torch.inference_mode():
        prefix.eject()
        prefix.fit([(torch.ones(2, 3, 4), torch.ones(2, 3, 4))] * 2)
    assert not any(p.is_inference() for p in prefix.parameters())
    prefix()["self"][0][0].square().sum().backward()
