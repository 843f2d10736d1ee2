"""accelerate(): PEFT's LoRA over torchao's tensors, against the weights dequantised."""

import copy
import pickle
import warnings

import pytest
import torch
from errors import assert_as_good_as
from torch import nn

import peft_kernels
from peft_kernels.tools.bench.peak import peak_bytes

peft = pytest.importorskip("peft")
quantization = pytest.importorskip("torchao.quantization")

KERNEL = "lora_linear"
K, N = 128, 96
BY_32 = quantization.PerGroup(32)
ASYMMETRIC = quantization.MappingType.ASYMMETRIC
CONFIGS = {
    "int8": quantization.Int8WeightOnlyConfig(),
    "int8 by group": quantization.Int8WeightOnlyConfig(granularity=BY_32),
    "int4": quantization.IntxWeightOnlyConfig(torch.int4, BY_32, ASYMMETRIC),
    "nf4": None,
}


class Net(nn.Module):
    """Two layers, so that the first learns by what the second hands back."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x):
        return self.down(self.up(x).relu())


def in_codes(name="int8", dtype=torch.float32):
    torch.manual_seed(0)
    net = Net().to(dtype)
    if CONFIGS[name] is not None:
        quantization.quantize_(net, CONFIGS[name])
        return net
    for layer in net.children():
        weight = quantization.to_nf4(layer.weight.detach(), 64, 64)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return net


def dequantised(net):
    """The same layers, as nn.Linear in float64."""
    plain = Net().double()
    for name in ("up", "down"):
        own, layer = getattr(net, name), getattr(plain, name)
        weight = own.weight
        is_nf4 = hasattr(weight, "nf4")
        weight = weight.get_original_weight() if is_nf4 else weight.dequantize()
        layer.weight.data, layer.bias.data = weight.double(), own.bias.data.double()
    return plain


def lora(net, **options):
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": ["up", "down"], "init_lora_weights": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*get_apply_tensor_subclass")
        return peft.get_peft_model(net, peft.LoraConfig(**{**settings, **options}))


def step(model, x):
    model.zero_grad()
    y = model(x)
    y.sin().sum().backward()
    return [y.detach(), *(p.grad for n, p in model.named_parameters() if "lora_" in n)]


def assert_equal(found, expected, rtol=1e-4):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", CONFIGS)
def test_trains_evaluates_and_trains_as_the_weights_do_in_float64(name):
    net = in_codes(name)
    exact, model = lora(dequantised(net)).double(), lora(net)
    report = peft_kernels.accelerate(model)
    x = torch.randn(5, K)
    expected = step(exact, x.double())
    assert_equal(step(model, x), expected)
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(x).double(), exact(x.double()), rtol=1e-4, atol=1e-4
        )
    assert_equal(step(model.train(), x), expected)
    assert report.counts() == {KERNEL: 6} and not report.missing()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_in_bfloat16(name):
    """Its adapter is in float32, as PEFT has it, and y in the dtype of x."""
    net = in_codes(name, torch.bfloat16)
    exact, model = lora(dequantised(net)).double(), lora(net)
    x, dy = torch.randn(64, K).bfloat16(), torch.randn(64, N).bfloat16()

    def run(model, x, dy):
        layer, x = model.base_model.model.up, x.clone().requires_grad_()
        y = layer(x)
        factors = layer.lora_A.default.weight, layer.lora_B.default.weight
        return [y, *torch.autograd.grad(y, (x, *factors), dy)]

    theirs, expected = run(model, x, dy), run(exact, x.double(), dy.double())
    report = peft_kernels.accelerate(model)
    found = run(model, x, dy)
    assert found[0].dtype is torch.bfloat16 and report.counts() == {KERNEL: 1}
    for one, eager, reference in zip(found, theirs, expected, strict=True):
        assert_as_good_as(one, eager, reference, name)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_of_the_weights_size_is_allocated(name):
    n = 1024
    net = nn.Sequential(nn.Linear(n, n))
    if CONFIGS[name] is None:
        weight = quantization.to_nf4(net[0].weight.detach(), 64, 256)
        net[0].weight = nn.Parameter(weight, requires_grad=False)
    else:
        quantization.quantize_(net, CONFIGS[name])
    model = lora(net, target_modules=["0"])
    peft_kernels.accelerate(model)
    x = torch.randn(16, n, requires_grad=True)
    run = lambda: step(model, x)  # noqa: E731
    run()
    peak = peak_bytes(run)
    assert peak is None or peak < n * n  # a quarter of it in float32


@pytest.mark.parametrize("name", CONFIGS)
def test_compiled(name):
    """In one graph, but for nested scales: their offset is a number of the op's."""
    model = lora(in_codes(name))
    peft_kernels.accelerate(model)
    layer, x = model.base_model.model.up, torch.randn(5, K, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=name != "nf4")
    found, expected = (torch.autograd.grad(one(x).sin().sum(), x) for one in (compiled, layer))
    torch.testing.assert_close(found, expected)


def test_dropout_rslora_several_adapters_and_bfloat16():
    model = lora(in_codes(), lora_dropout=0.3, use_rslora=True)
    config = peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    theirs = copy.deepcopy(model)
    report = peft_kernels.accelerate(model)
    x = torch.randn(5, K)
    assert_equal(step(model.eval(), x), step(theirs.eval(), x))
    assert not torch.equal(model.train()(x), model(x))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(model.eval()(x), theirs.eval()(x), rtol=0.1, atol=0.5)
    assert set(report.counts()) == {KERNEL}


def test_names_by_row_are_served_and_the_base_alone_is_pefts():
    model = lora(in_codes())
    theirs = copy.deepcopy(model)
    report = peft_kernels.accelerate(model)
    x = torch.randn(5, K)
    names = ["default", "__base__", "default", "default", "__base__"]
    found, expected = (one.eval()(x, adapter_names=names) for one in (model, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(model(x), theirs(x))
    assert set(report.counts()) == {"multi_lora_linear", "disabled"}


def test_merged_layers_are_pefts():
    model = lora(in_codes())
    for layer in (model.base_model.model.up, model.base_model.model.down):
        layer.get_apply_tensor_subclass = quantization.Int8WeightOnlyConfig
    report = peft_kernels.accelerate(model)
    x = torch.randn(5, K)
    expected = model.eval()(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=0.1, atol=0.1)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=0.1, atol=0.1)
    assert report.counts() == {KERNEL: 4, "merged": 2}


def test_x_in_codes_stays_torchaos():
    net = Net()
    quantization.quantize_(net, quantization.Int8DynamicActivationInt8WeightConfig())
    model = lora(net)
    report = peft_kernels.accelerate(model)
    model(torch.randn(5, K))
    assert report.counts() == {"base_layer: x in codes as well": 2}


def test_layers_dequantised_later_and_restored():
    """The plain layer over codes is one of PEFT's again, and what it is above is looked at."""
    net = in_codes("nf4")
    plain, model = dequantised(net), lora(net)
    report = peft_kernels.accelerate(model)
    up = model.base_model.model.up
    assert repr(up).startswith("lora.Linear(") and isinstance(up, peft.tuners.lora.Linear)
    assert pickle.loads(pickle.dumps(type(up))) is type(up)
    up.get_base_layer().weight = nn.Parameter(plain.up.weight.float())
    model(torch.randn(5, K))
    assert report.counts()[KERNEL] == 1 and "base_layer: Linear of Parameter" in report.counts()
    peft_kernels.restore(model)
    assert type(up) is peft.tuners.lora.Linear
