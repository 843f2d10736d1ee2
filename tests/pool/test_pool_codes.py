"""AdapterPool over quantised models, against the same over their values."""

import copy

import pytest
import torch
from torch import nn

import peft_kernels
from peft_kernels import AdapterPool
from peft_kernels.nn import QuantizedMultiLoRALinear

quantised = pytest.importorskip("quantised")

IDS = torch.arange(12).view(2, 6) % 32
TARGETS = ["q_proj", "down_proj"]


def make(kind="nf4"):
    without = ["lm_head"]
    if kind == "int8":  # where bitsandbytes' own layers round x as well
        without += ["k_proj", "v_proj", "o_proj", "up_proj", "gate_proj"]
    return quantised.in_codes(quantised.make_plain_llama(), kind, without)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(1)
    model = peft_kernels.swap_linear(make(), TARGETS, 4, alpha=8)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            parameter.data.normal_(std=0.1)
    peft_kernels.save_adapter(model, tmp_path / "a")
    return tmp_path / "a"


def pooled(model, folder, **options):
    pool = AdapterPool.attach(model, TARGETS, capacity=32)
    pool.load("a", folder, **options)
    return pool


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_serves_and_trains_as_over_the_values(kind, folder):
    model = make(kind)
    exact = quantised.dequantised(model, torch.float32)
    pools = [pooled(one, folder, trainable=True) for one in (model, exact)]
    layers = [one for one in model.modules() if isinstance(one, QuantizedMultiLoRALinear)]
    assert len(layers) == 4
    found = []
    for one, pool in zip((model, exact), pools, strict=True):
        with pool.route(["a", None]):
            out = one(IDS, labels=IDS)
            out.loss.backward()
        found.append([out.logits, *(p.grad for p in pool.parameters("a"))])
    for ours, theirs in zip(*found, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model(IDS).logits, exact(IDS).logits, rtol=1e-4, atol=1e-5)


def test_trains_after_an_evaluation(folder):
    """Which packs the codes of bitsandbytes' own layers in place, those beside the pool's too."""
    model = make()
    pool = pooled(model, folder, trainable=True)

    def gradients():
        for parameter in pool.parameters("a"):
            parameter.grad = None
        with pool.route(["a", "a"]):
            model(IDS, labels=IDS).loss.backward()
        return [p.grad for p in pool.parameters("a")]

    before = gradients()
    with torch.no_grad(), pool.route(["a", None]):
        model(IDS)
    assert all(map(torch.equal, gradients(), before))


def test_the_state_dict_is_the_librarys_and_detaching_gives_its_layers_back(folder):
    model = make()
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    pool = pooled(model, folder)
    assert model.state_dict().keys() == state.keys()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing and not any(name in key for key in unexpected for name in TARGETS)
    pool.detach()
    assert dict(model.named_modules()) == modules


def test_saves_what_swap_linear_loads(folder, tmp_path):
    model = make()
    pool = pooled(model, folder)
    pool.save("a", tmp_path / "again")
    with pool.route(["a", "a"]):
        expected = model(IDS).logits
    other = peft_kernels.load_adapter(make(), tmp_path / "again")
    torch.testing.assert_close(other(IDS).logits, expected, rtol=1e-5, atol=1e-6)


def test_a_layer_that_is_not_in_codes_is_named():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64))
    with pytest.raises(TypeError, match=r"^0 has, as a Linear4bit, a weight that isn't in codes"):
        AdapterPool.attach(model, ["0"], capacity=8)
    with pytest.raises(TypeError, match="linear has, as a Linear4bit"):
        QuantizedMultiLoRALinear.from_linear(model[0], slots=1, pages=1, max_pages=1, router=None)
