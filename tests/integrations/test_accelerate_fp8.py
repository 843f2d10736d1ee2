"""accelerate(): PEFT's LoRA over transformers' FP8Linear, whose own code needs a GPU."""

import pickle

import pytest
import torch
from torch import nn

import peft_kernels
from peft_kernels.codes.layers import read_codes
from peft_kernels.ops import dequantize, quantize

peft = pytest.importorskip("peft")
fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")

KERNEL = "lora_linear"
K, N = 192, 130


class Net(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.up, self.down = make(K, N), make(N, K)

    def forward(self, x):
        return self.down(self.up(x).relu())


def in_codes():
    torch.manual_seed(0)

    def make(inputs, outputs):
        layer = fp8.FP8Linear(inputs, outputs, block_size=(128, 128))
        found = quantize(torch.randn(outputs, inputs) / inputs**0.5, "fp8", by="block")
        layer.weight.data = found.codes
        layer.weight_scale_inv.data = found.scales.view(layer.weight_scale_inv.shape)
        return layer

    return Net(make)


def dequantised(net):
    plain = Net(lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)).double()
    for name in ("up", "down"):
        weight = dequantize(read_codes(getattr(net, name)))
        getattr(plain, name).weight.data = weight.double()
    return plain


def lora(net):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["up", "down"])
    model = peft.get_peft_model(net, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape).to(parameter.dtype) / 8
    return model


def step(model, x):
    model.zero_grad()
    y = model(x)
    y.sin().sum().backward()
    return [y.detach(), *(p.grad for n, p in model.named_parameters() if "lora_" in n)]


def test_trains_evaluates_and_trains_as_the_weights_do_in_float64():
    net = in_codes()
    exact, model = lora(dequantised(net)).double(), lora(net)
    report = peft_kernels.accelerate(model)
    x = torch.randn(5, K)
    expected = step(exact, x.double())
    for _ in range(2):
        for one, other in zip(step(model.train(), x), expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            model.eval()(x)
    assert report.counts() == {KERNEL: 8} and not report.missing()
    assert KERNEL in str(report) or "cpu" in str(report)
    up = model.base_model.model.up
    assert repr(up).startswith("lora.Linear(")
    assert pickle.loads(pickle.dumps(type(up))) is type(up)
    peft_kernels.restore(model)
    assert type(up) is peft.tuners.lora.Linear
