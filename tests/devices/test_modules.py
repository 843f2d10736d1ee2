"""Modules and models on the device of ``--device``: values, and the gradients of a step."""

import copy

import torch
from devices import leaf
from errors import assert_as_good_as
from tiny_models import make_bert, make_llama
from torch import nn

import peft_kernels
from peft_kernels import AdapterPool
from peft_kernels.integrations.transformers import (
    adapters_of,
    add_prefix,
    add_prompt,
    insert_adapters,
    prefix_for,
)
from peft_kernels.nn import (
    AdapterFusion,
    BottleneckAdapter,
    InvertibleAdapter,
    LoRALinear,
    PromptTuning,
)


def step(module, device, dtype, *inputs):
    """The output of a module and the gradients of its inputs and parameters, on the CPU."""
    module = copy.deepcopy(module).to(device, dtype)
    given = [leaf(x.to(device, dtype)) for x in inputs]
    y = module(*given)
    y = y[0] if isinstance(y, tuple) else y
    weights = torch.arange(y.numel(), dtype=torch.float64).cos().view(y.shape)
    trained = [p for p in module.parameters() if p.requires_grad]
    found = (y, *torch.autograd.grad(y, [*given, *trained], weights.to(y)))
    return [tensor.detach().cpu() for tensor in found]


def check(module, device, *inputs):
    with peft_kernels.backend("reference"):
        exact = step(module, "cpu", torch.float64, *inputs)
        eager = step(module, "cpu", torch.float32, *inputs)
    found = step(module, device, torch.float32, *inputs)
    for i, (ours, theirs, right) in enumerate(zip(found, eager, exact, strict=True)):
        assert_as_good_as(ours, theirs, right, f"{type(module).__name__}, tensor {i}")


def filled(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def test_lora_linear(device):
    layer = LoRALinear.from_linear(nn.Linear(40, 24), 4, alpha=8)
    nn.init.normal_(layer.lora_b)
    check(layer, device, torch.randn(9, 40))
    layer.to(device)
    x = torch.randn(3, 40, device=device)
    y, weight = layer(x), layer.weight.clone()
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)
    layer.unmerge()
    assert torch.equal(layer.weight, weight)


def test_adapters(device):
    x = torch.randn(9, 24)
    check(filled(BottleneckAdapter(24, 6)), device, x)
    check(filled(InvertibleAdapter(24)), device, x)
    fusion = AdapterFusion([BottleneckAdapter(24, 3 + i) for i in range(3)])
    check(fusion, device, x)


def of_model(model, device, prepare, **inputs):
    """A model's first output on a device, float32, and its method's gradients."""
    torch.manual_seed(1)
    model = copy.deepcopy(model).to(device)
    trained = prepare(model)
    y = model(input_ids=torch.arange(10).view(2, 5).to(device), **inputs)[0]
    gradients = torch.autograd.grad(y.square().sum(), trained)
    return [tensor.detach().cpu() for tensor in (y, *gradients)]


def check_model(model, device, prepare, **inputs):
    with peft_kernels.backend("reference"):
        expected = of_model(model, "cpu", prepare, **inputs)
    found = of_model(model, device, prepare, **inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def drawn(parameters, device):
    """Random values that are the same on every device."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return parameters


def test_a_model_with_lora(device):
    def prepare(model):
        peft_kernels.swap_linear(model, ["q_proj", "v_proj"], 4, alpha=8)
        return drawn([p for p in model.parameters() if p.requires_grad], device)

    check_model(make_llama().eval(), device, prepare)


def test_a_model_with_adapters(device):
    def prepare(model):
        insert_adapters(model, "houlsby")
        return drawn([p for a in adapters_of(model).values() for p in a.parameters()], device)

    check_model(make_bert().eval(), device, prepare)


def test_a_model_with_a_prefix(device):
    def prepare(model):
        prefix = prefix_for(model, 3).to(model.device)
        add_prefix(model, prefix)
        return drawn(list(prefix.parameters()), device)

    check_model(make_llama().eval(), device, prepare)


def test_a_model_with_a_prompt(device):
    def prepare(model):
        prompt = PromptTuning(3, 16, tasks=2).to(model.device)
        add_prompt(model, prompt)
        return drawn(list(prompt.parameters()), device)

    check_model(make_llama().eval(), device, prepare, task_ids=torch.tensor([1, 0]))


def test_a_pool_serves_and_trains(device):
    base = make_llama().eval()

    def outcome(device):
        torch.manual_seed(1)
        model = copy.deepcopy(base).to(device)
        pool = AdapterPool.attach(model, ["q_proj", "v_proj"], capacity=32)
        for name, r in (("a", 3), ("b", 9)):
            pool.create(name, r=r, alpha=8)
            drawn(list(pool.parameters(name)), device)
        tokens = torch.arange(10).view(2, 5).to(device)
        with pool.route(["b", None]):
            served = model(input_ids=tokens)[0].detach()
        with pool.route(["a", "b"]):
            model(input_ids=tokens)[0].square().sum().backward()
        gradients = [p.grad for name in "ab" for p in pool.parameters(name)]
        return [tensor.cpu() for tensor in (served, *gradients)]

    with peft_kernels.backend("reference"):
        expected = outcome("cpu")
    for ours, theirs in zip(outcome(device), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
