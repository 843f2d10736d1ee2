"""accelerate(): PEFT's LoRA over HQQ's, GPTQ's and AWQ's layers, by the reference."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

import peft_kernels
from peft_kernels.codes.layers import read_codes
from peft_kernels.ops import dequantize

peft = pytest.importorskip("peft")

KERNEL = "lora_linear"
K, N = 128, 64


class Net(nn.Module):
    def __init__(self, up, down):
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x):
        return self.down(self.up(x).relu())


def step(model, x):
    model.zero_grad()
    y = model(x)
    y.sin().sum().backward()
    return [y.detach(), *(p.grad for n, p in model.named_parameters() if "lora_" in n)]


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-4)


def over(layer):
    """The layer in float64, as nn.Linear."""
    weight = dequantize(read_codes(layer)).double()
    plain = nn.Linear(*weight.shape[::-1]).double()
    plain.weight.data, plain.bias.data = weight, layer.bias.detach().double()
    return plain


def in_hqq(axis=1):
    hqq = pytest.importorskip("hqq.core.quantize")
    torch.manual_seed(0)
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=32, axis=axis)
    make = lambda n, k: hqq.HQQLinear(  # noqa: E731
        nn.Linear(n, k), config, compute_dtype=torch.float32, device="cpu"
    )
    return Net(make(K, N), make(N, K))


def lora(net):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False)
    return peft.get_peft_model(net, config)


@pytest.mark.parametrize("axis", [0, 1])
def test_hqq_trains_evaluates_and_trains_as_the_weights_do(axis):
    net = in_hqq(axis)
    exact, model = lora(Net(over(net.up), over(net.down))).double(), lora(net)
    x = torch.randn(5, K)
    expected = step(exact, x.double())
    report = peft_kernels.accelerate(model)
    assert_equal(step(model, x), expected)
    with torch.no_grad():
        model.eval()(x)
    assert_equal(step(model.train(), x), expected)
    assert report.counts() == {KERNEL: 6} and "(reference)" in str(report)
    with model.disable_adapter(), exact.disable_adapter():
        assert_equal([model(x)], [exact(x.double())])
    assert report.counts()["disabled"] == 2
    peft_kernels.restore(model)
    assert type(model.base_model.model.up) is peft.tuners.lora.hqq.HqqLoraLinear


def words(*shape):
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


class TorchLinear(nn.Module):
    """The buffers and attributes that gptqmodel 7.7 has, in either layout."""

    def __init__(self, is_awq):
        super().__init__()
        self.bits, self.group_size, self.in_features, self.out_features = 4, 32, K, N
        self.register_buffer("qweight", words(K, N // 8) if is_awq else words(K // 8, N))
        self.register_buffer("qzeros", words(K // 32, N // 8))
        self.register_buffer("scales", torch.rand(K // 32, N).half() / 100)
        self.register_buffer("g_idx", torch.arange(K, dtype=torch.int32) // 32)
        self.register_buffer("bias", torch.randn(N).half())


class AwqTorchLinear(TorchLinear):
    pass


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_gptq_and_awq_train_as_the_weights_do(kind, monkeypatch):
    for name, own in (("torch", TorchLinear), ("torch_awq", AwqTorchLinear)):
        module = ModuleType(f"gptqmodel.nn_modules.qlinear.{name}")
        setattr(module, own.__name__, own)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.manual_seed(0)
    base = AwqTorchLinear(True) if kind == "awq" else TorchLinear(False)
    tuners = peft.tuners.lora
    wrap = tuners.awq.AwqLoraLinear if kind == "awq" else tuners.gptq.GPTQLoraLinear
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)
    layer = wrap(base, "default", config=config, r=4, lora_alpha=8).float()
    base.scales, base.bias = base.scales.half(), base.bias.half()
    report = peft_kernels.accelerate(nn.Sequential(layer))
    x, dy = torch.randn(5, K, requires_grad=True), torch.randn(5, N)
    y, a, b = layer(x), layer.lora_A["default"].weight, layer.lora_B["default"].weight
    found = [y, *torch.autograd.grad(y, (x, a, b), dy)]
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, a, b)]
    exact = over(base)(wide[0]) + wide[0] @ wide[1].T @ wide[2].T * 2
    expected = [exact, *torch.autograd.grad(exact, wide, dy.double())]
    assert_equal(found, expected)
    assert report.counts() == {KERNEL: 1} and "(reference)" in str(report)
