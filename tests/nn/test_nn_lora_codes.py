"""QuantizedLoRALinear, against LoRALinear over the codes' values in float64."""

import copy
import pickle

import pytest
import torch
from torch import nn

from peft_kernels import disabled
from peft_kernels.codes.layers import codes_of
from peft_kernels.nn import LoRALinear, QuantizedLoRALinear
from peft_kernels.ops import dequantize
from peft_kernels.tools.bench.peak import peak_bytes

quantised = pytest.importorskip("quantised")
bitsandbytes = pytest.importorskip("bitsandbytes")

N, K, R = 64, 128, 4  # whole blocks: bitsandbytes 0.50 mixes up the scales of others on CPUs
KINDS = quantised.KINDS


def make(kind="nf4", **options):
    torch.manual_seed(0)
    return quantised.layer_in_codes(nn.Linear(K, N), kind, **options)


def pair(kind="nf4", **options):
    """The layer over codes, and LoRALinear over their values."""
    base = make(kind)
    exact = LoRALinear.from_linear(quantised.plain(base).double(), R, alpha=8, **options)
    layer = QuantizedLoRALinear.from_linear(base, R, alpha=8, **options)
    layer.lora_b.data.normal_()
    if layer.use_dora:
        layer.lora_magnitude.data.mul_(torch.rand(N) + 0.5)
    with torch.no_grad():
        for name in layer.adapter_names:
            getattr(exact, name).copy_(getattr(layer, name))
    return layer, exact


