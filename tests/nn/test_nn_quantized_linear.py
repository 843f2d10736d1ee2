"""QuantizedLinear: a linear layer over codes, which nothing rounds and nobody writes."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from peft_kernels.nn import QuantizedLinear
from peft_kernels.ops import QuantizedWeight, dequantize
from peft_kernels.ops._gguf_blocks import BLOCKS

N, K = 24, 64


def make(kind="nf4", bias=True, **options):
    torch.manual_seed(0)
    return QuantizedLinear.from_linear(nn.Linear(K, N, bias), kind, **options)


def of_layout(layout):
    elements, size = BLOCKS[layout]
    codes = torch.randint(0, 64, (N, size), dtype=torch.uint8)
    return QuantizedWeight(codes, torch.empty(0), (N, elements), elements, layout=layout)


def in_floats():
    """Codes of float8 with scales and shifts in bfloat16, which any cast would round."""
    torch.manual_seed(0)
    scales = torch.rand(N, 2).bfloat16()
    codes = torch.randn(N, K).to(torch.float8_e4m3fn)
    return QuantizedLinear(QuantizedWeight(codes, scales, (N, K), K // 2, shifts=-scales))


LAYERS = {
    "nf4": make,
    "plain scales": lambda: make(nested=False, bias=False),
    "int8": lambda: make("int8"),
    "float8": in_floats,
    "q4_K": lambda: QuantizedLinear(of_layout("q4_K"), torch.randn(N)),
}


def step(layer, weight, bias, x):
    """y and the gradient of x, of the layer and of a product with these."""
    found = []
    for call in (layer, lambda x: nn.functional.linear(x, weight, bias)):
        own = x.clone().requires_grad_()
        y = call(own)
        y.backward(torch.arange(y.numel()).cos().view(y.shape).to(y.dtype))
        found.append((y.detach(), own.grad))
    return zip(*found, strict=True)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_a_linear_layer_with_the_weights_dequantised(name, dtype):
    layer = LAYERS[name]()
    weight = dequantize(layer.quantized).to(dtype)
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    x = torch.randn(2, 3, layer.in_features, dtype=dtype)
    far = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    for found, expected in step(layer, weight, bias, x):
        assert found.dtype is dtype and found.shape == expected.shape
        assert (found - expected).norm() <= far * expected.norm()


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_in_one_graph(name):
    layer = LAYERS[name]()
    x = torch.randn(2, layer.in_features, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = [torch.autograd.grad(call(x).sum(), x)[0] for call in (compiled, layer)]
    torch.testing.assert_close(*found)
    torch.testing.assert_close(compiled(x), layer(x))


def test_autocast_and_no_rows():
    layer = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, K)).dtype is torch.bfloat16
    assert layer(torch.randn(0, K)).shape == (0, N)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.double])
def test_casts_leave_the_codes(name, cast):
    layer = LAYERS[name]()
    expected = dequantize(layer.quantized)
    cast(layer)
    assert torch.equal(dequantize(layer.quantized), expected)
    assert layer.weight.dtype is layer._like.dtype is not torch.float32
    assert layer.bias is None or layer.bias.dtype is layer.weight.dtype
    assert layer(torch.randn(1, layer.in_features, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_copies_pickles_and_state_dicts(name):
    layer = LAYERS[name]()
    expected = dequantize(layer.quantized)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(dequantize(other.quantized), expected)
        assert repr(other) == repr(layer)
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.data.zero_()
    assert not torch.equal(dequantize(other.quantized), expected)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(dequantize(other.quantized), expected)


def test_a_state_dict_of_another_format_is_refused():
    """Q4_0 and Q4_K have as many bytes."""
    one, other = (QuantizedLinear(of_layout(layout)) for layout in ("q4_K", "q4_K"))
    blocks = QuantizedWeight(one.quantized.codes, torch.empty(0), (N, 256), 32, layout="q4_0")
    with pytest.raises(RuntimeError, match=r"'q4_0'.*got .*'q4_K'"):
        QuantizedLinear(blocks).load_state_dict(other.state_dict())


def test_weight_can_be_read_and_not_written():
    layer = make()
    expected = dequantize(layer.quantized)
    assert layer.weight.shape == (N, K) and layer.weight.device.type == "cpu"
    assert torch.equal(layer.weight.data.clone(), expected)
    assert torch.equal(layer.weight + 0, expected)
    assert torch.equal(torch.empty(N, K).copy_(layer.weight), expected)
    with pytest.raises(TypeError, match="can't be written"):
        layer.weight.data += 1
    with pytest.raises(TypeError, match="can't be written"):
        layer.weight.data = expected
    with torch.no_grad(), pytest.raises(TypeError, match="can't be written"):
        layer.weight.copy_(expected)
    for value in (nn.Parameter(expected), make().weight, None):
        with pytest.raises(TypeError, match="can't be written"):
            layer.weight = value
    layer.weight = layer.weight  # as tying does
    assert torch.equal(dequantize(layer.quantized), expected)


def test_nothing_of_it_trains_and_it_keeps_the_codes_alone_for_backward():
    layer = make("nf4", bias=False)
    assert not any(p.requires_grad for p in layer.parameters())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        y = layer(torch.randn(2, K, requires_grad=True))
    assert max(t.nbytes for t in kept if isinstance(t, torch.Tensor)) < N * K and y.requires_grad


def test_from_linear_takes_bias_hooks_and_mode():
    linear = nn.Linear(K, N).eval().bfloat16()
    calls = []
    linear.register_forward_hook(lambda *_: calls.append(1))
    layer = QuantizedLinear.from_linear(linear, "int8")
    layer(torch.randn(1, K, dtype=torch.bfloat16))
    assert layer.bias is linear.bias and not layer.training and calls == [1]
    assert layer.weight.dtype is torch.bfloat16
    transformers = pytest.importorskip("transformers")
    conv = transformers.pytorch_utils.Conv1D(N, K)
    made = QuantizedLinear.from_linear(conv, "int8")
    x = torch.randn(2, K)
    assert (made(x) - conv(x)).norm() < 0.02 * conv(x).norm()


def test_dequantized():
    layer = make().eval()
    plain = layer.dequantized()
    assert type(plain) is nn.Linear and plain.bias is layer.bias and not plain.training
    assert torch.equal(plain.weight, dequantize(layer.quantized))
    assert not plain.weight.requires_grad
    half = layer.dequantized(torch.bfloat16)
    assert half.bias.dtype is half.weight.dtype is torch.bfloat16


def test_repr():
    expected = "QuantizedLinear(in_features=64, out_features=24, bias=True, layout=planes, "
    assert repr(make(nested=False)) == expected + "block=64, bits=4.50)"
    assert "layout=q4_K, bits=4.50)" in repr(QuantizedLinear(of_layout("q4_K")))


def test_bad_input():
    with pytest.raises(TypeError, match="weight must be a QuantizedWeight"):
        QuantizedLinear(torch.randn(4, 4))
    with pytest.raises(ValueError, match=r"bias must be \[24\]; got \[3\]"):
        QuantizedLinear(of_layout("q8_0"), torch.randn(3))
    with pytest.raises(ValueError, match="kind must be one of"):
        QuantizedLinear.from_linear(nn.Linear(2, 2), "int3")
    with pytest.raises(TypeError, match=r"must be torch\.nn\.Linear"):
        QuantizedLinear.from_linear(nn.Conv1d(2, 2, 1))
    with pytest.raises(ValueError, match="must end in weight's k = 64"):
        make()(torch.randn(2, K + 1))
