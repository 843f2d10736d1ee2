"""swap_linear and pools over this package's own layers in codes, as a GGUF file's are."""

import copy
import pickle

import pytest
import torch
from torch import nn

import peft_kernels
from peft_kernels.codes.layers import read_codes
from peft_kernels.nn import QuantizedLinear, QuantizedLoRALinear
from peft_kernels.ops import dequantize

pytest.importorskip("transformers")
from gguf_files import make_model, write_gguf

IDS = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", make_model(), "Q4_0")
    return peft_kernels.load_gguf(make_model(), path)


def trained(model):
    """With adapters whose B isn't zero, by our own layers."""
    torch.manual_seed(1)
    peft_kernels.swap_linear(model, "all-linear", r=4, alpha=8)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return model


def dequantised(model):
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, QuantizedLinear):
            parent, own = name.rsplit(".", 1) if "." in name else ("", name)
            setattr(plain.get_submodule(parent), own, module.dequantized())
    return plain


def step(model):
    model.zero_grad()
    y = model(IDS).logits
    y.sin().sum().backward()
    return [y.detach(), *(p.grad for n, p in model.named_parameters() if "lora_" in n)]


def test_it_trains_as_over_the_weights_dequantised(model):
    expected = step(trained(dequantised(model)))
    found = step(trained(model))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer) is QuantizedLoRALinear and layer.weight.dtype is torch.uint8


def test_copies_state_dicts_and_folders(model, tmp_path):
    bare = copy.deepcopy(model)
    expected = trained(model)(IDS).logits
    peft_kernels.save_adapter(model, tmp_path / "adapter")
    peft_kernels.load_adapter(bare, tmp_path / "adapter")
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for one in (bare, *copies):
        assert torch.equal(one(IDS).logits, expected)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    one.load_state_dict(model.state_dict())
    assert torch.equal(one(IDS).logits, expected)


def test_merged_dense_and_back(model):
    base, keys = model(IDS).logits, model.state_dict().keys()
    expected = trained(model)(IDS).logits
    peft_kernels.merge(model)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    peft_kernels.unmerge(model)
    assert torch.equal(model(IDS).logits, expected)
    dense = peft_kernels.unload(copy.deepcopy(model), merge=True)
    assert type(dense.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(dense(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    peft_kernels.unload(model, merge=False)
    assert type(model.model.layers[0].mlp.up_proj) is QuantizedLinear
    assert torch.equal(model(IDS).logits, base) and model.state_dict().keys() == keys


def test_a_pool(model, tmp_path):
    bare, base = copy.deepcopy(model), model(IDS).logits
    expected = trained(bare)(IDS).logits
    peft_kernels.save_adapter(bare, tmp_path / "adapter")
    pool = peft_kernels.AdapterPool.attach(model, "all-linear", capacity=32)
    pool.load("one", tmp_path / "adapter")
    with torch.no_grad(), pool.route(["one", None]):
        found = model(IDS).logits
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], base[1], rtol=1e-4, atol=1e-4)
    pool.detach()
    assert torch.equal(model(IDS).logits, base)


def test_our_own_quantiser():
    torch.manual_seed(0)
    for kind in ("nf4", "int8", "fp8"):
        net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
        peft_kernels.quantize_linear(net, kind=kind)
        x = torch.randn(5, 64)
        expected = net(x)
        peft_kernels.swap_linear(net, "all-linear", r=4, alpha=8)
        assert torch.equal(net(x), expected)
        codes = net[0].weight.clone()
        torch.testing.assert_close(net.half().float()(x), expected, rtol=1e-2, atol=1e-2)
        assert torch.equal(net[0].weight, codes)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "nf4"},
        {"kind": "fp4", "nested": False, "block": 32},
        {"kind": "int8"},
        {"kind": "fp8", "by": "tensor"},
        {"kind": "fp8", "by": "row"},
        {"kind": "fp8", "by": "block"},
    ],
    ids=str,
)
def test_merged_in_codes_again(options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    peft_kernels.quantize_linear(net, **options)
    peft_kernels.swap_linear(net, "all-linear", r=4, alpha=8)
    for layer in (net[0], net[2]):
        nn.init.normal_(layer.lora_b, std=0.05)
    x, dense = torch.randn(5, 64), copy.deepcopy(net)
    expected, state = net(x), {name: value.clone() for name, value in net.state_dict().items()}
    peft_kernels.merge(dense)
    errors = peft_kernels.merge(net, requantize=True)
    for name, error in errors.items():
        merged, plain = net.get_submodule(name), dense.get_submodule(name).weight
        assert merged.weight.dtype is state[f"{name}.weight"].dtype and 0 < error < 0.2
        values = dequantize(read_codes(merged, QuantizedLinear))
        found = torch.linalg.norm(values - plain) / torch.linalg.norm(plain)
        torch.testing.assert_close(float(found), error, rtol=1e-2, atol=1e-5)
    assert 0 < (net(x) - expected).norm() < 0.3 * expected.norm()
    peft_kernels.unmerge(net)
    assert torch.equal(net(x), expected)
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