def step(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.sin().sum().backward()
    return [y.detach(), x.grad, *(getattr(layer, name).grad for name in layer.adapter_names)]


def assert_close(found, expected, rtol=1e-4):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_is_lora_over_the_values(kind, use_dora):
    layer, exact = pair(kind, use_dora=use_dora)
    assert not layer.weight.requires_grad and layer.lora_a.dtype is torch.float32
    x = torch.randn(2, 5, K)
    assert_close(step(layer, x), step(exact, x.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_the_dtype_of_x(dtype):
    layer, exact = pair()
    x = torch.randn(5, K).to(dtype)
    assert layer(x).dtype is dtype
    torch.testing.assert_close(layer(x).double(), exact(x.double()), rtol=0.02, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.float()).dtype is torch.bfloat16


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_compiles_in_one_graph(kind, use_dora):
    torch._dynamo.reset()
    layer, _ = pair(kind, use_dora=use_dora)
    x = torch.randn(5, K)
    expected = step(layer, x)
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    given = x.clone().requires_grad_()
    y = compiled(given)
    y.sin().sum().backward()
    found = [y.detach(), given.grad, *(getattr(layer, name).grad for name in layer.adapter_names)]
    assert_close(found, expected, 1e-6)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_step_makes_nothing_of_the_weights_size(use_dora):
    n = k = 2048
    layer = quantised.layer_in_codes(nn.Linear(k, n))
    layer = QuantizedLoRALinear.from_linear(layer, R, alpha=8, use_dora=use_dora)
    x = torch.randn(4, k)
    step(layer, x)  # whose norm of the frozen rows is kept
    peak = peak_bytes(lambda: step(layer, x))
    assert peak is None or peak < n * k  # a quarter of it in float32


def test_keeps_the_librarys_own_tensors():
    base = make()
    layer = QuantizedLoRALinear.from_linear(base, R, alpha=8)
    assert layer.weight is base.weight and layer.bias is base.bias
    assert layer.plain(merged=False) is base


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_is_the_base(kind):
    layer, exact = pair(kind)
    x = torch.randn(5, K)
    with disabled(layer), disabled(exact):
        torch.testing.assert_close(layer(x).double(), exact(x.double()), rtol=1e-4, atol=1e-4)
        layer.merge()
        torch.testing.assert_close(layer(x).double(), exact(x.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles(kind):
    layer, _ = pair(kind)
    x = torch.randn(5, K)
    expected = step(layer, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        layer.zero_grad()
        other.zero_grad()
        assert_close(step(other, x), expected, 0)
        plain = other.plain(merged=False)
        assert type(plain) is layer._origin.kind
        assert torch.equal(dequantize(codes_of(plain)), layer.dequantized())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merged", [None, False, True])
def test_a_state_dict_is_the_librarys_with_the_adapter_beside(kind, merged):
    layer, _ = pair(kind)
    expected = make(kind).state_dict().keys()
    if merged is not None:
        layer.merge(requantize=merged)
    with pytest.warns(UserWarning) if merged is not None else warnings_off():
        state = copy.deepcopy(layer.state_dict())
    assert state.keys() == expected | {"lora_a", "lora_b", "_extra_state"}
    torch.manual_seed(1)
    other = QuantizedLoRALinear.from_linear(
        quantised.layer_in_codes(nn.Linear(K, N), kind), R, alpha=4
    )
    if merged is not None:
        other.merge(requantize=merged)
    other.load_state_dict(state)
    x = torch.randn(5, K)
    assert torch.equal(other(x), layer(x)) and other.scale == layer.scale
    assert torch.equal(other.dequantized(), layer.dequantized())


def warnings_off():
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_state_dict_is_refused(kind):
    layer, _ = pair(kind)
    with pytest.raises(RuntimeError, match="weight must be in codes"):
        layer.load_state_dict(nn.Linear(K, N).state_dict(), strict=False)
    state = layer.state_dict()
    del state["SCB" if kind == "int8" else "weight.absmax"]
    with pytest.raises((RuntimeError, KeyError)):
        layer.load_state_dict(state, strict=False)


def test_magnitudes_are_those_of_the_values_as_drawn_and_as_loaded():
    layer = QuantizedLoRALinear.from_linear(make(), R, alpha=8, use_dora=True)
    lengths = layer.dequantized().norm(dim=1)
    torch.testing.assert_close(layer.lora_magnitude.data, lengths)
    other = quantised.layer_in_codes(nn.Linear(K, N))
    other.weight.quant_state.offset *= 2
    layer.load_state_dict(other.state_dict(), strict=False)
    lengths = dequantize(codes_of(other)).norm(dim=1)
    torch.testing.assert_close(layer.lora_magnitude.data, lengths)


def test_a_kept_norm_is_that_of_the_codes_now():
    layer, _ = pair(use_dora=True)
    x = torch.randn(5, K)
    before = layer(x)
    assert torch.equal(layer(x), before)
    layer.load_state_dict(quantised.layer_in_codes(nn.Linear(K, N)).state_dict(), strict=False)
    assert torch.equal(layer(x), copy.deepcopy(layer)(x)) and not torch.equal(layer(x), before)


# ---- merging -----------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merges_into_a_dense_weight_and_back_bit_by_bit(kind, use_dora):
    layer, exact = pair(kind, use_dora=use_dora)
    x, codes = torch.randn(5, K), layer.weight.data.clone()
    before = layer(x)
    layer.merge()
    exact.merge()
    assert layer.weight.shape == (N, K) and layer.requantization_error is None
    torch.testing.assert_close(layer.weight.double(), exact.weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x).double(), exact(x.double()), rtol=1e-4, atol=1e-4)
    layer.unmerge()
    assert torch.equal(layer.weight.data, codes) and torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_merges_into_codes_again_and_says_the_error(kind):
    layer, exact = pair(kind)
    x, codes = torch.randn(5, K), layer.weight.data.clone()
    before = layer(x)
    exact.merge()
    layer.merge(requantize=True)
    found = dequantize(layer._codes()).double()
    error = (found - exact.weight).norm() / exact.weight.norm()
    assert layer.requantization_error == pytest.approx(error.item(), rel=1e-3) and error > 1e-3
    assert layer.weight.dtype is codes.dtype and not torch.equal(layer.weight.data, codes)
    expected = nn.functional.linear(x.double(), found, layer.bias.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
    assert "in codes again" in repr(layer)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    layer.unmerge()
    assert torch.equal(layer.weight.data, codes) and torch.equal(layer(x), before)


def test_merges_after_a_call_of_the_librarys_own():
    """Which moves the codes of 8 bits from the weight to the layer's state."""
    layer, _ = pair("int8")
    base = layer.plain(merged=False)
    base(torch.randn(1, K))
    x = torch.randn(5, K)
    before = layer(x)
    layer.merge(requantize=True)
    merged = layer(x)
    assert not torch.equal(merged, before)
    layer.unmerge()
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("again", [False, True])
def test_switches_while_merged(again):
    layer, _ = pair()
    layer.merge(requantize=again)
    a, b = torch.randn(2, K), torch.randn(N, 2)
    layer.switch(a, b, scale=0.5)
    other = copy.deepcopy(layer)
    other.unmerge()
    other.merge(requantize=again)
    assert layer.merged and (layer.requantization_error is not None) is again
    x = torch.randn(3, K)
    assert torch.equal(layer(x), other(x))
    with pytest.raises(ValueError, match="not finite"):
        layer.switch(a * float("inf"), b)
    assert torch.equal(layer(x), other(x))


def test_a_plain_layer_is_dense_or_in_codes_as_merged():
    x = torch.randn(3, K)
    for again, kind in ((False, nn.Linear), (True, bitsandbytes.nn.Linear4bit)):
        layer, _ = pair()
        seen = []
        layer.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        layer.merge(requantize=again)
        expected = layer(x)
        plain = layer.plain(merged=True)
        assert type(plain) is kind
        torch.testing.assert_close(plain(x.requires_grad_()), expected, rtol=1e-4, atol=1e-4)
        assert len(seen) == 2


# ---- what can't be -----------------------------------------------------------------------------


def test_layers_that_are_not_in_codes_are_refused():
    layer = bitsandbytes.nn.Linear4bit(K, N)
    with pytest.raises(TypeError, match="linear has, as a Linear4bit, a weight that isn't in code"):
        QuantizedLoRALinear.from_linear(layer, R, alpha=8)
    with pytest.raises(TypeError, match="linear has, as a Linear of Parameter,"):
        QuantizedLoRALinear.from_linear(nn.Linear(K, N), R, alpha=8)
    layer = bitsandbytes.nn.Linear8bitLt(K, N, has_fp16_weights=False, threshold=6.0).to("cpu")
    with pytest.raises(TypeError, match="outliers"):
        QuantizedLoRALinear.from_linear(layer, R, alpha=8)


def test_codes_that_are_packed_are_refused():
    layer, _ = pair()
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(TypeError, match=r"the layer of 64 outputs has, .*packed for bfloat16"):
        layer(torch.randn(1, K))
    with pytest.raises(TypeError, match="packed for bfloat16"):
        QuantizedLoRALinear.from_linear(layer.plain(merged=False), R, alpha=8)


def test_a_dense_weight_is_refused():
    layer, _ = pair()
    with pytest.raises(ValueError, match="weight must stay in codes"):
        layer.weight = nn.Parameter(torch.randn(N, K))
    with pytest.raises(RuntimeError, match="isn't drawn anew"):
        layer.reset_parameters()
