"""accelerate(): PEFT's LoRA over bitsandbytes' layers, against the weights dequantised."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import peft_kernels

peft = pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")

KERNEL = "lora_linear"
N, K = 128, 192  # whole blocks: the CPU code of bitsandbytes 0.50 mixes up the scales of other rows


class Net(nn.Module):
    """Two layers, so that the first learns by what the second hands back."""

    is_loaded_in_4bit = True

    def __init__(self, make):
        super().__init__()
        self.up, self.down = make(K, N), make(N, K)

    def forward(self, x):
        return self.down(self.up(x).relu())


def in_codes(quant_type="nf4", nested=True):
    torch.manual_seed(0)

    def make(inputs, outputs):
        layer = bitsandbytes.nn.Linear4bit(
            inputs, outputs, compress_statistics=nested, quant_type=quant_type
        )
        return layer.to("cpu")

    return Net(make)


def lora(net, **options):
    torch.manual_seed(1)
    settings = {"r": 4, "target_modules": ["up", "down"], "init_lora_weights": False}
    return peft.get_peft_model(net, peft.LoraConfig(**{**settings, **options}))


def dequantised(net):
    """The same layers, as nn.Linear in float64."""
    plain = Net(nn.Linear).double()
    for name in ("up", "down"):
        own, layer = getattr(net, name), getattr(plain, name)
        weight = bitsandbytes.functional.dequantize_4bit(own.weight.data, own.weight.quant_state)
        layer.weight.data, layer.bias.data = weight.double(), own.bias.data.double()
    plain.is_loaded_in_4bit = False
    return plain


def step(model, x):
    model.zero_grad()
    y = model(x)
    y.sin().sum().backward()
    return [y.detach(), *(p.grad for n, p in model.named_parameters() if "lora_" in n)]


def assert_equal(found, expected, rtol=1e-4):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=rtol, atol=rtol)


OPTIONS = [{}, {"lora_bias": True}, {"use_rslora": True}, {"use_dora": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("quant_type", "nested"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_trains_as_the_weights_do_in_float64(quant_type, nested, options):
    net = in_codes(quant_type, nested)
    exact, model = lora(dequantised(net), **options).double(), lora(net, **options)
    report = peft_kernels.accelerate(model)
    x = torch.randn(5, K)
    for one in (model, exact):
        torch.manual_seed(2)
        for name, parameter in one.named_parameters():
            if "magnitude" in name:
                parameter.data.mul_(torch.rand(len(parameter)) + 0.5)
    assert_equal(step(model, x), step(exact, x.double()))
    kernel = "dora_linear" if "use_dora" in options else KERNEL
    assert report.counts() == {kernel: 2} and not report.missing()


def test_dora_with_dropout_is_pefts():
    model = lora(in_codes(), use_dora=True, lora_dropout=0.5)
    theirs = copy.deepcopy(model)
    report = peft_kernels.accelerate(model)
    x = torch.randn(5, K)
    found = []
    for one in (model, theirs):
        torch.manual_seed(3)
        found.append(step(one.train(), x))
    assert_equal(*found)
    assert set(report.counts()) == {"dora_linear"}


def test_training_goes_on_after_evaluation():
    """Which packs the codes in place under PEFT alone; the layers below get no gradient then."""
    net = in_codes()
    exact, model = lora(dequantised(net)).double(), lora(net)
    peft_kernels.accelerate(model)
    x = torch.randn(5, K)
    step(model, x)
    with torch.no_grad():
        model.eval()(x)
        with model.disable_adapter():  # calls of bitsandbytes' own
            model(x)
    assert_equal(step(model.train(), x), step(exact, x.double()))


def test_evaluation_is_as_right_as_training():
    net = in_codes()
    exact, model = lora(dequantised(net)).double(), lora(net)
    peft_kernels.accelerate(model)
    x = torch.randn(1, K)
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(x).double(), exact(x.double()), rtol=1e-4, atol=1e-4
        )


def test_several_adapters_dropout_and_bfloat16():
    model = lora(in_codes(), lora_dropout=0.3)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    theirs = copy.deepcopy(model)
    report = peft_kernels.accelerate(model)
    x = torch.randn(5, K)
    assert_equal(step(model.eval(), x), step(theirs.eval(), x.requires_grad_()))
    assert not torch.equal(model.train()(x), model(x))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(model.eval()(x), theirs.train(False)(x), rtol=0.1, atol=0.5)
    assert set(report.counts()) == {KERNEL}


NAMES = ["default", "__base__", "other", "default", "__base__"]


def of_two_adapters(net, **options):
    model = lora(net, **options)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    return model


def test_each_row_has_the_adapter_that_is_named():
    net = in_codes()
    exact, model = of_two_adapters(dequantised(net)).double(), of_two_adapters(net)
    exact.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "lora" in k}, strict=False
    )
    report = peft_kernels.accelerate(model)
    x = torch.randn(5, K)
    found = [one.eval()(y, adapter_names=NAMES) for one, y in ((model, x), (exact, x.double()))]
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-4, atol=1e-4)
    assert report.counts() == {"multi_lora_linear": 2}


def test_what_is_not_served_is_counted_and_is_peft_s():
    model = of_two_adapters(in_codes(), lora_bias=True)
    theirs = copy.deepcopy(model)
    report = peft_kernels.accelerate(model)
    x = torch.randn(5, K, requires_grad=True)
    for one in (model.eval(), theirs.eval()):
        one.found = one(x, adapter_names=NAMES)
    torch.testing.assert_close(model.found, theirs.found)
    with model.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(model(x), theirs(x))
    assert set(report.counts()) == {"adapter_names with lora_bias", "disabled"}


@pytest.mark.skipif(
    not bitsandbytes.functional.has_avx512bf16(), reason="bitsandbytes packs no codes here"
)
def test_codes_that_were_packed_are_unpacked_and_said():
    model = lora(in_codes()).eval()
    x = torch.randn(5, K)
    with torch.no_grad():
        model(x)
    with pytest.warns(
        RuntimeWarning, match=r"^2 layers, such as base_model\.model\.up\.base_layer,"
    ):
        report = peft_kernels.accelerate(model)
    theirs = copy.deepcopy(model)
    peft_kernels.restore(theirs)
    assert_equal(step(model, x), step(theirs.train(), x.requires_grad_()))
    assert report.counts() == {KERNEL: 2}


def test_layers_without_an_adapter_keep_their_codes_too():
    model = lora(in_codes(), target_modules=["up"])
    peft_kernels.accelerate(model)
    x = torch.randn(5, K)
    before = step(model, x)
    with torch.no_grad():
        model.eval()(x)
    assert_equal(step(model.train(), x), before)
    peft_kernels.restore(model)
    packs = model.base_model.model.down.support_avx512bf16_for_cpu
    assert packs == bitsandbytes.functional.has_avx512bf16()


def test_copies_pickles_and_restore():
    model = lora(in_codes())
    x = torch.randn(5, K)
    expected = step(model, x.requires_grad_())
    peft_kernels.accelerate(model)
    assert repr(model.base_model.model.up).startswith("lora.Linear4bit(")
    copied = copy.deepcopy(model)
    assert_equal(step(copied, x), expected)
    assert pickle.loads(pickle.dumps(model.state_dict())).keys() == model.state_dict().keys()
    peft_kernels.restore(model)
    layer = model.base_model.model.up
    assert type(layer) is peft.tuners.lora.Linear4bit
    packs = layer.get_base_layer().support_avx512bf16_for_cpu
    assert packs == bitsandbytes.functional.has_avx512bf16()


# ---- 8 bits ------------------------------------------------------------------------------------


def in_bytes(threshold=0.0):
    torch.manual_seed(0)

    def make(inputs, outputs):
        layer = bitsandbytes.nn.Linear8bitLt(
            inputs, outputs, has_fp16_weights=False, threshold=threshold
        )
        return layer.to("cpu")

    net = Net(make)
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = False, True
    return net


def from_bytes(net):
    plain = Net(nn.Linear).double()
    plain.is_loaded_in_4bit = False
    for name in ("up", "down"):
        own, layer = getattr(net, name), getattr(plain, name)
        layer.weight.data = own.weight.CB.double() * own.weight.SCB.double()[:, None] / 127
        layer.bias.data = own.bias.data.double()
    return plain


def test_eight_bits_train_as_the_weights_do_in_float64():
    """Before bitsandbytes' own first call, which moves the codes, and after."""
    net = in_bytes()
    exact, model = lora(from_bytes(net)).double(), lora(net)
    report = peft_kernels.accelerate(model)
    x = torch.randn(5, K)
    expected = step(exact, x.double())
    assert_equal(step(model, x), expected)
    with torch.no_grad(), model.disable_adapter():
        model(x)
    assert_equal(step(model, x), expected)
    assert report.counts() == {KERNEL: 4, "disabled": 2}


def test_outliers_stay_bitsandbytes_own():
    model = lora(in_bytes(threshold=6.0))
    theirs = copy.deepcopy(model)
    report = peft_kernels.accelerate(model)
    x = torch.randn(5, K)
    torch.testing.assert_close(model(x), theirs(x))
    assert report.counts() == {"base_layer: outliers beyond a threshold": 2}


@pytest.mark.parametrize(("device", "serves"), [("cpu", "cpu"), ("cuda", "triton")])
def test_what_serves_goes_by_the_device(device, serves, monkeypatch):
    from peft_kernels.integrations.peft.codes import layers

    model = lora(in_codes())
    peft_kernels.accelerate(model)
    layer = model.base_model.model.up
    base = layers.read_base(layer)
    there = SimpleNamespace(device=torch.device(device))
    elsewhere = base._replace(weight=base.weight._replace(codes=there))
    monkeypatch.setattr(layers, "read_base", lambda layer: elsewhere)
    assert layers.backend(layer) == serves
    monkeypatch.setattr(layers, "has_kernel", lambda weight: False)
    assert layers.backend(layer) == "reference"
